"""Prove a partitioned program: its layouts obey the rules and its meaning is the original's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neocc.cost.algorithms import FORMULAS, PRODUCTS
from neocc.ir.errors import IRError, LayoutError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import COLLECTIVES, OPS, repeat_types
from neocc.ir.ops.base import SEQUENTIAL
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import Strategy, Through, moves, op_layouts, ring_fault
from neocc.passes.partition.apply import Partitioned, move_op
from neocc.passes.partition.groups import groups_of, schedule

WAY_ATTRS = ("algorithm", "grid")


def verify_partitioned(partitioned: Partitioned, original: Program | None = None) -> None:
    """Checks every rule of a partitioned program; with ``original``, also that erasing the
    collectives gives that program back.

    Raises:
        LayoutError: a layout, strategy, collective, or region tie is not legal.
        IRError: a type rule or SSA form is broken, or the erased program is another one.
    """
    program, mesh = partitioned.program, partitioned.mesh
    for value in (*program.body.args, *program.body.outputs):
        if any(isinstance(p, Partial) for p in layout_of(value).axes):
            raise LayoutError(f"{value!r} is partial; a program's inputs and outputs are whole")
    check_region(program.body, mesh, set())
    for name, value in zip(program.outputs, program.body.outputs, strict=True):
        if any(i.name == name for i in program.inputs):
            source = program.input_value(name)
            if source.type != value.type:
                raise LayoutError(
                    f"output {name!r} is {value.type}; the input that it replaces is {source.type}"
                )
    if original is not None:
        difference = first_difference(erase(partitioned), original)
        if difference is not None:
            raise IRError(f"without its collectives the program is another one: {difference}")


def layout_of(value: Value) -> Layout:
    if value.type.layout is None:
        raise LayoutError(f"{value!r} has no layout")
    return value.type.layout


def check_type(value: Value, mesh: Mesh) -> None:
    layout = layout_of(value)
    if len(layout.axes) != len(mesh):
        raise LayoutError(f"{value!r} has {len(layout.axes)} placements on the mesh {mesh}")
    for dim in layout.dims:
        value.type.dim(dim)
    value.type.local_shape(mesh)


def check_region(region: Region, mesh: Mesh, ids: set[int]) -> None:
    known: set[Value] = set()

    def define(values: Sequence[Value]) -> None:
        for value in values:
            check_type(value, mesh)
            if value in known:
                raise IRError(f"{value!r} is defined twice")
            known.add(value)

    define(region.args)
    for op in region.ops:
        if op.attrs.get("id") in ids or "id" not in op.attrs:
            raise IRError(f"{op!r} lacks an id of its own", op.loc)
        ids.add(op.attrs["id"])
        for value in op.operands:
            if value not in known:
                raise IRError(f"{op!r} uses {value!r} before it is made", op.loc)
        try:
            check_op(op, mesh, ids)
        except IRError as error:
            raise IRError(f"{op!r}: {error.message}", op.loc) from None
        except LayoutError as error:
            raise LayoutError(f"{op!r}: {error.message}", op.loc) from None
        define(op.results)
    for value in region.outputs:
        if value not in known:
            raise IRError(f"a region gives out {value!r}, which it does not make")
    check_groups(region)


def whole(values: Sequence[Value]) -> tuple[TensorType, ...]:
    return tuple(v.type.with_layout(None) for v in values)


def check_op(op: Op, mesh: Mesh, ids: set[int]) -> None:
    if op.kind == "repeat":
        check_repeat(op, mesh, ids)
        return
    inferred = OPS[op.kind].infer(whole(op.operands), op.attrs)
    if inferred != whole(op.results):
        raise IRError(f"its results should be {', '.join(map(str, inferred))}")
    if op.kind in COLLECTIVES:
        check_collective(op, mesh)
        return
    strategy = op.attrs.get("strategy")
    if not isinstance(strategy, Strategy):
        raise LayoutError("it has no strategy")
    check_strategy(op, strategy, mesh)
    for values, layouts in zip((op.operands, op.results), op_layouts(op, strategy), strict=True):
        for value, layout in zip(values, layouts, strict=True):
            if value.type.layout != layout:
                raise LayoutError(f"by its strategy {strategy}, {value!r} must lie as {layout}")


def check_strategy(op: Op, strategy: Strategy, mesh: Mesh) -> None:
    """Each axis cuts a dim that may be cut and divides, or passes on what the op is linear in."""
    space = OPS[op.kind].space(op)
    iters = {i.name: i for i in space.iters}
    linear = OPS[op.kind].linear(op)
    if len(strategy.axes) != len(mesh):
        raise LayoutError(f"strategy {strategy} is not for the mesh {mesh}")
    for choice in strategy.axes:
        if isinstance(choice, Through):
            if choice.operands not in linear:
                raise LayoutError(f"{op.kind} is not linear in the operands of {choice}")
        elif choice is not None:
            if choice not in iters or iters[choice].kind == SEQUENTIAL:
                raise LayoutError(f"{op.kind} cannot be cut along {choice!r}")
            if iters[choice].size % strategy.parts(choice, mesh):
                raise LayoutError(f"the cuts of {choice!r} do not divide {iters[choice].size}")
    if fault := ring_fault(space, strategy, mesh):
        raise LayoutError(fault)


def check_collective(op: Op, mesh: Mesh) -> None:
    """The change of layout is one legal move, and the op is the one that makes it."""
    (value,) = op.operands
    source, target = layout_of(value), layout_of(op.result)
    for move in moves(source, value.type, mesh):
        if move.target == target:
            right = move_op(move, value, mesh, op.attrs["id"], None)
            attrs = {k: v for k, v in op.attrs.items() if k not in WAY_ATTRS}
            if (op.kind, attrs) != (right.kind, right.attrs):
                raise LayoutError(f"{source} becomes {target} by {right.kind} {right.attrs}")
            check_way(op, mesh)
            return
    raise LayoutError(f"no one move makes {target} of {source}")


def check_way(op: Op, mesh: Mesh) -> None:
    """What runs a collective is there, for its kind, on a grid of all the axis's devices."""
    given = [name for name in WAY_ATTRS if name in op.attrs]
    if not given:
        return
    name, grid = op.attrs.get("algorithm", ""), op.attrs.get("grid", ())
    formula = FORMULAS.get((op.kind, name))
    if formula is None:
        raise LayoutError(f"no algorithm {name!r} runs {op.kind}")
    least, most = formula.rings
    size = mesh.sizes[mesh.index(op.attrs["axis"])]
    if math.prod(grid) != size or not least <= len(grid) <= most:
        raise LayoutError(f"{op.kind} by {name} on a grid of {grid} for an axis of {size}")


