"""Programs print as text and parse back to the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir.builder import Graph
from neocc.ir.errors import IRError, Loc
from neocc.ir.mesh import Layout, Mesh, Partial, Strategy, Through
from neocc.ir.ops import COLLECTIVES, ELEMENTWISE, OPS
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.text import ParseError, parse_partitioned, parse_program, print_program
from neocc.ir.types import Dim, TensorType
from neocc.ir.verify import verify
from neocc.passes.partition import Partitioned, apply, simulate
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment, seeded
from tests.random_programs import inputs_for, meshes, programs

PROGRAMS = Path(__file__).parent.parent / "programs"
FILES = sorted(PROGRAMS.glob("*.ir"))


def code(text: str) -> str:
    """The text without its comments."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


@given(programs())
@settings(max_examples=60)
def test_a_random_program_comes_back_the_same(program: Program) -> None:
    text = print_program(program)
    back = parse_program(text)
    assert print_program(back) == text
    assert (back.inputs, back.outputs) == (program.inputs, program.outputs)
    for old, new in zip(program.body.walk(), back.body.walk(), strict=True):
        assert (old.kind, old.attrs, old.loc) == (new.kind, new.attrs, new.loc)
        assert [v.type for v in old.results] == [v.type for v in new.results]
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    for name, array in run_numpy(back, inputs).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_prints_as_it_is_written(path: Path) -> None:
    text = path.read_text()
    program, mesh = parse_partitioned(text, str(path))
    verify(program)
    assert print_program(program, mesh) == code(text)


def test_the_files_show_every_op_that_has_attributes() -> None:
    kinds = {op.kind for path in FILES for op in parse_program(path.read_text()).body.walk()}
    assert set(OPS) - (ELEMENTWISE - {"cast", "broadcast", "select"}) - COLLECTIVES <= kinds


@given(st.floats() | st.integers(-(2**70), 2**70) | st.booleans() | st.text())
@settings(max_examples=80)
def test_an_attribute_keeps_its_value_and_its_kind(value: float | int | bool | str) -> None:
    out = Value(TensorType((), "f64"))
    op = Op("constant", (), (out,), {"value": value, "list": (value, (value,))})
    program = Program("p", (), ("out",), Region((), (op,), (out,)))
    back = parse_program(print_program(program)).body.ops[0].attrs
    assert repr(back) == repr(op.attrs)


def test_layouts_and_strategies_come_back() -> None:
    program, mesh = parse_partitioned((PROGRAMS / "partitioned.ir").read_text())
    assert mesh == Mesh((("x", 2), ("y", 4)))
    ops = program.body.ops
    assert program.input_value("w").type.layout == Layout(("embd", "mlp"))
    assert ops[2].result.type.layout == Layout(("batch", Partial("sum")))
    assert ops[3].attrs["strategy"] == Strategy(("batch", Through(frozenset({0}))))
    assert ops[4].attrs["strategy"] == Strategy(("batch", Through(frozenset({0, 1}))))
    assert ops[6].result.type.layout == Layout((Partial("max"), None))


def test_hints_are_kept_and_made_unique() -> None:
    a = Dim("a", 2)
    g = Graph("hints")
    x = g.data("x", [a], "f32")
    y, z = (x + 1.0).named("y"), (x + 2.0).named("y")
    odd = (y * z).named("layer 3/grad[w]")
    text = print_program(g.build({"out": odd, "3": odd + y}), locs=False)
    assert "%y: f32[a=2] = add" in text and "%y_1: f32[a=2] = add" in text
    assert "%layer_3/grad_w_: f32[a=2] = mul(%y, %y_1)" in text
    assert '"3"=%_3' in text
    assert print_program(parse_program(text)) == text


def test_locs_can_be_left_out() -> None:
    program = parse_program((PROGRAMS / "layers.ir").read_text())
    assert program.body.ops[0].loc == Loc("models/layers.py", 9)
    text = print_program(program, locs=False)
    assert "@" not in text
    assert all(op.loc is None for op in parse_program(text).body.walk())


