"""Seconds of compute on one device: the slower of the matrix unit and of memory."""

from __future__ import annotations

from neocc.cost.hardware import Chip
from neocc.cost.waves import wave_time

FEW = (
    128  # rows: twice as many of a TPU's product take a tenth longer, four times half as long again
)
ITEM_BYTES = {
    "f64": 8,
    "f32": 4,
    "i32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "f8": 1,
    "i8": 1,
    "f4": 0.5,
}


def matmul_time(
    chip: Chip, batch: int, m: int, n: int, k: int, dtype: str, efficiency: float | None = None
) -> float:
    """Seconds of ``batch`` products [m, k] x [k, n] -> [m, n] at the local shape.

    ``dtype`` is that of operands and result. ``efficiency`` is the fraction of the peak that full
    tiles reach (default: the chip's). The matrix unit works in whole tiles: a 64-wide shard on a
    128-wide unit costs what a 128-wide one does. Rows stream past a tile that stays, so they
    come in finer steps but pay for at least a tile's width. A GPU works in waves of tiles
    (``waves``). Memory: operands read once, result written once.

    Raises:
        HardwareError: the chip has no rate for ``dtype``.
    """
    moved = batch * (m * k + k * n + m * n) * ITEM_BYTES[dtype]
    compute = product_time(chip, batch, m, n, k, dtype, efficiency)
    return max(compute, elementwise_time(chip, moved))


def product_time(
    chip: Chip, batch: int, m: int, n: int, k: int, dtype: str, efficiency: float | None = None
) -> float:
    """``matmul_time`` without memory."""
    rate = chip.flops(dtype) * (chip.matmul_efficiency if efficiency is None else efficiency)
    if chip.sm is None:
        return 2.0 * batch * padded_mnk(chip, m, n, k) / rate
    return wave_time(chip.sm, rate, batch, m, n, k, ITEM_BYTES[dtype])


def padded_mnk(chip: Chip, m: int, n: int, k: int) -> int:
    """m * n * k in whole tiles, with the better of m and n streaming."""
    tile_m, tile_n, tile_k = chip.matmul_tile

    def work(rows: int, columns: int) -> int:
        streamed = max(_up(rows, tile_m), tile_n) if rows else 0
        return streamed * _up(columns, tile_n)

    return min(work(m, n), work(n, m)) * _up(k, tile_k)


def elementwise_time(chip: Chip, bytes_moved: float) -> float:
    """Seconds to move ``bytes_moved`` bytes, read and written together, through memory."""
    return bytes_moved / (chip.hbm_bandwidth * chip.hbm_efficiency)


def product_traffic_time(chip: Chip, m: int, n: int, bytes_moved: float) -> float:
    """Seconds to move what a product reads and writes; a few rows or columns wait for what they are
    multiplied by (``Stream``)."""
    if chip.stream is None or min(m, n) > FEW:
        return elementwise_time(chip, bytes_moved)
    return chip.stream.start + bytes_moved / chip.stream.rate


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
