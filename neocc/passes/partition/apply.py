"""Make a layout assignment explicit: a program whose every reshard is an op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from neocc.cost.choice import Way
from neocc.ir.errors import LayoutError, Loc
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import ATTENTION, COLLECTIVES
from neocc.ir.program import Op, Program, Region, Value
from neocc.passes.layout.algebra import Assignment, Boundary, Move, op_layouts
from neocc.passes.partition.reshard import Arcs, Cost, arcs, reshard_tree, sent_bytes


@dataclass(frozen=True)
class Partitioned:
    """A program with every collective explicit.

    Every value's type has a layout. Every op has ``attrs["id"]``, an int unique in the program;
    every op that is neither a collective nor a repeat has ``attrs["strategy"]``. A collective that
    an algorithm of ``neocc.cost.algorithms`` runs has its name as ``attrs["algorithm"]``, and the
    sizes of the grid that it runs on, outermost first, as ``attrs["grid"]``; ``products`` needs
    products beside it (``partition.groups``). Fused attention that runs as kernels of
    ``neocc.cost.attention_kernels`` has their name as ``attrs["kernel"]``.
    """

    program: Program
    mesh: Mesh

    def collectives(self) -> Iterator[tuple[Op, int]]:
        """Every collective and local slice with the times that one run executes it."""
        return counted(self.program.body, 1)


def counted(region: Region, times: int) -> Iterator[tuple[Op, int]]:
    for op in region.ops:
        if op.kind in COLLECTIVES:
            yield op, times
        for inner in op.regions:
            yield from counted(inner, times * op.attrs["dim"].size)


def marked(program: Program, attrs: Callable[[Op], Mapping[str, object]]) -> Program:
    """The same program, its collectives and attention with more attributes."""

    def again(region: Region) -> Region:
        ops = []
        for op in region.ops:
            more = attrs(op) if op.kind in COLLECTIVES | ATTENTION else {}
            regions = [again(inner) for inner in op.regions]
            if more or regions:
                op = Op(op.kind, op.operands, op.results, {**op.attrs, **more}, regions, op.loc)
            ops.append(op)
        return Region(region.args, tuple(ops), region.outputs)

    return Program(program.name, program.inputs, program.outputs, again(program.body))


Ways = Callable[[Value, Move], Way]  # how a value's move runs


def apply(
    program: Program,
    mesh: Mesh,
    assignment: Assignment,
    cost: Cost | None = None,
    ways: Ways | None = None,
) -> Partitioned:
    """The partitioned program that an assignment describes.

    A value made as its consumer wants it gets no op; else a tree of moves shared by all its
    consumers, each move right before its first use. ``cost`` chooses among paths (default:
    bytes sent); ``ways`` says what runs each (default: XLA's own collectives).

    Raises:
        LayoutError: an op or region has no decision, or a wanted layout cannot be reached.
    """
    out_of = arcs(mesh, cost or sent_bytes(mesh))
    body = Partitioner(mesh, assignment, out_of, itertools.count(), ways).region(program.body)
    return Partitioned(Program(program.name, program.inputs, program.outputs, body), mesh)


def move_op(move: Move, value: Value, mesh: Mesh, id: int, loc: Loc | None) -> Op:
    """The IR op of one move."""
    attrs: dict[str, object] = {}
    if move.axis is not None:
        attrs["axis"] = mesh.names[move.axis]
        place = move.source.axes[move.axis]
        if isinstance(place, Partial):
            attrs["reduction"] = place.op
    if move.dim is not None:
        attrs["dim"] = move.dim
    if move.to is not None:
        attrs["to"] = move.to
    kind = "local_slice" if move.kind == "slice" else move.kind
    result = Value(value.type.with_layout(move.target), value.name)
    return Op(kind, (value,), (result,), {**attrs, "id": id}, loc=loc)


def way_attrs(way: Way) -> dict[str, object]:
    return {} if not way.grid else {"algorithm": way.algorithm, "grid": way.grid}


class Partitioner:
    """Rewrites regions; ``ids`` numbers the ops in order of execution."""

    def __init__(
        self,
        mesh: Mesh,
        assignment: Assignment,
        arcs: Arcs,
        ids: Iterator[int],
        ways: Ways | None,
    ):
        self.mesh = mesh
        self.assignment = assignment
        self.arcs = arcs
        self.ids = ids
        self.ways = ways

    def operand_layouts(self, op: Op) -> tuple[Layout, ...]:
        if op.kind == "repeat":
            return self.boundary(op.regions[0]).args
        return self.strategy_layouts(op)[0]

    def result_layouts(self, op: Op) -> tuple[Layout, ...]:
        if op.kind == "repeat":
            return self.boundary(op.regions[0]).outputs
        return self.strategy_layouts(op)[1]

    def strategy_layouts(self, op: Op) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
        if op not in self.assignment.strategies:
            raise LayoutError(f"the assignment has no strategy for {op!r}", op.loc)
        return op_layouts(op, self.assignment.strategies[op])

    def boundary(self, region: Region) -> Boundary:
        if region not in self.assignment.boundaries:
            raise LayoutError("the assignment has no boundary for a region of the program")
        return self.assignment.boundaries[region]

    def region(self, region: Region) -> Region:
        boundary = self.boundary(region)
        wants: dict[Value, dict[Layout, None]] = {}  # in order of use, each layout once
        for op in region.ops:
            for value, layout in zip(op.operands, self.operand_layouts(op), strict=True):
                wants.setdefault(value, {})[layout] = None
        for value, layout in zip(region.outputs, boundary.outputs, strict=True):
            wants.setdefault(value, {})[layout] = None

        ops: list[Op] = []
        placed: dict[tuple[Value, Layout], Value] = {}  # what has been materialised
        trees: dict[Value, dict[Layout, Move]] = {}

        def define(value: Value, layout: Layout) -> Value:
            new = placed[value, layout] = Value(value.type.with_layout(layout), value.name)
            allowed = None if self.assignment.moves is None else self.assignment.moves.get(value)
            trees[value] = reshard_tree(
                value.type, layout, wants.get(value, ()), self.arcs, allowed
            )
            return new

        def use(value: Value, layout: Layout, loc: Loc | None) -> Value:
            if (value, layout) not in placed:
                move = trees[value][layout]
                source = use(value, move.source, loc)
                op = move_op(move, source, self.mesh, next(self.ids), loc)
                if self.ways is not None:
                    op.attrs.update(way_attrs(self.ways(value, move)))
                ops.append(op)
                placed[value, layout] = op.result
            return placed[value, layout]

        args = [define(v, w) for v, w in zip(region.args, boundary.args, strict=True)]
        for op in region.ops:
            wanted = zip(op.operands, self.operand_layouts(op), strict=True)
            operands = [use(v, w, op.loc) for v, w in wanted]
            attrs = {**op.attrs, "id": next(self.ids)}
            if op.kind != "repeat":
                attrs["strategy"] = self.assignment.strategies[op]
            regions = [self.region(inner) for inner in op.regions]
            made = zip(op.results, self.result_layouts(op), strict=True)
            results = [define(v, w) for v, w in made]
            ops.append(Op(op.kind, operands, results, attrs, regions, op.loc))
        ends = zip(region.outputs, boundary.outputs, strict=True)
        outputs = [use(v, w, None) for v, w in ends]
        return Region(tuple(args), tuple(ops), tuple(outputs))
