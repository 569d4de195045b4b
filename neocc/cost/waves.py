"""Matrix products on a GPU: output tiles handed to its multiprocessors, a wave at a time.

Sources: NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave quantisation); the
efficient-GEMM page of CUTLASS (a tile loads its operands once for every step along k, split-k where
tiles are too few to fill the device); the architecture papers of V100 and A100 (bytes a clock from
the L2 cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from neocc.cost.hardware import Multiprocessors

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))  # m x n of one SM
SPLITS = (1, 2, 4, 8)  # ways to cut k
STEP = 32  # elements of k that a tile advances by


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of the result that ``sms`` multiprocessors make together."""

    m: int
    n: int
    sms: int = 1


def tiles(sm: Multiprocessors) -> Iterator[Tile]:
    """Tiles to choose from; multiprocessors that form clusters share what a pair loads."""
    for m, n in TILES:
        yield Tile(m, n)
    if sm.cluster > 1:
        yield Tile(256, 256, 2)


def wave_time(
    sm: Multiprocessors,
    rate: float,
    batch: int,
    m: int,
    n: int,
    k: int,
    operand_bytes: float,
) -> float:
    """Seconds of ``batch`` products [m, k] x [k, n] in the best tiles, memory not counted.

    ``rate``: FLOP/s that the whole device reaches in full waves. ``operand_bytes``: of one
    element. A wave is as many tiles as the device holds at a time, and a last, partly filled one
    takes as long as the others. A tile takes the longer of its FLOPs and of loading its operands,
    and ``fill`` to start and to write its result.
    """
    best = float("inf")
    if not batch * m * n * k:
        return 0.0
    for tile in tiles(sm):
        count = batch * -(-m // tile.m) * -(-n // tile.n)
        at_once = sm.count // tile.sms
        for split in SPLITS:
            depth = -(-k // (split * STEP)) * STEP
            waves = -(-count * split // at_once)
            share = tile.sms / sm.count
            compute = 2.0 * tile.m * tile.n * depth / (rate * share)
            load = (tile.m + tile.n) * depth * operand_bytes / (sm.operand_bandwidth * share)
            # Partial results of a split are added up through the cache, in f32.
            merge = 8.0 * batch * m * n * (split - 1) / sm.operand_bandwidth
            best = min(best, waves * (max(compute, load) + sm.fill) + merge)
    return best
