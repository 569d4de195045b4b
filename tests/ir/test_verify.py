"""The verifier catches each kind of fault, and says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from neocc.ir.errors import IRError, Loc
from neocc.ir.program import Input, Op, Program, Region, Value
from neocc.ir.text import parse_program
from neocc.ir.types import Dim, TensorType
from neocc.ir.verify import verify
from tests.random_programs import programs

TEXT = """
program sample {
  parameter %w: f64[layers=2, embd=4]
  data %x: f64[batch=3, embd=4]
  %0: f64[batch=3, embd=4] = tanh(%x)  @ model.py:1
  %1: f64[batch=3] = reduce(%0) {op="sum", dims=["embd"]}  @ model.py:2
  %h: f64[batch=3, embd=4] = repeat(%0, %w, %1) {dim=layers=2, carries=1, stacked=1, reverse=false,
      recompute=false} (%h: f64[batch=3, embd=4], %w: f64[embd=4], %b: f64[batch=3]) {
    %0: f64[batch=3, embd=4] = mul(%h, %w)  @ model.py:4
    %1: f64[batch=3, embd=4] = add(%0, %b)  @ model.py:5
    yield %1
  }  @ model.py:3
  %2: f64[batch=3, embd=4] = sub(%h, %x)  @ model.py:6
  return w=%w, y=%2
}
"""


def test_the_sample_is_valid() -> None:
    verify(parse_program(TEXT))


@given(programs())
@settings(max_examples=60)
def test_what_the_builder_builds_is_valid(program: Program) -> None:
    verify(program)


@pytest.mark.parametrize(
    "old, new, line, message",
    [
        ("= tanh(%x)", "= tan(%x)", 1, "there is no op 'tan'"),
        ("= tanh(%x)", "= add(%x)", 1, "add takes 2 operands, not 1"),
        ("= tanh(%x)", "= gather(%x, %x)", 1, "gather's ids are f64, not i32"),
        ("= tanh(%x)", "= tanh(%x) () { yield }", 1, "tanh has 1 regions, not 0"),
        ('{op="sum", dims', "{dims", 2, "reduce lacks the attribute 'op'"),
        ('op="sum"', 'op="mean"', 2, "reduce by 'mean'"),
        ('dims=["embd"]', 'dims=["seq"]', 2, "reduce over 'seq', which"),
        ('dims=["embd"]', "dims=3", 2, "reduce has a faulty operand or attribute"),
        ("%1: f64[batch=3] = r", "%1: f32[batch=3] = r", 2, "the program says f32[batch=3]"),
        ("%0: f64[batch=3, embd=4] = t", "%0: f64[embd=4, batch=3] = t", 1, "tanh makes f64[batch"),
        ("%2: f64[batch=3, embd=4] =", "%2: f64[], %3: f64[] =", 6, "sub makes 1 values, not 2"),
        (
            "carries=1, stacked=1",
            "carries=2, stacked=0",
            3,
            "repeat: operand f64[layers=2, embd=4]",
        ),
        ("stacked=1", "stacked=2", 3, "stacked operand f64[batch=3] lacks the dim layers=2"),
        ("repeat(%0, %w, %1)", "repeat(%0, %w)", 3, "as many operands as region arguments"),
        ("%b: f64[batch=3]", "%b: f64[]", 3, "operand f64[batch=3] meets region argument f64[]"),
        ("    yield %1", "    yield %b", 3, "carried f64[batch=3, embd=4] leaves the region as"),
        ("{dim=layers=2,", "{dim=layers=3,", 3, "lacks the dim layers=3"),
        ("return w=%w, y", "return w=%2, y", 6, "output 'w' is f64[batch=3, embd=4]; the input it"),
        ("return w=%w, y", "return y=%w, y", None, "two outputs are named 'y'"),
        ("data %x:", 'data %x "w":', None, "two inputs are named 'w'"),
    ],
)
def test_a_fault_in_the_text_is_found(old: str, new: str, line: int | None, message: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(IRError) as error:
        verify(parse_program(TEXT.replace(old, new)))
    assert message in error.value.message
    assert error.value.loc == (Loc("model.py", line) if line else None)


def with_ops(change: Callable[[list[Op]], list[Op]]) -> Callable[[Program], Program]:
    def changed(program: Program) -> Program:
        body = program.body
        return replace(program, body=Region(body.args, tuple(change(list(body.ops))), body.outputs))

    return changed


def operands(op: Op, *values: Value) -> Op:
    return Op(op.kind, values, op.results, op.attrs, op.regions, op.loc)


def use_from_outside(ops: list[Op]) -> list[Op]:
    region = ops[2].regions[0]
    first = operands(region.ops[0], ops[0].result, region.args[1])
    inner = Region(region.args, (first, *region.ops[1:]), region.outputs)
    return [*ops[:2], Op("repeat", ops[2].operands, ops[2].results, ops[2].attrs, [inner]), ops[3]]


def use_from_inside(ops: list[Op]) -> list[Op]:
    return [*ops[:3], operands(ops[3], ops[2].regions[0].ops[0].result, ops[3].operands[1])]


def two_sizes(ops: list[Op]) -> list[Op]:
    attrs = {"dim": Dim("batch", 5), "dtype": "i32"}
    out = Value(TensorType((Dim("batch", 5),), "i32"))
    return [*ops, Op("iota", (), (out,), attrs, loc=Loc("model.py", 7))]


@pytest.mark.parametrize(
    "change, message",
    [
        (with_ops(lambda ops: [ops[1], ops[0], *ops[2:]]), "before it is defined"),
        (with_ops(lambda ops: ops[1:]), "which nothing in its region defines"),
        (with_ops(lambda ops: [ops[0], *ops]), "tanh defines %?: f64[batch=3, embd=4] a second"),
        (with_ops(lambda ops: ops[:3]), "the end of the region uses"),
        (with_ops(use_from_outside), "of an outer region; pass it"),
        (with_ops(use_from_inside), "which nothing in its region defines"),
        (with_ops(two_sizes), "size 5; it is 3: one name has one size"),
        (lambda p: replace(p, inputs=p.inputs[:1]), "1 inputs are named and the body has 2"),
        (lambda p: replace(p, outputs=("y",)), "1 outputs are named and the body has 2"),
        (lambda p: replace(p, inputs=(Input("w", "weight"), p.inputs[1])), "has the role 'weight'"),
    ],
)
def test_a_fault_in_the_structure_is_found(
    change: Callable[[Program], Program], message: str
) -> None:
    with pytest.raises(IRError) as error:
        verify(change(parse_program(TEXT)))
    assert message in error.value.message


def test_an_output_that_replaces_an_input_has_its_layout() -> None:
    text = "program p {{ parameter %w: f32[a=4] {{a}}\n %0: f32[a=4] {} = neg(%w)\n return w=%0 }}"
    verify(parse_program(text.format("{a}")))
    with pytest.raises(IRError, match="output 'w' is"):
        verify(parse_program(text.format("{-}")))
