"""Kernels of fused attention: what they compute, take, cost; in plans and in compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from models import gpt
from neocc.backends import backend
from neocc.backends.target import compile_for_target
from neocc.cost.attention_kernels import splash_tiles
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir.builder import Graph, fused_attention
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.ops import ATTENTION
from neocc.ir.program import Op
from neocc.ir.types import Dim
from neocc.lower.audit import Audit, audit
from neocc.lower.hlo import HloFacts
from neocc.lower.jax import lower
from neocc.passes.plan import Plan, attention_in_kernels, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.plan_check import plan_of
from neocc.runtime.plan_file import document, read
from tests.runtime.test_plan_file import written

SPLASH = Collectives.asked(forced=["attention=splash"])
SMALL = replace(
    gpt.PRESETS["tiny"], embd=256, heads=4, layers=3, batch=8, seq=512, vocab=512, dtype="bf16"
)
MESH = Mesh.parse("2x4")
LAYOUT = "batch:x,heads:y"


def op(seq: int, memory: int, causal: bool, window: int | None, dtype: str = "bf16") -> Op:
    g = Graph("attention")
    rows = [Dim("heads", 2), Dim("seq", seq), Dim("head_dim", 64)]
    keys = Dim("memory", memory)
    columns = [keys if d.name == "seq" else d for d in rows]
    q = g.parameter("q", rows, dtype)
    k, v = (g.parameter(n, columns, dtype) for n in "kv")
    out, _ = fused_attention(q, k, v, "seq", keys, "head_dim", causal, window, 0.125)
    return next(o for o in simplify(g.build({"out": out})).body.walk() if o.kind == "attention")


@given(
    st.sampled_from([128, 256, 384, 512, 768, 1024]),
    st.booleans(),
    st.none() | st.integers(1, 1200),
)
@settings(max_examples=60, deadline=None)
def test_the_tiles_that_are_counted_hold_the_scores_that_are_seen(
    seq: int, causal: bool, window: int | None
) -> None:
    """As the kernels' own masks have them."""
    rows, columns, count = splash_tiles(op(seq, seq, causal, window))
    shape = (seq, seq)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    whole = np.asarray(mask[:, :]).reshape(seq // rows, rows, seq // columns, columns)
    assert count == whole.any(axis=(1, 3)).sum()


def planned(collectives: Collectives = SPLASH, layout: str = LAYOUT, **fields: object) -> Plan:
    step = gpt.train_step(replace(SMALL, **fields))  # type: ignore[arg-type]
    return make_plan(step, MESH, chip("v5e"), layout, collectives=collectives)


def test_a_plan_says_what_runs_its_attention_and_what_loops_take() -> None:
    plan = planned()
    own = attention_in_kernels(plan)
    assert own is not None and own.name == "splash" and own.ops == own.of > 0
    assert 0 < own.seconds < own.loop
    loops = planned(Collectives.asked())
    assert attention_in_kernels(loops) is None
    assert plan.timeline.compute < loops.timeline.compute
    # Scores and their gradients are made twice by the gradient's two kernels.
    assert plan.flops > loops.flops


def test_queries_that_are_cut_stay_a_loop() -> None:
    plan = planned(layout="batch:x,seq:y")
    own = attention_in_kernels(plan)
    assert own is not None and own.ops == 0 < own.of
    cut = planned(Collectives.asked(), layout="batch:x,seq:y")
    assert plan.flops == cut.flops and plan.timeline == cut.timeline


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seq": 96}, "attention=splash does not take attention: 96 queries and 96 keys are not"),
        ({"attention_kernel": "unfused"}, "has no fused attention"),
    ],
)
def test_what_kernels_never_take_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(NeoccError, match=said):
        planned(**fields)


