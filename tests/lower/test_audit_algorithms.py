"""A step with every algorithm forced in turn: what is compiled is what the algorithm says it sends.

FSDP gathers and scatters, Megatron's layout sums, experts exchange tokens; on simulated devices.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.forced_algorithms import KEYS, planned
from neocc.cost.algorithms import FORMULAS
from neocc.cost.hardware import chip
from neocc.lower.audit import pair
from neocc.lower.hlo import Collective, HloFacts, read_hlo
from neocc.lower.jax import lower
from neocc.passes.plan import Plan
from tests.lower.collectives.devices import QUICK

SOON = {
    ("all_gather", "ring2"),
    ("all_gather", "products"),
    ("all_reduce", "torus"),
    ("all_to_all", "shifts"),
}


def compiled(kind: str, name: str) -> tuple[Plan, HloFacts]:
    # A chip for which f32 stays f32: the CPU has no bf16 permutes.
    plan = planned(kind, name, chip("a100"))
    lowered = lower(plan.partitioned)
    program = lowered.function.lower(*lowered.shape_structs()).compile(QUICK)
    return plan, read_hlo(program.as_text() or "")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(*k, marks=() if k in SOON else pytest.mark.slow, id="-".join(k))
        for k in KEYS
        if not FORMULAS[k].kernel  # tests/lower/test_audit_kernels.py
    ],
)
def test_the_permutes_are_those_of_the_plan(kind: str, name: str) -> None:
    plan, facts = compiled(kind, name)
    asked = [c for c in plan.collectives if (c.kind, c.algorithm) == (kind, name)]
    assert asked
    found = pair(plan, facts)
    assert not [f for f in found if not f.ok]
    by = [f for f in found if f.planned in asked]
    assert len(by) == len(asked) and all(f.verdict.startswith(f"by {name}, ") for f in by)


def test_permutes_that_the_compiler_made_bf16_are_told() -> None:
    """The TPU compiler sends what a product in bf16 reads as that."""
    plan, facts = compiled("all_gather", "ring2")
    first = next(c for c in plan.collectives if c.algorithm == "ring2")

    def narrow(c: Collective) -> Collective:
        if c.kind != "collective-permute" or f"all_gather.{first.id}/" not in c.op_name:
            return c
        return replace(c, dtype="bf16", operand_bytes=c.operand_bytes // 2)

    changed = replace(facts, collectives=tuple(map(narrow, facts.collectives)))
    found = [f for f in pair(plan, changed) if f.planned is first]
    assert [(f.verdict, f.ok) for f in found] == [("by ring2, made bf16, half the bytes", True)]


def test_a_permute_that_is_missing_is_noticed() -> None:
    plan, facts = compiled("all_gather", "ring2")
    gone = next(c for c in facts.collectives if c.kind == "collective-permute")
    lacking = replace(facts, collectives=tuple(c for c in facts.collectives if c is not gone))
    verdicts = [f.verdict for f in pair(plan, lacking) if not f.ok]
    assert "removed" in verdicts or "added" in verdicts
