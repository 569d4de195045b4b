"""Bytes that an array takes in a device's memory, with the padding of its tiled layout.

A TPU lays an array out in tiles of 8 sublanes by 128 lanes (``T(8,128)`` in HLO): the two minor
dims are padded to whole tiles; values narrower than 32 bits are packed along the sublanes
(``(2,1)``). The compiler is free to order the dims, and chooses so that little is padded; a dim
shorter than a tile takes a smaller one (``T(4,128)``). An array of one dim is padded to 1024
elements. Seen in the buffers of compiled programs (libtpu 0.0.42).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from neocc.cost.hardware import Chip
from neocc.ir.types import Dim

LANES, SUBLANES, LINE = 128, 8, 1024
COPIED = 110.0  # bytes a cycle of one core; see ``copied_seconds``


def stored_bytes(chip: Chip, shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array of local ``shape`` in the chip's memory."""
    return (
        tiled_bytes(tuple(shape), itemsize) if chip.kind == "tpu" else math.prod(shape) * itemsize
    )


@lru_cache(maxsize=65536)
def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array on a TPU, its dims in the order that pads least."""
    sizes = [n for n in shape if n != 1]
    if not math.prod(sizes):
        return 0
    if len(sizes) < 2:
        return _up(math.prod(sizes), LINE) * itemsize
    whole = math.prod(sizes)
    padded = min(
        whole // (second * minor) * _up(minor, LANES) * _up(second, _rows(second))
        for second, minor in itertools.permutations(sizes, 2)
    )
    return padded * itemsize


def lane_dim(dims: Sequence[Dim]) -> Dim:
    """The dim that a TPU lays along the lanes where a product or a gather of rows reads or makes an
    array of these: the last one, or, where that would be padded, the largest that is not."""
    whole = [d for d in dims if d.size % LANES == 0]
    return dims[-1] if dims[-1] in whole or not whole else max(whole, key=lambda d: d.size)


def copied_seconds(chip: Chip, size: int) -> float:
    """Seconds in which a TPU turns an array of ``size`` bytes, apart or in the product that makes
    or reads it: collectives join and part arrays along an outer dim, and pieces of the one along
    the lanes need not be whole rows. The rate is read off estimates of the TPU compiler (libtpu
    0.0.42; a weight of 2560 x 32 x 80 cut 16 ways): 115 bytes a cycle in copies after gathers, 105
    in products before a scatter, 90 to 230 about all-to-alls.
    """
    return 0.0 if chip.vector_clock is None else size / COPIED / (chip.vector_clock / chip.cores)


def _rows(size: int) -> int:
    """Sublanes of the tile for a second minor dim of this size."""
    return SUBLANES if size >= SUBLANES else 1 << (size - 1).bit_length()


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
