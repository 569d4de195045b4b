"""Simplification keeps the meaning and removes what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings

from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.program import Program, Value
from neocc.ir.text import parse_program, print_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.simplify import common_subexpressions, dead_code, late_broadcasts, simplify
from tests.numpy_executor import run_numpy
from tests.random_programs import inputs_for, programs

PROGRAMS = Path(__file__).parent.parent / "programs"


def kinds(program: Program) -> list[str]:
    return [op.kind for op in program.body.walk()]


@given(programs())
@settings(max_examples=80)
def test_every_output_stays_bit_for_bit(program: Program) -> None:
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    for change in (dead_code, common_subexpressions, late_broadcasts, simplify):
        changed = change(program)
        verify(changed)
        assert (changed.inputs, changed.outputs) == (program.inputs, program.outputs)
        for name, array in run_numpy(changed, inputs).items():
            np.testing.assert_array_equal(array, expected[name])


@given(programs())
@settings(max_examples=60)
def test_a_simplified_program_has_nothing_more_to_remove(program: Program) -> None:
    simple = simplify(program)
    assert print_program(simplify(simple)) == print_program(simple)
    used: set[Value] = set(simple.body.outputs)
    for op in reversed(simple.body.ops):
        assert not used.isdisjoint(op.results)
        used.update(op.operands)
    plain = [op for op in simple.body.ops if not op.regions]
    types = {op: tuple(v.type for v in op.results) for op in plain}
    keys = {(op.kind, op.operands, repr(op.attrs), types[op]) for op in plain}
    assert len(keys) == len(plain)


def test_what_is_the_same_along_a_dim_is_computed_without_it() -> None:
    batch, embd = Dim("batch", 4), Dim("embd", 3)
    g = Graph("broadcasts")
    x, y = g.data("x", [batch, embd], "f64"), g.data("y", [batch], "f64")
    wide = y.broadcast(batch, embd)
    program = simplify(g.build({"whole": b.exp(-wide), "read": x + wide * 2.0}))
    ranks = [(op.kind, len(op.result.type.dims)) for op in program.body.ops]
    assert ranks == [
        ("neg", 1), ("exp", 1), ("broadcast", 2), ("constant", 0), ("mul", 1), ("add", 2),
    ]  # fmt: skip


def test_the_fixture_becomes_what_is_written() -> None:
    before = parse_program((PROGRAMS / "simplify_before.ir").read_text())
    after = (PROGRAMS / "simplify_after.ir").read_text()
    assert print_program(simplify(before)) == after


def test_a_carried_value_that_only_feeds_itself_goes_and_one_that_feeds_another_stays() -> None:
    layers, embd = Dim("layers", 3), Dim("embd", 2)
    g = Graph("carries")
    x = g.data("x", [embd], "f64")

    def body(carry: tuple, _: tuple) -> tuple:
        used, needed, alone = carry
        return used + needed, needed * 2.0, b.tanh(alone)

    used, _, _ = b.repeat(layers, body, (x, x, x), ())
    (op,) = dead_code(g.build({"used": used})).body.ops
    assert op.attrs["carries"] == 2
    assert kinds(dead_code(g.build({"used": used}))) == ["repeat", "add", "constant", "mul"]


def test_inner_repeats_are_pruned_too() -> None:
    outer, inner, embd = Dim("outer", 2), Dim("inner", 3), Dim("embd", 2)
    g = Graph("nested")
    x, w = g.data("x", [embd], "f64"), g.data("w", [inner, embd], "f64")

    def step(carry: tuple, w: tuple) -> tuple:
        return carry[0] * w[0], b.exp(carry[1])

    def body(carry: tuple, _: tuple) -> tuple:
        h, _ = b.repeat(inner, step, (carry[0], carry[0]), (w,))
        return (h,)

    (h,) = b.repeat(outer, body, (x,), ())
    assert kinds(dead_code(g.build({"h": h}))) == ["repeat", "repeat", "mul"]


def test_repeats_are_never_merged() -> None:
    layers, embd = Dim("layers", 2), Dim("embd", 2)
    g = Graph("twins")
    x = g.data("x", [embd], "f64")
    (y,) = b.repeat(layers, lambda c, _: (b.tanh(c[0]),), (x,), ())
    (z,) = b.repeat(layers, lambda c, _: (b.exp(c[0]),), (x,), ())
    assert kinds(simplify(g.build({"y": y, "z": z}))) == ["repeat", "tanh", "repeat", "exp"]


def test_numbers_that_only_compare_equal_are_kept_apart() -> None:
    g = Graph("numbers")
    x = g.data("x", (), "f64")
    one = x / g.constant(0.0, "f64")
    other = x / g.constant(-0.0, "f64")
    program = simplify(g.build({"one": one, "other": other}))
    found = run_numpy(program, {"x": np.array(1.0)})
    assert (found["one"], found["other"]) == (np.inf, -np.inf)


def test_equal_draws_of_random_numbers_are_one_and_other_salts_are_not() -> None:
    n = Dim("n", 3)
    g = Graph("draws")
    seed = g.data("seed", (), "u32")
    a, c, d = (b.random(seed, [n], salt) for salt in (1, 1, 2))
    program = simplify(g.build({"a": a, "c": c, "d": d}))
    assert kinds(program) == ["random", "random"]
    assert program.output_value("a") is program.output_value("c")