def test_a_long_signature_takes_a_line_an_argument() -> None:
    program = parse_program((PROGRAMS / "simplify_before.ir").read_text())
    assert print_program(program) == print_program(parse_program(print_program(program)))
    region = program.body.ops[3].regions[0]
    many = tuple(Value(TensorType((Dim("embd", 4),), "f64")) for _ in range(9))
    wide = Region((*region.args, *many), region.ops, region.outputs)
    op = program.body.ops[3]
    longer = Op(op.kind, (*op.operands, *[op.operands[0]] * 9), op.results, op.attrs, (wide,))
    body = Region(program.body.args, (*program.body.ops[:3], longer), program.body.args)
    text = print_program(Program("p", program.inputs, ("a", "b", "c"), body))
    assert "\n      %w: f64[embd=4],\n" in text
    assert print_program(parse_program(text)) == text


ONE = "program p {\n  data %x: f32[a=2]\n"


@pytest.mark.parametrize(
    "text, line, column, message",
    [
        ("", 1, 1, "expected 'program', found the end"),
        ("program p", 1, 10, "expected '{', found the end"),
        ("mesh x:0\nprogram p {}", 1, 6, "mesh axis 'x' has size 0"),
        (
            ONE + "  return y=%y\n}",
            3,
            12,
            "expected a value that this region has defined, found '%y'",
        ),
        (ONE + "  %0 f32[] = neg(%x)", 3, 6, "expected ':', found 'f32'"),
        (ONE + "  %0: f33[] = neg(%x)", 3, 7, "unknown dtype 'f33'"),
        (ONE + "  %0: f32[a=2, a=2] = neg(%x)", 3, 7, "dim 'a' appears twice"),
        (ONE + "  %0: f32[a=-2] = neg(%x)", 3, 11, "negative size"),
        (ONE + "  %0: f32[a=1.5] = neg(%x)", 3, 13, "expected the dim's size, found '1.5'"),
        (ONE + "  %x: f32[a=2] = neg(%x)", 3, 3, "expected a new value, found '%x'"),
        (ONE + "  %0: f32[a=2] = neg(%x %x)", 3, 25, "expected ')', found '%x'"),
        (ONE + "  %0: f32[a=2] = neg(%x) {k=}", 3, 29, "expected a number, a string, a dim"),
        (ONE + "  %0: f32[a=2] = neg(%x) {k=(1)}", 3, 29, "expected a number, a string, a dim"),
        (ONE + "  neg(%x)", 3, 3, "expected an op like %0: f32[] = ... or 'return'"),
        (ONE + "  ?\n}", 3, 3, "expected a token, found '?"),
        (ONE + "  return y=%x\n} more", 4, 3, "expected the end, found 'more'"),
    ],
)
def test_a_parse_error_says_where_and_what_was_expected(
    text: str, line: int, column: int, message: str
) -> None:
    with pytest.raises(ParseError) as error:
        parse_program(text, "file.ir")
    assert (error.value.line, error.value.column) == (line, column)
    assert str(error.value).startswith(f"file.ir:{line}:{column}: ")
    assert message in str(error.value)


def test_a_region_sees_nothing_of_what_is_outside() -> None:
    text = (PROGRAMS / "layers.ir").read_text().replace("add(%1, %bias)", "add(%1, %h)")
    with pytest.raises(ParseError, match="this region has defined, found '%h'"):
        parse_program(text)


def test_an_attribute_that_text_cannot_hold_is_refused() -> None:
    op = Op("neg", (), (), {"odd": object()})
    with pytest.raises(IRError, match="an attribute cannot be a object"):
        print_program(Program("p", (), (), Region((), (op,), ())))


@given(programs(), meshes(), st.integers(0, 99))
@settings(max_examples=40)
def test_a_partitioned_program_comes_back_the_same(program: Program, mesh: Mesh, seed: int) -> None:
    partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
    text = print_program(partitioned.program, mesh)
    back, mesh_back = parse_partitioned(text)
    assert mesh_back == mesh and print_program(back, mesh) == text
    verify(back)
    for old, new in zip(partitioned.program.body.walk(), back.body.walk(), strict=True):
        assert (old.kind, old.attrs) == (new.kind, new.attrs)
        assert [v.type for v in old.results] == [v.type for v in new.results]
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = simulate(partitioned, inputs)
    for name, array in simulate(Partitioned(back, mesh), inputs).items():
        np.testing.assert_array_equal(array, expected[name])
