"""The layout algebra: which strategies an op has, and how a value moves between layouts.

Nothing here knows an op by name: strategies come from iteration spaces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from neocc.ir.mesh import Choice, Layout, Mesh, Partial, Placement, Strategy, Through
from neocc.ir.ops import OPS
from neocc.ir.ops.base import PARALLEL, RING, SEQUENTIAL, Space
from neocc.ir.program import Op, Region, Value
from neocc.ir.types import TensorType

SUM = Partial("sum")

OpLayouts = tuple[tuple[Layout, ...], tuple[Layout, ...]]  # of the operands, of the results


def strategies(op: Op, mesh: Mesh, uncut: frozenset[str] = frozenset()) -> list[Strategy]:
    """Every legal strategy of an op (not a repeat).

    A cut dim must divide by the axes that cut it; an axis of size 1 cuts nothing; ``uncut``
    names iteration dims that are to stay whole.
    """
    space = OPS[op.kind].space(op)
    sizes = {i.name: i.size for i in space.iters if i.kind != SEQUENTIAL and i.name not in uncut}
    passes: list[Choice] = [Through(s) for s in OPS[op.kind].linear(op)]
    options = [[None] if size == 1 else [None, *sizes, *passes] for size in mesh.sizes]
    found = (Strategy(axes) for axes in itertools.product(*options))
    return [
        s
        for s in found
        if all(sizes[n] % p == 0 for n, p in s.blocks(mesh).items())
        and ring_fault(space, s, mesh) is None
    ]


def ring_fault(space: Space, strategy: Strategy, mesh: Mesh) -> str | None:
    """Why a strategy cuts a ``ring`` dim as it cannot be cut (``Space.along``), if it does."""
    for name, other in space.along:
        axes = [a for a, c in enumerate(strategy.axes) if c == name]
        if not axes:
            continue
        if len(axes) > 1 or other in strategy.axes:
            return f"one axis alone can cut {name!r}, and {other!r} with it"
        if space.devices not in (None, mesh.sizes[axes[0]]):
            return f"{name!r} lies in the order of a ring of {space.devices} devices"
        size = next((i.size for i in space.iters if i.name == other), 0)
        if size % mesh.sizes[axes[0]]:
            return f"{name!r} is cut with {other!r}, whose size {size} does not divide"
    return None


def op_layouts(op: Op, strategy: Strategy) -> OpLayouts:
    """The layouts that a strategy wants of the operands and makes of the results.

    Of a cut reduction, a result that lacks the dim is partial; one that has it is cut along it.
    """
    return laid(op, strategy, OPS[op.kind].space(op))


def laid(op: Op, strategy: Strategy, space: Space) -> OpLayouts:
    """``op_layouts`` of an op whose iteration space is known."""
    kinds = {i.name: i.kind for i in space.iters}
    along = dict(space.along)

    def placed(names: tuple[str, ...], follows: tuple[str | None, ...], choice: str) -> Placement:
        if choice not in follows and choice in along:
            choice = along[choice]
        return names[follows.index(choice)] if choice in follows else None

    operands = []
    for i, value in enumerate(op.operands):
        axes: list[Placement] = []
        for c in strategy.axes:
            if isinstance(c, Through):
                axes.append(SUM if i in c.operands else None)
            else:
                axes.append(c and placed(value.type.names, space.operands[i], c))
        operands.append(Layout(tuple(axes)))
    results = []
    for i, value in enumerate(op.results):
        axes = []
        for c in strategy.axes:
            if isinstance(c, Through):
                axes.append(SUM)
            elif c is None or kinds[c] in (PARALLEL, RING) or c in space.results[i]:
                axes.append(c and placed(value.type.names, space.results[i], c))
            else:
                axes.append(Partial(kinds[c]))
        results.append(Layout(tuple(axes)))
    return tuple(operands), tuple(results)


@dataclass(frozen=True, slots=True)
class Move:
    """A reshard along one mesh axis, or, with none, between a device's memory and its host's.

    kind: ``slice`` (replicated -> dim), ``all_gather`` (dim -> replicated), ``all_reduce``
    (partial -> replicated), ``reduce_scatter`` (partial -> dim), ``all_to_all`` (dim -> to);
    ``to_host`` and ``to_device``.
    """

    kind: str
    axis: int | None
    source: Layout
    target: Layout

    @property
    def dim(self) -> str | None:
        """The dim that is cut before (gather, all-to-all) or after (slice, scatter) the move."""
        if self.axis is None:
            return None
        place = self.source.axes[self.axis]
        place = place if isinstance(place, str) else self.target.axes[self.axis]
        return place if isinstance(place, str) else None

    @property
    def to(self) -> str | None:
        """The dim that is cut after an all-to-all."""
        if self.axis is None or self.kind != "all_to_all":
            return None
        place = self.target.axes[self.axis]
        return place if isinstance(place, str) else None

    def __str__(self) -> str:
        return f"{self.kind} on axis {self.axis}: {self.source} -> {self.target}"


def moves(layout: Layout, type: TensorType, mesh: Mesh) -> list[Move]:
    """Every single-axis reshard out of ``layout``, and that between the memories; what lies on
    the host has no other.

    Since a dim is cut in mesh order, an axis can be put on a dim, or taken off it, only while
    no later axis cuts that dim: otherwise the blocks would not be contiguous.
    """

    blocks = layout.blocks(mesh)
    last = {p: axis for axis, p in enumerate(layout.axes) if isinstance(p, str)}

    def innermost(axis: int, dim: str) -> bool:
        return last.get(dim, axis) <= axis

    def can_cut(axis: int, dim: str, size: int) -> bool:
        parts = blocks.get(dim, 1) * mesh.sizes[axis]
        return innermost(axis, dim) and size % parts == 0

    if layout.host:
        return [Move("to_device", None, layout, layout.moved)]
    found: list[Move] = []
    if not layout.partial_axes:
        found.append(Move("to_host", None, layout, layout.moved))
    for axis, place in enumerate(layout.axes):
        if mesh.sizes[axis] == 1:
            continue

        def move(kind: str, target: Placement, axis: int = axis) -> None:
            found.append(Move(kind, axis, layout, layout.replace(axis, target)))

        targets = [d.name for d in type.dims if d.name != place and can_cut(axis, d.name, d.size)]
        if place is None:
            for dim in targets:
                move("slice", dim)
        elif isinstance(place, Partial):
            move("all_reduce", None)
            if place.op == "sum":
                for dim in targets:
                    move("reduce_scatter", dim)
        elif innermost(axis, place):
            move("all_gather", None)
            for dim in targets:
                move("all_to_all", dim)
    return found


def layouts(type: TensorType, mesh: Mesh, partial: bool = False) -> Iterator[Layout]:
    """Every legal layout of a tensor; with ``partial``, those with partial sums too."""
    options: list[list[Placement]] = []
    for size in mesh.sizes:
        cuts: list[Placement] = [] if size == 1 else list(type.names)
        options.append([None, *cuts, *([SUM] if partial and size > 1 else [])])
    for axes in itertools.product(*options):
        layout = Layout(axes)
        blocks = layout.blocks(mesh)
        if all(d.size % blocks.get(d.name, 1) == 0 for d in type.dims):
            yield layout


@dataclass(frozen=True, slots=True)
class Boundary:
    """Layouts of a region's arguments and outputs, by position."""

    args: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True)
class Assignment:
    """A layout decision for a whole program.

    strategies: one per op that is not a repeat, nested ones included.
    boundaries: one per region, the program's body included. Of a repeat, operand i lies as
    argument i of its region and result i as output i; a carried value lies the same in all four
    places; the repeat's dim is not cut. A stacked output may be partial, and a carried value; no
    other argument is.
    moves: per value, the moves that the solver pays for; None lets each be a shortest path.
    algorithms: per value, those of its moves that XLA's own collectives do not run; None leaves
    all of them to the cost model.
    """

    strategies: dict[Op, Strategy]
    boundaries: dict[Region, Boundary]
    moves: dict[Value, frozenset[tuple[Layout, Layout]]] | None = None
    algorithms: dict[Value, dict[tuple[Layout, Layout], str]] | None = None