@pytest.mark.parametrize(
    ("target", "name", "said"),
    [
        ("h100", "splash", "attention=splash is a kernel of TPUs, and h100 is a GPU"),
        ("v5e", "cudnn", "attention=cudnn is a kernel of GPUs, and v5e is a TPU"),
        ("v5e", "flash", "attention=flash: one of standard, ring, splash, cudnn"),
    ],
)
def test_kernels_of_other_chips_are_refused(target: str, name: str, said: str) -> None:
    with pytest.raises(NeoccError, match=said):
        asked = Collectives.asked(forced=[f"attention={name}"])
        make_plan(gpt.train_step(SMALL), MESH, chip(target), collectives=asked)


def test_cudnn_is_planned_on_gpus() -> None:
    asked = Collectives.asked(forced=["attention=cudnn"])
    step = gpt.train_step(SMALL)
    plan = make_plan(step, MESH, chip("h100"), LAYOUT, collectives=asked)
    own = attention_in_kernels(plan)
    assert own is not None and own.ops == own.of > 0 and own.seconds < own.loop
    ops = [o for o in plan.partitioned.program.body.walk() if o.kind in ATTENTION]
    for o in ops:
        (call,) = backend("gpu").calls(o, MESH)
        assert call.flops > 0 and call.name.startswith("__cudnn$fmha")


def test_a_plan_file_keeps_what_runs_attention(tmp_path: Path) -> None:
    program = simplify(gpt.train_step(SMALL))
    plan = make_plan(program, MESH, chip("v5e"), LAYOUT, collectives=SPLASH)
    data = document(plan)
    assert data["collectives"]["forced"] == {"attention": "splash"}
    back = plan_of(read(written(tmp_path, data)), program, None, chip("v5e")).plan
    assert attention_in_kernels(back) == attention_in_kernels(plan)
    assert back.flops == plan.flops and document(back) == data


def test_elsewhere_than_on_its_chip_a_plan_runs_the_loop() -> None:
    """As do plans of kernels that send."""
    jax.devices()
    text = lower(planned().partitioned).stablehlo()
    assert "tpu_custom_call" not in text


@pytest.fixture(scope="module")
def compiled() -> tuple[Plan, HloFacts]:
    pytest.importorskip("libtpu")
    plan = planned()
    return plan, backend("tpu").read(compile_for_target(plan).hlo)


def held(plan: Plan, facts: HloFacts) -> Audit:
    return audit(plan, "", plan.memory.peak, 0, facts, backend("tpu").calls)


@pytest.mark.tpu_compiler
def test_every_kernel_is_found_and_its_flops_are_the_plans(
    compiled: tuple[Plan, HloFacts],
) -> None:
    plan, facts = compiled
    found = held(plan, facts)
    assert found.ok and found.flops_equal
    assert facts.kernels and facts.flops < found.compiled_flops == plan.flops
    names = {k.name for k in facts.kernels}
    assert len(names) == 3 and all(name.startswith("splash_mha_") for name in names)


def without_one(facts: HloFacts) -> HloFacts:
    return replace(facts, kernels=facts.kernels[1:])


def one_too_many(facts: HloFacts) -> HloFacts:
    return replace(facts, kernels=(*facts.kernels, replace(facts.kernels[0], instruction="two")))


def other_bytes(facts: HloFacts) -> HloFacts:
    first = facts.kernels[0]
    other = replace(first, operand_bytes=tuple(2 * n for n in first.operand_bytes))
    return replace(facts, kernels=(other, *facts.kernels[1:]))


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("fault", [without_one, one_too_many, other_bytes])
def test_a_kernel_of_attention_that_is_not_as_planned_fails_the_audit(
    compiled: tuple[Plan, HloFacts], fault: Callable[[HloFacts], HloFacts]
) -> None:
    plan, facts = compiled
    found = held(plan, fault(facts))
    assert not found.ok and not found.collectives_ok and not found.flops_equal


@pytest.mark.tpu_compiler
def test_a_loop_in_the_kernels_place_fails_the_audit(compiled: tuple[Plan, HloFacts]) -> None:
    _, facts = compiled
    found = held(planned(Collectives.asked()), facts)
    assert not found.collectives_ok and not found.flops_equal
