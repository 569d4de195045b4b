"""How arrays in a TPU's memory are cut into blocks that pass through its on-chip memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 1 << 19  # bytes of a block: a pipeline holds two of each operand, of 16 MiB that it may


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def sublanes(dtype: Any) -> int:
    """Rows of a tile: 8 of 4 bytes, 16 of 2, 32 of 1."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class Matrix:
    """An array as whole blocks: ``shape`` [rows, columns] after padding; ``block`` divides it."""

    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]


def even(size: int, unit: int, most: int) -> tuple[int, int]:
    """``size`` padded to whole blocks of a multiple of ``unit``, at most ``most``, all alike: the
    padded size and the block."""
    count = -(-size // max(unit, most // unit * unit))
    block = round_up(-(-size // count), unit)
    return count * block, block


def matrix_of(shape: tuple[int, ...], dtype: Any) -> Matrix:
    """How an array of a shape lies as a matrix: its last dim as columns where that is whole lanes,
    else all of it in rows of 128."""
    columns = shape[-1] if shape and shape[-1] % LANES == 0 and shape[-1] else LANES
    rows = -(-math.prod(shape) // columns)
    itemsize, unit = jnp.dtype(dtype).itemsize, sublanes(dtype)
    # A few columns at a time, all rows of a block near each other in memory.
    width = max(w for w in range(LANES, min(columns, 2048) + 1, LANES) if columns % w == 0)
    padded, height = even(rows, unit, max(unit, BLOCK // (width * itemsize)))
    return Matrix((padded, columns), (height, width))


def as_matrices(x: Any, lead: int, shape: tuple[int, int]) -> Any:
    """x[*lead, *piece] as [*lead, rows, columns], zeros behind each piece."""
    front, size = x.shape[:lead], math.prod(x.shape[lead:])
    rows, columns = shape
    if size % columns == 0:
        x = x.reshape(*front, size // columns, columns)
        return jnp.pad(x, [(0, 0)] * lead + [(0, rows - x.shape[-2]), (0, 0)])
    x = jnp.pad(x.reshape(*front, size), [(0, 0)] * lead + [(0, rows * columns - size)])
    return x.reshape(*front, rows, columns)


def from_matrices(x: Any, lead: int, shape: tuple[int, ...]) -> Any:
    """The inverse: [*lead, rows, columns] as [*lead, *shape]."""
    front, size = x.shape[:lead], math.prod(shape)
    if size % x.shape[-1] == 0:
        return x[..., : size // x.shape[-1], :].reshape(*front, *shape)
    return x.reshape(*front, -1)[..., :size].reshape(*front, *shape)


def wide(dtype: Any) -> Any:
    """What the vector unit computes in: 4 bytes."""
    return jnp.promote_types(dtype, jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else "int32")


Combine = Callable[[Any, Any], Any]


def combined(combine: Combine, dtype: Any) -> Combine:
    """``combine`` as the dtype has it, computed wide: rounded, or wrapped, each time."""
    return lambda a, b: combine(a.astype(wide(dtype)), b.astype(wide(dtype))).astype(dtype)


def fold(combine: Combine, target: Any, terms: list[Any], form: Matrix) -> None:
    """In a kernel: ``target`` becomes the ``terms`` combined, the first with the second and so on,
    block by block. ``target`` may be one of them. All are matrices of ``form`` in memory."""
    f = combined(combine, target.dtype)

    def body(*blocks: Any) -> None:
        *given, out = blocks
        total = given[0][...]
        for other in given[1:]:
            total = f(total, other[...])
        out[...] = total

    spec = pl.BlockSpec(form.block, lambda i, j: (i, j))
    pltpu.emit_pipeline(body, grid=form.grid, in_specs=[spec] * len(terms), out_specs=[spec])(
        *terms, target
    )


def in_memory(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


MEMORY = pl.BlockSpec(memory_space=pltpu.HBM)  # left where it is: not brought on chip
