"""Plans of random programs compute the program, keep to memory, and say what runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import HardwareError, chip
from neocc.ir.builder import Graph, repeat
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh
from neocc.ir.types import Dim
from neocc.nn import Experts
from neocc.passes.layout.rules import experts, padded_sizes, parse_layout
from neocc.passes.pad import pad_inputs, unpad_outputs
from neocc.passes.partition import simulate, verify_partitioned
from neocc.passes.plan import Plan, make_plan
from tests.numpy_executor import run_numpy
from tests.passes.layout.exhaustive import ties
from tests.random_programs import assert_close, inputs_for, meshes, programs

# Sizes at which time is spent on work, not on latencies: plans of toys are all nearly equal.
SMALL = replace(gpt.PRESETS["gpt3-xl"], layers=2, batch=32, vocab=32000)
MIXED = replace(SMALL, moe_layers=(1,), experts=Experts(8, 8192))


@given(st.data())
@settings(max_examples=30)
def test_a_plan_of_any_program_computes_what_the_program_computes(data: st.DataObject) -> None:
    program = data.draw(programs(max_ops=8))
    mesh = data.draw(meshes(max_axes=2, big=False))
    try:
        plan = make_plan(program, mesh, chip(data.draw(st.sampled_from(["v5e", "h100"]))))
    except HardwareError:  # a GPU multiplies no integers
        return
    assert plan.solution.gap == pytest.approx(0, abs=1e-9)
    verify_partitioned(plan.partitioned, plan.program)
    inputs = inputs_for(program, np.random.default_rng(0))
    found = simulate(plan.partitioned, pad_inputs(plan.program, inputs))
    expected = run_numpy(program, inputs)
    for name, value in unpad_outputs(program, found).items():
        assert_close(value, expected[name])


def test_a_loop_that_does_nothing_has_a_plan() -> None:
    g = Graph("idle")
    x = g.data("x", (Dim("a", 4),), "f32")
    program = g.build({"y": repeat(Dim("n", 3), lambda carry, own: carry, x, ())})
    assert make_plan(program, Mesh.parse("2"), chip("v5e")).fits


def test_dims_that_are_joined_are_not_padded_unasked() -> None:
    g = Graph("joined")
    x = g.data("x", (Dim("a", 8), Dim("b", 16)), "f32")
    program = g.build({"y": x.merge("a", "b", "n").sum("n")})
    assert padded_sizes(program, Mesh.parse("3")) == {}
    make_plan(program, Mesh.parse("3"), chip("v5e"))


@pytest.fixture(scope="module")
def expert_plans() -> dict[str, Plan]:
    mesh = Mesh.parse("2x4")
    program = gpt.train_step(SMALL)
    return {e.name: make_plan(program, mesh, chip("v5e"), rules=e.rules) for e in experts(mesh)}


def stored(plan: Plan, name: str) -> tuple[object, ...]:
    layout = plan.partitioned.program.input_value(name).type.layout
    assert layout is not None
    return layout.axes


def test_no_expert_is_faster_than_the_plan(expert_plans: dict[str, Plan]):
    plan = make_plan(gpt.train_step(SMALL), Mesh.parse("2x4"), chip("v5e"))
    for expert in expert_plans.values():
        assert plan.timeline.step <= expert.timeline.step * (1 + 1e-4)


def test_gshard_cuts_experts_and_sends_them_tokens() -> None:
    program, mesh = gpt.train_step(MIXED), Mesh.parse("2x4")
    named = {e.name: e.rules for e in experts(mesh, program.dims)}
    assert named.keys() >= {"Megatron on y", "GShard on x", "GShard on y"}
    gshard = make_plan(program, mesh, chip("v5e"), rules=named["GShard on y"])
    assert stored(gshard, "h1.moe.up")[1] == stored(gshard, "h1.moe.down")[1] == "experts"
    loops = [c for c in gshard.collectives if c.kind == "all_to_all" and "layers" in c.region]
    assert {c.axis for c in loops} == {"y"} and len(loops) >= 4
    assert not [e for e in experts(mesh, gpt.train_step(SMALL).dims) if "GShard" in e.name]


@pytest.mark.slow
def test_sixteen_experts_on_8x16_are_cut_without_being_asked() -> None:
    program = gpt.train_step(gpt.PRESETS["gpt-moe"])
    plan = make_plan(program, Mesh.parse("8x16"), chip("v5p"))
    verify_partitioned(plan.partitioned, plan.program)
    assert plan.fits and plan.solution.gap < 0.01
    assert stored(plan, "h1.moe.up")[1] == stored(plan, "h1.moe.down")[1] == "experts"
    loops = [c for c in plan.collectives if c.kind == "all_to_all" and "layers" in c.region]
    inside = Counter(c.region for c in loops if c.region.startswith("layers"))
    assert inside == {"layers forward": 2, "layers backward": 2}
    assert {(c.axis, c.count, c.bytes) for c in loops if c.count > 1} == {("y", 12, 40 * 2**20)}


@pytest.mark.slow
def test_megatron_cuts_each_expert() -> None:
    program, mesh = gpt.train_step(MIXED), Mesh.parse("2x4")
    (rules,) = (e.rules for e in experts(mesh, program.dims) if e.name == "Megatron on y")
    plan = make_plan(program, mesh, chip("v5e"), rules=rules)
    assert stored(plan, "h1.moe.up") == (None, "expert_hidden")


def test_data_parallel_replicates_weights_and_fsdp_cuts_them(expert_plans: dict[str, Plan]):
    assert stored(expert_plans["data parallel"], "h0.mlp.fc") == (None, None)
    assert None not in stored(expert_plans["FSDP"], "h0.mlp.fc")


def test_megatron_cuts_heads_and_mlp_on_one_axis_and_seq_between(expert_plans: dict[str, Plan]):
    plan = expert_plans["Megatron on y"]
    assert stored(plan, "h0.mlp.fc") == (None, "mlp")
    assert stored(plan, "h0.attn.q") == (None, "heads")
    assert stored(plan, "wte") == (None, "vocab")
    (forward, *_) = [op for op in plan.partitioned.program.body.ops if op.kind == "repeat"]
    norms = [op for op in forward.regions[0].ops if op.kind == "rsqrt"]
    assert norms and all(op.result.type.layout.axes == ("batch", "seq") for op in norms)


def test_a_full_layout_is_obeyed_everywhere():
    plan = make_plan(
        gpt.train_step(SMALL), Mesh.parse("2x4"), chip("v5e"), "batch:x,heads:y,mlp:y,vocab:y"
    )
    for info, value in plan.partitioned.program.named_inputs:
        x, y = stored(plan, info.name)
        assert x == ("batch" if value.type.has("batch") else None)
        named = [n for n in ("heads", "mlp", "vocab") if value.type.has(n)]
        assert y == (named[0] if named else None)
    for op in plan.partitioned.program.body.walk():
        strategy = op.attrs.get("strategy")
        if strategy is not None:
            cuts = {c for c in strategy.axes if isinstance(c, str)}
            assert cuts <= {"batch", "heads", "mlp", "vocab"}


def test_an_axis_of_one_device_may_be_named_and_cuts_nothing():
    plan = make_plan(gpt.train_step(SMALL), Mesh.parse("4x1"), chip("v5e"), "batch:x,heads:y")
    assert all(stored(plan, i.name)[1] is None for i in plan.program.inputs)


def test_axes_that_a_layout_does_not_name_are_the_solvers():
    program = gpt.train_step(SMALL)
    given_x = make_plan(program, Mesh.parse("2x4"), chip("v5e"), "heads:x,mlp:x")
    assert stored(given_x, "h0.mlp.fc")[0] == "mlp"
    step = given_x.partitioned.program.body
    used = {op.attrs["strategy"].axes[1] for op in step.walk() if "strategy" in op.attrs}
    assert "batch" in used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", "not of the form dim:axis"),
        ("bach:x", "did you mean 'batch'"),
        ("batch:q", "has no axis 'q'"),
        ("batch:x,seq:x", "meet in the tensor"),
    ],
)
def test_a_wrong_layout_is_told_apart(text: str, message: str):
    with pytest.raises(LayoutError, match=message):
        parse_layout(text, gpt.train_step(SMALL), Mesh.parse("2x4"))


def test_dims_are_padded_where_that_costs_little_or_a_layout_asks():
    program = gpt.train_step(replace(SMALL, vocab=50257, heads=2))
    mesh = Mesh.parse("8x16")
    assert padded_sizes(program, mesh)["vocab"] == 50304
    assert "heads" not in padded_sizes(program, mesh)
    assert padded_sizes(program, mesh, {1: ("heads",)})["heads"] == 16


def test_depth_changes_neither_the_problem_nor_the_layout():
    twelve, many = (
        make_plan(gpt.train_step(replace(SMALL, layers=n)), Mesh.parse("2x4"), chip("v5p"))
        for n in (12, 960)
    )
    assert len(twelve.problem.choices) == len(many.problem.choices)
    assert twelve.solution.whole == many.solution.whole


def test_flops_are_those_of_the_model_and_its_recomputation():
    config = replace(SMALL, recompute=True)
    plan = make_plan(gpt.train_step(config), Mesh.parse("1"), chip("v5p"))
    tokens, n = config.batch * config.seq, config.layers
    weights = n * 12 * config.embd**2
    scores = n * 2 * config.seq * config.embd
    head = config.vocab * config.embd
    assert plan.model_flops == 6 * tokens * (weights + scores + head)
    # The last product of a layer is not run again: nothing in the backward pass reads it.
    others = 8 * tokens * weights + 6 * tokens * head - 2 * tokens * n * 4 * config.embd**2
    # Fused attention: 2 products, 2 again and 5 backward, of 10 in 16 tiles.
    assert plan.flops == others + 9 * tokens * scores * 10 // 16
    config = replace(config, attention_kernel="unfused")
    plan = make_plan(gpt.train_step(config), Mesh.parse("1"), chip("v5p"))
    assert plan.model_flops == 6 * tokens * (weights + scores + head)
    assert plan.flops == others + 8 * tokens * scores


def test_a_kernel_that_sends_hides_behind_nothing() -> None:
    """A device runs it, and computes nothing else meanwhile."""
    step, mesh = gpt.train_step(replace(SMALL, batch=16)), Mesh.parse("2x4")
    (fsdp,) = (e.rules for e in experts(mesh) if e.name == "FSDP")
    asked = Collectives.asked(forced=[f"{k}=dma" for k in ("all_gather", "reduce_scatter")])
    plain = make_plan(step, mesh, chip("v5e"), rules=fsdp)
    assert plain.timeline.hidden > 0
    plan = make_plan(step, mesh, chip("v5e"), rules=fsdp, collectives=asked)
    kernels = [c for c in plan.collectives if c.algorithm == "dma"]
    assert kernels and not any(c.hideable or c.behind for c in kernels)
    assert plan.timeline.exposed >= sum(c.seconds * c.count for c in kernels)
    counted = plan.solution.objective - ties(plan.problem, plan.solution)
    assert counted == pytest.approx(plan.timeline.step, rel=1e-6)