def check_groups(region: Region) -> None:
    """Every collective that is to run inside products has them, and all can at once."""
    groups = groups_of(region)
    have = {g.collective for g in groups}
    for op in region.ops:
        if op.attrs.get("algorithm") == PRODUCTS and op not in have:
            raise LayoutError(f"{op!r} is to run inside products, and has none beside it", op.loc)
    if schedule(region, groups) is None:
        texts = ", ".join(repr(g.collective) for g in groups)
        raise LayoutError(f"no order runs all of these inside their products: {texts}")


def check_repeat(op: Op, mesh: Mesh, ids: set[int]) -> None:
    region, carries, dim = op.regions[0], op.attrs["carries"], op.attrs["dim"]
    check_region(region, mesh, ids)
    bare = Region(
        tuple(Value(t) for t in whole(region.args)),
        (),
        tuple(Value(t) for t in whole(region.outputs)),
    )
    if repeat_types(whole(op.operands), op.attrs, bare) != whole(op.results):
        raise IRError("its results are not what its region makes")
    for i, (outside, inside) in enumerate(zip(op.operands, region.args, strict=True)):
        if layout_of(outside) != layout_of(inside):
            raise LayoutError(f"operand {outside!r} enters the region as {inside!r}")
        # What is carried may be a sum that is still to be reduced; each step adds its terms.
        if i >= carries and any(isinstance(p, Partial) for p in layout_of(inside).axes):
            raise LayoutError(f"operand {outside!r} is partial")
    for outside, inside in zip(op.results, region.outputs, strict=True):
        if layout_of(outside) != layout_of(inside):
            raise LayoutError(f"{inside!r} leaves the region as {outside!r}")
    for before, after in zip(region.args[:carries], region.outputs[:carries], strict=True):
        if layout_of(before) != layout_of(after):
            raise LayoutError(f"carried {before!r} leaves as {after!r}")
    for value in (*op.operands, *op.results):
        if dim.name in layout_of(value).dims:
            raise LayoutError(f"{value!r} is cut along {dim.name!r}, which is repeated over")


def erase(partitioned: Partitioned) -> Program:
    """The program without collectives, layouts, strategies and ids."""
    program = partitioned.program
    body = erase_region(program.body)
    return Program(program.name, program.inputs, program.outputs, body)


def erase_region(region: Region) -> Region:
    env: dict[Value, Value] = {}

    def define(values: Sequence[Value]) -> list[Value]:
        for value in values:
            env[value] = Value(value.type.with_layout(None), value.name)
        return [env[v] for v in values]

    args = define(region.args)
    ops: list[Op] = []
    for op in region.ops:
        if op.kind in COLLECTIVES:
            env[op.result] = env[op.operands[0]]
            continue
        attrs = {k: v for k, v in op.attrs.items() if k not in ("id", "strategy", "kernel")}
        operands = [env[v] for v in op.operands]
        regions = [erase_region(r) for r in op.regions]
        ops.append(Op(op.kind, operands, define(op.results), attrs, regions, op.loc))
    return Region(tuple(args), tuple(ops), tuple(env[v] for v in region.outputs))


def first_difference(a: Program, b: Program) -> str | None:
    """The first place where two programs differ in structure; None if they are the same.

    Names of values and places in the source do not count.
    """
    if (a.inputs, a.outputs) != (b.inputs, b.outputs):
        return f"inputs and outputs {a.inputs}, {a.outputs} against {b.inputs}, {b.outputs}"
    return region_difference(a.body, b.body)


def region_difference(a: Region, b: Region) -> str | None:
    if len(a.args) != len(b.args) or len(a.ops) != len(b.ops):
        return f"{len(a.args)} arguments and {len(a.ops)} ops, {len(b.args)} and {len(b.ops)}"
    same: dict[Value, Value] = {}

    def values_differ(left: Sequence[Value], right: Sequence[Value]) -> bool:
        return [same.get(v) for v in left] != list(right)

    def define(left: Sequence[Value], right: Sequence[Value]) -> bool:
        same.update(zip(left, right, strict=False))
        return len(left) == len(right) and [v.type for v in left] == [v.type for v in right]

    if not define(a.args, b.args):
        return f"arguments {a.args} against {b.args}"
    for left, right in zip(a.ops, b.ops, strict=True):
        if (
            (left.kind, left.attrs) != (right.kind, right.attrs)
            or len(left.regions) != len(right.regions)
            or values_differ(left.operands, right.operands)
            or not define(left.results, right.results)
        ):
            return f"{left!r} {left.attrs} against {right!r} {right.attrs}"
        for inner, other in zip(left.regions, right.regions, strict=True):
            difference = region_difference(inner, other)
            if difference is not None:
                return difference
    if values_differ(a.outputs, b.outputs):
        return f"outputs {a.outputs} against {b.outputs}"
    return None
