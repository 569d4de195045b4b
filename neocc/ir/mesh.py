"""Meshes, layouts and strategies: where the blocks of a tensor lie and who works on them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from neocc.ir.errors import LayoutError

AXIS_NAMES = ("x", "y", "z", "w")


@dataclass(frozen=True)
class Mesh:
    """An ordered list of named axes with sizes: ``8x16`` is ``x:8,y:16``."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise LayoutError(f"mesh {self} names one axis twice")
        for name, size in self.axes:
            if size < 1:
                raise LayoutError(f"mesh axis {name!r} has size {size}; it must be at least 1")

    @staticmethod
    def parse(text: str) -> Mesh:
        """Reads ``8x16`` (axes are named x, y, z, w) or ``data:8,model:16``.

        Raises:
            LayoutError: anything else, with both forms shown.
        """
        if re.fullmatch(r"\d+(x\d+)*", text):
            sizes = [int(s) for s in text.split("x")]
            if len(sizes) > len(AXIS_NAMES):
                raise LayoutError(f"mesh {text!r} has {len(sizes)} axes; name them: a:2,b:4,...")
            return Mesh(tuple(zip(AXIS_NAMES, sizes, strict=False)))
        if re.fullmatch(r"[A-Za-z_]\w*:\d+(,[A-Za-z_]\w*:\d+)*", text):
            pairs = (part.split(":") for part in text.split(","))
            return Mesh(tuple((name, int(size)) for name, size in pairs))
        raise LayoutError(f"mesh {text!r} is neither like 8x16 nor like x:8,y:16")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    def __len__(self) -> int:
        return len(self.axes)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise LayoutError(f"mesh {self} has no axis {name!r}; it has {', '.join(self.names)}")
        return self.names.index(name)

    def __str__(self) -> str:
        return ",".join(f"{name}:{size}" for name, size in self.axes)


@dataclass(frozen=True, slots=True)
class Partial:
    """Each device along the axis holds one term of a reduction that is still to be done."""

    op: str  # "sum" | "max" | "min"

    def __str__(self) -> str:
        return f"+{self.op}"


Placement = str | Partial | None  # a dim that the axis cuts, a partial, or replicated


@dataclass(frozen=True, slots=True)
class Layout:
    """One placement per mesh axis. A dim cut by several axes is cut in mesh order, first axis
    outermost, so that two layouts are equal exactly when they put the same blocks in the same
    places. ``host``: each device's block lies in the memory of its host."""

    axes: tuple[Placement, ...]
    host: bool = False

    @staticmethod
    def replicated(rank: int) -> Layout:
        return Layout((None,) * rank)

    def cuts(self, dim: str) -> tuple[int, ...]:
        """Indices of the mesh axes that cut ``dim``, outermost first."""
        return tuple(i for i, p in enumerate(self.axes) if p == dim)

    @property
    def partial_axes(self) -> tuple[int, ...]:
        return tuple(i for i, p in enumerate(self.axes) if isinstance(p, Partial))

    @property
    def dims(self) -> frozenset[str]:
        return frozenset(p for p in self.axes if isinstance(p, str))

    def blocks(self, mesh: Mesh) -> dict[str, int]:
        """Of each dim that is cut, into how many blocks."""
        return blocks(self.axes, mesh)

    def parts(self, dim: str, mesh: Mesh) -> int:
        """Number of blocks that ``dim`` is cut into."""
        return self.blocks(mesh).get(dim, 1)

    def replace(self, axis: int, placement: Placement) -> Layout:
        return Layout((*self.axes[:axis], placement, *self.axes[axis + 1 :]), self.host)

    @property
    def moved(self) -> Layout:
        """The same blocks in the other memory."""
        return Layout(self.axes, not self.host)

    def only(self, dims: Iterable[str]) -> Layout:
        """This layout with cuts of dims outside ``dims`` made replicated."""
        keep = set(dims)
        return Layout(tuple(p if not isinstance(p, str) or p in keep else None for p in self.axes))

    def rename(self, names: dict[str, str]) -> Layout:
        return Layout(tuple(names.get(p, p) if isinstance(p, str) else p for p in self.axes))

    def __str__(self) -> str:
        places = "{" + ", ".join("-" if p is None else str(p) for p in self.axes) + "}"
        return f"{places} on host" if self.host else places


@dataclass(frozen=True, slots=True)
class Through:
    """On this axis the op passes a partial sum on: these operands are partial, others whole."""

    operands: frozenset[int]

    def __str__(self) -> str:
        return "".join(f"+{i}" for i in sorted(self.operands)) or "+"


Choice = str | Through | None  # an iteration dim that the axis cuts, a pass-through, or none


@dataclass(frozen=True, slots=True)
class Strategy:
    """What each mesh axis does in an op: cuts an iteration dim, passes a partial sum through,
    or repeats the work."""

    axes: tuple[Choice, ...]

    def replace(self, axis: int, choice: Choice) -> Strategy:
        return Strategy((*self.axes[:axis], choice, *self.axes[axis + 1 :]))

    def blocks(self, mesh: Mesh) -> dict[str, int]:
        """Of each iteration dim that is cut, into how many blocks."""
        return blocks(self.axes, mesh)

    def parts(self, dim: str, mesh: Mesh) -> int:
        return self.blocks(mesh).get(dim, 1)

    def __str__(self) -> str:
        return "{" + ", ".join("-" if c is None else str(c) for c in self.axes) + "}"


def blocks(axes: Iterable[object], mesh: Mesh) -> dict[str, int]:
    """The product of the sizes of the mesh axes that name each dim."""
    found: dict[str, int] = {}
    for place, size in zip(axes, mesh.sizes, strict=True):
        if isinstance(place, str):
            found[place] = found.get(place, 1) * size
    return found
