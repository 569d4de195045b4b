"""Named dimensions and tensor types."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np

from neocc.ir.errors import IRError, LayoutError
from neocc.ir.mesh import Layout, Mesh

DTYPES: dict[str, np.dtype] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32),
    "u32": np.dtype(np.uint32),
    "bool": np.dtype(np.bool_),
}
FLOATS = ("f64", "f32", "bf16", "f16")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dimension. The name is its identity: in one program it has one size."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise IRError(f"dim name {self.name!r} is not an identifier")
        if self.size < 0:
            raise IRError(f"dim {self.name!r} has the negative size {self.size}")

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


@dataclass(frozen=True)
class TensorType:
    """An ordered tuple of distinct dims and a dtype; in a partitioned program, a layout too.

    ``dims`` are always the global sizes; what one device holds is ``local_shape``.
    """

    dims: tuple[Dim, ...]
    dtype: str
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise IRError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        names = self.names
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise IRError(f"dim {twice!r} appears twice in one tensor; rename one of them")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)

    @property
    def size(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.size * self.itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def dim(self, name: str) -> Dim:
        for d in self.dims:
            if d.name == name:
                return d
        raise IRError(f"no dim {name!r} in [{', '.join(self.names)}]")

    def has(self, name: str) -> bool:
        return name in self.names

    def without(self, names: Iterable[str]) -> TensorType:
        gone = set(names)
        return TensorType(tuple(d for d in self.dims if d.name not in gone), self.dtype)

    def with_dtype(self, dtype: str) -> TensorType:
        return replace(self, dtype=dtype)

    def with_layout(self, layout: Layout | None) -> TensorType:
        return replace(self, layout=layout)

    def local_shape(self, mesh: Mesh, layout: Layout | None = None) -> tuple[int, ...]:
        """Shape of one device's block; every cut divides (padding has been done)."""
        layout = layout or self.layout
        assert layout is not None
        blocks = layout.blocks(mesh)
        for d in self.dims:
            if d.size % blocks.get(d.name, 1):
                raise LayoutError(
                    f"dim {d.name!r} of size {d.size} does not divide by {blocks[d.name]}"
                )
        return tuple(d.size // blocks.get(d.name, 1) for d in self.dims)

    def local_bytes(self, mesh: Mesh, layout: Layout | None = None) -> int:
        """Bytes of one device's block, without any padding of the target's tiled layout."""
        return math.prod(self.local_shape(mesh, layout)) * self.itemsize

    def __str__(self) -> str:
        dims = ", ".join(str(d) for d in self.dims)
        return f"{self.dtype}[{dims}]" + (f" {self.layout}" if self.layout is not None else "")


def union_dims(types: Iterable[TensorType]) -> tuple[Dim, ...]:
    """Dims of a broadcast by name: those of the operand with the most, then what others add.

    Raises:
        IRError: two operands give one dim name two sizes.
    """
    types = list(types)
    sizes: dict[str, int] = {}
    for t in sorted(types, key=lambda t: -len(t.dims)):
        for d in t.dims:
            if sizes.setdefault(d.name, d.size) != d.size:
                raise IRError(f"dim {d.name!r} has two sizes: {sizes[d.name]} and {d.size}")
    return tuple(Dim(n, s) for n, s in sizes.items())
