"""A batch in parts, one after the other, is the same step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.builder import Graph, iota, tanh
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.microbatch import split_batch
from neocc.passes.partition import apply, simulate, verify_partitioned
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from tests.numpy_executor import run_numpy
from tests.random_assignments import drawn, random_assignment
from tests.random_programs import assert_close, inputs_for

TINY = replace(gpt.TINY, dtype="f64", param_dtype="f64", embd=16, heads=2, seq=8, vocab=31, batch=8)
BATCH, EMBD = Dim("batch", 6), Dim("embd", 4)


def in_parts(
    program: Program, split: Program, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    shapes = {i.name: v.type.shape for i, v in split.named_inputs}
    return {name: array.reshape(shapes[name]) for name, array in inputs.items()}


def assert_same(program: Program, split: Program) -> None:
    verify(split)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    for name, value in run_numpy(split, in_parts(program, split, inputs)).items():
        assert_close(value, expected[name])


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("recompute", [True, False, None])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_step_in_parts_is_the_whole_step(
    count: int, recompute: bool | None, dropout: float
) -> None:
    rates = {"embed_dropout": dropout, "attn_dropout": dropout, "res_dropout": dropout}
    program = simplify(gpt.train_step(replace(TINY, recompute=recompute, **rates)))
    split = split_batch(program, count)
    assert_same(program, split)
    loops = [op for op in split.body.ops if op.kind == "repeat"]
    assert [op.attrs["dim"] for op in loops] == [Dim("microbatch", count)]


def test_indices_along_the_batch_are_those_of_the_whole_batch() -> None:
    g = Graph("indices")
    x = g.data("x", (BATCH, EMBD), "f64")
    program = g.build({"y": (tanh(x) * iota(x, BATCH).cast("f64")).sum("batch", "embd")})
    assert_same(program, split_batch(program, 3))


def test_sums_are_added_up_and_then_used_freely() -> None:
    g = Graph("sums")
    x, w = g.data("x", (BATCH, EMBD), "f64"), g.parameter("w", (EMBD,), "f64")
    total = (x * w).sum("batch")
    program = g.build({"w": w - tanh(total) * 0.1, "norm": (total * total).sum("embd")})
    split = split_batch(program, 2)
    assert_same(program, split)
    (loop,) = [op for op in split.body.ops if op.kind == "repeat"]
    assert loop.attrs["carries"] == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: {"y": (x - x.sum("batch")).sum("batch", "embd")}, "needs a sum over the whole"),
        (lambda x: {"y": tanh(x)}, "is needed whole"),
        (lambda x: {"y": x.max("batch")}, "is no sum over the batch"),
        (lambda x: {"y": x.shift("batch", 1).sum("batch")}, "changes the dim 'batch'"),
    ],
)
def test_what_needs_the_whole_batch_is_refused_by_name(make, says: str) -> None:
    g = Graph("whole")
    program = g.build(make(g.data("x", (BATCH, EMBD), "f64")))
    with pytest.raises(LayoutError, match=says):
        split_batch(program, 2)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    g = Graph("odd")
    program = g.build({"y": g.data("x", (BATCH, EMBD), "f64").sum("batch")})
    with pytest.raises(LayoutError, match="4 microbatches: batch 6 does not divide by 4"):
        split_batch(program, 4)


@given(st.data())
@settings(max_examples=15)
def test_parts_on_any_layout_compute_the_same(data: st.DataObject) -> None:
    program = simplify(gpt.train_step(replace(TINY, recompute=data.draw(st.booleans()))))
    split = split_batch(program, 2)
    choose = drawn(data)
    mesh = Mesh.parse(data.draw(st.sampled_from(["2", "2x2"])))
    assignment = random_assignment(split, mesh, choose)
    partitioned = apply(split, mesh, assignment)
    verify_partitioned(partitioned, split)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    for name, value in simulate(partitioned, in_parts(program, split, inputs)).items():
        assert_close(value, expected[name])


def test_gradients_may_be_reduced_once_for_all_parts() -> None:
    """What no work can hide is summed on each device apart, and reduced after the last part."""
    config = replace(TINY, recompute=False, layers=1, dtype="f64")
    program = simplify(gpt.train_step(config))
    plan = make_plan(program, Mesh.parse("2"), chip("h100"), "batch:x", microbatches=4)
    loop = next(op for op in plan.partitioned.program.body.ops if op.kind == "repeat")
    carried = loop.regions[0].args[: loop.attrs["carries"]]
    partial = [v for v in carried if v.type.layout is not None and v.type.layout.partial_axes]
    assert {v.type.size for v in partial} >= {config.vocab * config.embd}
    last = [c for c in plan.collectives if c.region == "outside layers"]
    assert len(last) == len(partial) and {(c.kind, c.count) for c in last} == {("all_reduce", 1)}
    verify_partitioned(plan.partitioned, plan.program)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    found = simulate(plan.partitioned, in_parts(program, plan.program, inputs))
    for name, value in found.items():
        assert_close(value, expected[name])
