"""Kernels of a TPU's own in a compiled step are those of the plan, and a fault is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.forced_algorithms import SMALL
from models import gpt
from neocc.backends import backend
from neocc.backends.target import compile_for_target
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import Finding, pair
from neocc.lower.hlo import HloFacts, Kernel
from neocc.lower.jax import lower
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.plan import Plan, make_plan
from tests.lower.collectives.devices import QUICK

pytestmark = pytest.mark.tpu_compiler
RULES = tensor_parallel(Mesh.parse("2x4"))[1].rules
KINDS = ("all_gather", "reduce_scatter", "all_reduce")


@pytest.fixture(scope="module")
def compiled() -> tuple[Plan, HloFacts]:
    pytest.importorskip("libtpu")
    asked = Collectives.asked(forced=[f"{kind}=dma" for kind in KINDS])
    step, mesh = gpt.train_step(SMALL), Mesh.parse("2x4")
    plan = make_plan(step, mesh, chip("v5e"), rules=RULES, collectives=asked)
    return plan, backend("tpu").read(compile_for_target(plan).hlo)


def found(plan: Plan, facts: HloFacts) -> list[Finding]:
    return pair(plan, facts, backend("tpu").calls)


def test_every_collective_that_is_to_be_a_kernel_is_one(compiled: tuple[Plan, HloFacts]) -> None:
    plan, facts = compiled
    rows = [c for c in plan.collectives if c.kind != "slice"]
    assert {(c.kind, c.algorithm) for c in rows} == {(kind, "dma") for kind in KINDS}
    assert {c.count for c in rows} == {1, 2} and {c.axis for c in rows} == {"x", "y"}
    findings = found(plan, facts)
    assert [f for f in findings if f.planned] and all(f.ok for f in findings)
    assert {f.planned for f in findings if f.planned} == set(rows)
    assert {f.verdict for f in findings} == {"by dma, a kernel as planned"}
    assert {f.compiled for f in findings} == set(facts.kernels)  # an all-reduce is two


def first(facts: HloFacts) -> Kernel:
    return next(k for k in facts.kernels if k.trip_count > 1)


def one_missing(facts: HloFacts) -> HloFacts:
    return replace(facts, kernels=tuple(k for k in facts.kernels if k is not first(facts)))


def changed(to: Callable[[Kernel], Kernel]) -> Callable[[HloFacts], HloFacts]:
    def other(facts: HloFacts) -> HloFacts:
        kernels = (to(k) if k is first(facts) else k for k in facts.kernels)
        return replace(facts, kernels=tuple(kernels))

    return other


def one_too_many(facts: HloFacts) -> HloFacts:
    return replace(facts, kernels=(*facts.kernels, replace(first(facts), instruction="again")))


def elsewhere(k: Kernel) -> Kernel:
    assert k.sent
    pairs = frozenset((a, a) for a, _ in k.sent[0].pairs)
    return replace(k, sent=(replace(k.sent[0], pairs=pairs), *k.sent[1:]))


FAULTS = {
    "missing": one_missing,
    "one too many": one_too_many,
    "bytes in": changed(lambda k: replace(k, operand_bytes=(k.operand_bytes[0] + 4,))),
    "bytes out": changed(lambda k: replace(k, result_bytes=(4, *k.result_bytes[1:]))),
    "runs": changed(lambda k: replace(k, trip_count=1)),
    "name": changed(lambda k: replace(k, name="another")),
    "of no op": changed(lambda k: replace(k, op_name="")),
    "a message less": changed(lambda k: replace(k, sent=(k.sent or ())[1:])),
    "a message to another": changed(elsewhere),
    "not read": changed(lambda k: replace(k, sent=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_not_as_planned_fails_the_audit(
    compiled: tuple[Plan, HloFacts], fault: str
) -> None:
    plan, facts = compiled
    other = FAULTS[fault](facts)
    assert other != facts
    assert any(not f.ok for f in found(plan, other))


def test_kernels_that_no_plan_has_fail_the_audit(compiled: tuple[Plan, HloFacts]) -> None:
    plan, facts = compiled
    plain = make_plan(gpt.train_step(SMALL), plan.mesh, plan.chip, rules=RULES)
    bad = [f for f in found(plain, facts) if not f.ok]
    assert {f.compiled for f in bad} >= set(facts.kernels)


def test_permutes_in_a_kernels_place_fail_the_audit(compiled: tuple[Plan, HloFacts]) -> None:
    """Elsewhere than on a TPU they are what is planned, where the processor has such."""
    plan, _ = compiled
    lowered = lower(plan.partitioned)
    text = lowered.function.lower(*lowered.shape_structs()).compile(QUICK).as_text() or ""
    facts = backend("cpu").read(text)
    dma = [c for c in plan.collectives if c.algorithm == "dma"]
    by = {f.planned: f for f in pair(plan, facts) if f.ok}
    exact = [c for c in dma if c in by and by[c].verdict.startswith("by dma, ")]
    assert exact == [c for c in dma if c.itemsize == 4]  # it has no permutes of bf16
    bad = {f.planned for f in found(plan, facts) if not f.ok}
    assert bad >= set(dma)
