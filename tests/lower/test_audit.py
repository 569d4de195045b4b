"""The audit finds what the compiler did, and notices a plan that lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from models import gpt
from neocc.backends.target import Target, compile_for_target
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import GATHERED, Audit, Finding, Hiding, audit, hiding, pair
from neocc.lower.hlo import Collective as Compiled
from neocc.lower.hlo import HloFacts, axes_of
from neocc.nn import Experts
from neocc.passes.layout.rules import experts
from neocc.passes.plan import Collective, Plan, make_plan

pytestmark = pytest.mark.tpu_compiler
SMALL = replace(gpt.PRESETS["tiny"], embd=64, batch=8, vocab=100, dtype="bf16", layers=3)


@pytest.fixture(scope="module")
def compiled() -> tuple[Plan, Target]:
    pytest.importorskip("libtpu")
    layout = "batch:x,heads:y,mlp:y,vocab:y"
    plan = make_plan(gpt.train_step(SMALL), Mesh.parse("2x4"), chip("v5e"), layout)
    return plan, compile_for_target(plan)


def held(plan: Plan, target: Target) -> Audit:
    return audit(plan, target.hlo, target.peak, target.reserved)


def test_every_collective_of_a_real_program_is_in_the_plan_and_the_reverse(compiled):
    plan, target = compiled
    found = held(plan, target)
    assert found.collectives_ok, [f for f in found.findings if not f.ok]
    assert found.flops_equal and found.planned_flops > 0
    planned = [c for c in plan.collectives if c.kind != "slice"]
    assert sorted(f.planned.id for f in found.findings if f.planned) == sorted(
        c.id for c in planned
    )
    assert any(f.planned and f.planned.count == 3 for f in found.findings)


@pytest.mark.slow
def test_scores_of_one_tile_that_are_made_again_are_made_twice_as_planned():
    """In the gradient, and before it where attention is computed again beside it."""
    pytest.importorskip("libtpu")
    c = replace(SMALL, layers=4, attention=((("global", "local"), 2),), window=8, recompute=True)
    c = replace(c, embd=256, heads=2, seq=256, batch=16)
    plan = make_plan(gpt.train_step(c), Mesh.parse("2x2"), chip("v5e"), "batch:x,batch:y")
    found = held(plan, compile_for_target(plan))
    assert found.flops_equal and found.planned_flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("batch:x,batch:y,experts:y", {"y"}),
        ("batch:x,experts:x,expert_hidden:y", set()),  # two ways: gathers are as fast
        ("batch:x,experts:y", set()),
    ],
)
def test_tokens_travel_to_experts_by_the_all_to_alls_of_the_plan(layout: str, axes: set[str]):
    pytest.importorskip("libtpu")
    c = replace(SMALL, layers=4, moe_layers=(1, 3), experts=Experts(8, 256, group=64))
    c = replace(c, embd=128, batch=16, seq=128, recompute=False)
    plan = make_plan(gpt.train_step(c), Mesh.parse("2x4"), chip("v5e"), layout)
    found = held(plan, compile_for_target(plan))
    assert found.collectives_ok, [f for f in found.findings if not f.ok]
    assert found.flops_equal
    sent = [f for f in found.findings if f.planned and f.planned.kind == "all_to_all"]
    loops = [f for f in sent if f.planned and f.planned.count == 2]
    assert {f.planned.axis for f in loops if f.planned} == axes and len(loops) >= 4 * len(axes)
    assert all(f.compiled and f.compiled.kind == "all-to-all" for f in sent)


@pytest.mark.slow
def test_gathers_of_weights_run_beside_products_and_scatters_of_their_gradients_do_not():
    pytest.importorskip("libtpu")
    c = replace(SMALL, embd=256, heads=2, seq=256, vocab=256, layers=4, recompute=False)
    mesh = Mesh.parse("2x2")
    fsdp = next(e.rules for e in experts(mesh) if e.name == "FSDP")
    plan = make_plan(gpt.train_step(c), mesh, chip("v5p"), rules=fsdp)
    hiding = held(plan, compile_for_target(plan)).hiding
    gathers, scatters = hiding["all_gather"], hiding["reduce_scatter"]
    assert gathers.beside > 0.9 * gathers.planned > 0
    assert scatters.planned > 0 and scatters.beside == 0


def without_largest(collectives: list[Collective]) -> list[Collective]:
    largest = max(collectives, key=lambda c: c.bytes)
    return [c for c in collectives if c is not largest]


def with_one_made_up(collectives: list[Collective]) -> list[Collective]:
    return [*collectives, replace(collectives[0], id=10**6, bytes=12, result_bytes=12)]


def with_other_axis(collectives: list[Collective]) -> list[Collective]:
    first = next(c for c in collectives if c.count > 1)
    other = replace(first, axis="x" if first.axis == "y" else "y", id=10**6)
    return [other if c is first else c for c in collectives]


def with_other_bytes(collectives: list[Collective]) -> list[Collective]:
    largest = max(collectives, key=lambda c: c.bytes)
    other = replace(largest, bytes=largest.bytes + 4)
    return [other if c is largest else c for c in collectives]


@pytest.mark.parametrize(
    "lie", [without_largest, with_one_made_up, with_other_axis, with_other_bytes]
)
def test_a_plan_that_lies_about_a_collective_fails(
    compiled, lie: Callable[[list[Collective]], list[Collective]]
):
    plan, target = compiled
    collectives = [c for c in plan.collectives if c.kind != "slice"]
    found = held(replace(plan, collectives=tuple(lie(collectives))), target)
    assert not found.collectives_ok and not found.ok


def test_what_hides_is_told_by_kind_and_by_the_share_of_its_bytes(compiled):
    """A transfer that is two in the program, one of them beside a product."""
    plan, target = compiled
    first = next(c for c in plan.collectives if c.kind == "all_reduce" and c.hideable)
    whole = next(f.compiled for f in held(plan, target).findings if f.planned is first)
    assert whole is not None
    named = f"jit(f)/neocc.all_reduce.{first.id}/psum"
    half = replace(whole, operand_bytes=whole.operand_bytes // 2, op_name=named)
    only = replace(plan, collectives=(first,))
    for flops, share in ((0, 0.0), (8, 0.5)):
        parts = [
            Finding(first, half, "", True),
            Finding(None, replace(half, beside=flops), "", True),
        ]
        found = hiding(only, parts)
        assert found == {"all_reduce": Hiding(first.behind, share * first.behind)}


def sum_of(first: Collective, size: int, groups: tuple[tuple[int, ...], ...]) -> Compiled:
    """An all-reduce of so many bytes that the compiler added of its own."""
    return Compiled(
        kind="all-reduce",
        instruction="all-reduce.1",
        computation="main",
        dtype="f32",
        result_dtype="f32",
        operand_shape=(size // 4,),
        result_shape=(size // 4,),
        operand_bytes=size,
        result_bytes=size,
        groups=groups,
        reduction="add",
        trip_count=first.count,
        op_name="",
        written_as=None,
        fused=False,
        conditional=False,
    )


def verdicts_of(plan: Plan, planned: list[Collective], c: Compiled) -> list[tuple[str, bool]]:
    facts = HloFacts("m", 8, (c,), (), (), 0)
    return [(f.verdict, f.ok) for f in pair(replace(plan, collectives=tuple(planned)), facts)]


def test_a_gather_that_became_a_sum_of_pieces_is_named(compiled):
    """Of a vector in pieces that are no whole number of lanes long."""
    plan, _ = compiled
    first = next(c for c in plan.collectives if c.kind == "all_reduce")
    pieces = {"bytes": 3144 * 4, "result_bytes": 4 * 3144 * 4}
    gather = replace(first, kind="all_gather", axis="y", **pieces)
    one = sum_of(gather, gather.result_bytes, ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert verdicts_of(plan, [gather], one) == [(GATHERED, True)]
    other = replace(one, operand_bytes=gather.bytes)
    assert not any(ok for _, ok in verdicts_of(plan, [gather], other))


def test_sums_along_two_axes_that_became_one_over_both_are_named(compiled):
    plan, _ = compiled
    first = next(c for c in plan.collectives if c.kind == "all_reduce")
    planned = [replace(first, id=i, axis=axis) for i, axis in enumerate("xy")]
    sizes, groups = plan.mesh.sizes, (tuple(range(plan.mesh.size)),)
    one = sum_of(first, first.bytes, groups)
    assert axes_of(groups, sizes) == (0, 1)

    assert verdicts_of(plan, planned, one) == [("one sum over x and y", True)] * 2
    other = verdicts_of(plan, planned, replace(one, operand_bytes=first.bytes + 4))
    assert not any(ok for _, ok in other) and len(other) == 3


def test_other_flops_or_memory_fail_the_audit(compiled):
    plan, target = compiled
    assert not held(replace(plan, flops=plan.flops + 2), target).flops_equal
    far = audit(plan, target.hlo, plan.memory.peak * 2, target.reserved)
    assert far.memory_error == pytest.approx(-0.5) and not far.ok
