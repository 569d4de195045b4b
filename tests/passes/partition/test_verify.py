"""The verifier catches every mutation of a partitioned program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.ops import COLLECTIVES
from neocc.ir.program import Op, Program, Region, Value
from neocc.passes.layout.algebra import Strategy
from neocc.passes.partition import (
    Partitioned,
    apply,
    erase,
    first_difference,
    verify_partitioned,
)
from tests.passes.partition.samples import block_program, moves_program
from tests.random_assignments import drawn, random_assignment, seeded
from tests.random_programs import meshes, programs

MESH = Mesh.parse("2x4")
SEEDS = range(2)


def partitioned_sample(seed: int) -> tuple[Program, Partitioned]:
    program = block_program()
    return program, apply(program, MESH, random_assignment(program, MESH, seeded(seed)))


def replace_op(region: Region, old: Op, new: Op | None) -> Region:
    """The region with one op replaced, or dropped: its users then read its operand."""
    env: dict[Value, Value] = {}
    ops = []
    for op in region.ops:
        operands = [env.get(v, v) for v in op.operands]
        if op is old:
            if new is None:
                env[op.result] = operands[0]
                continue
            ops.append(Op(new.kind, operands, op.results, new.attrs, new.regions, op.loc))
            continue
        regions = [replace_op(r, old, new) for r in op.regions]
        ops.append(Op(op.kind, operands, op.results, op.attrs, regions, op.loc))
    return Region(region.args, tuple(ops), tuple(env.get(v, v) for v in region.outputs))


def mutated(partitioned: Partitioned, old: Op, new: Op | None) -> Partitioned:
    p = partitioned.program
    body = replace_op(p.body, old, new)
    return Partitioned(Program(p.name, p.inputs, p.outputs, body), partitioned.mesh)


def with_attrs(op: Op, kind: str | None = None, **attrs) -> Op:
    return Op(kind or op.kind, op.operands, op.results, {**op.attrs, **attrs}, op.regions)


def expect_caught(partitioned: Partitioned, mutate: Callable[[Op], list[Op | None]]) -> int:
    """Asserts that every mutant is refused; their number."""
    count = 0
    for op in partitioned.program.body.walk():
        for new in mutate(op):
            with pytest.raises(NeoccError):
                verify_partitioned(mutated(partitioned, op, new))
            count += 1
    return count


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dropped_collective_is_caught(seed: int) -> None:
    _, partitioned = partitioned_sample(seed)
    verify_partitioned(partitioned)
    outputs = partitioned.program.body.outputs

    def mutate(op: Op) -> list[Op | None]:
        # Dropped at an output, a move of a whole value leaves a program that is legal as well.
        at_output = op.kind in COLLECTIVES and op.result in outputs
        return [None] if op.kind in COLLECTIVES and not at_output else []

    assert expect_caught(partitioned, mutate) > 20


@pytest.mark.parametrize("seed", SEEDS)
def test_a_collective_on_another_axis_is_caught(seed: int) -> None:
    _, partitioned = partitioned_sample(seed)

    def mutate(op: Op) -> list[Op | None]:
        if op.kind not in COLLECTIVES:
            return []
        return [with_attrs(op, axis="y" if op.attrs["axis"] == "x" else "x")]

    assert expect_caught(partitioned, mutate) > 20


def test_another_reduction_is_caught() -> None:
    def mutate(op: Op) -> list[Op | None]:
        if "reduction" not in op.attrs:
            return []
        others = {"sum", "max", "min"} - {op.attrs["reduction"]}
        return [with_attrs(op, reduction=r) for r in sorted(others)]

    assert sum(expect_caught(partitioned_sample(s)[1], mutate) for s in SEEDS) > 20


def test_another_dim_or_kind_of_collective_is_caught() -> None:
    def mutate(op: Op) -> list[Op | None]:
        if op.kind not in COLLECTIVES:
            return []
        names = op.operands[0].type.names
        found = [with_attrs(op, dim=n) for n in names if "dim" in op.attrs and n != op.attrs["dim"]]
        found += [with_attrs(op, to=n) for n in names if "to" in op.attrs and n != op.attrs["to"]]
        return [*found, *(with_attrs(op, kind=k) for k in COLLECTIVES - {op.kind})]

    assert expect_caught(partitioned_sample(0)[1], mutate) > 100


def test_an_altered_strategy_is_caught() -> None:
    def mutate(op: Op) -> list[Op | None]:
        if "strategy" not in op.attrs:
            return []
        choices = op.attrs["strategy"].axes
        dims = {n for v in (*op.operands, *op.results) for n in v.type.names}
        options = [
            (*choices[:i], c, *choices[i + 1 :])
            for i in range(len(choices))
            for c in (None, *sorted(dims))
            if c != choices[i]
        ]
        return [with_attrs(op, strategy=Strategy(o)) for o in options]

    assert expect_caught(partitioned_sample(0)[1], mutate) > 100


def test_an_altered_layout_of_any_value_is_caught() -> None:
    """Every value's layout is held by the op that makes it or the region that binds it."""
    _, partitioned = partitioned_sample(3)
    for value in list(partitioned.program.values()):
        before = value.type
        for axis in range(len(MESH)):
            for place in (None, *before.names):
                if place == before.layout.axes[axis]:
                    continue
                value.type = before.with_layout(before.layout.replace(axis, place))
                used = any(value in op.operands for op in partitioned.program.body.walk())
                made = value not in partitioned.program.body.args
                if used or made:
                    with pytest.raises(NeoccError):
                        verify_partitioned(partitioned)
                value.type = before
    verify_partitioned(partitioned)


def test_another_program_is_caught() -> None:
    program, partitioned = partitioned_sample(0)
    verify_partitioned(partitioned, program)
    with pytest.raises(NeoccError, match="another one"):
        verify_partitioned(partitioned, moves_program())
    einsum = next(op for op in program.body.walk() if op.kind == "einsum")
    einsum.attrs["out"] = einsum.attrs["out"][::-1]
    with pytest.raises(NeoccError, match="another one"):
        verify_partitioned(partitioned, program)


def test_a_shared_id_is_caught() -> None:
    _, partitioned = partitioned_sample(0)
    ops = list(partitioned.program.body.walk())
    ops[-1].attrs["id"] = ops[0].attrs["id"]
    with pytest.raises(NeoccError, match="id of its own"):
        verify_partitioned(partitioned)


@given(st.data())
@settings(max_examples=40)
def test_erasing_the_collectives_gives_the_original_back(data: st.DataObject) -> None:
    program, mesh = data.draw(programs()), data.draw(meshes())
    partitioned = apply(program, mesh, random_assignment(program, mesh, drawn(data)))
    assert first_difference(erase(partitioned), program) is None
    verify_partitioned(partitioned, program)
