"""Experts' plans, and that a plan which is not proved the fastest is at least as fast as theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.layout.rules import experts
from neocc.passes.plan import Plan, make_plan
from neocc.passes.rivals import NEAR, no_slower, restricted_plan

SMALL = replace(gpt.PRESETS["gpt3-xl"], layers=2, batch=128, vocab=2048, recompute=True)
MESH = Mesh.parse("2x4")
NAMED = {e.name: e for e in experts(MESH)}


@pytest.fixture(scope="module")
def slow() -> Plan:
    """What a search might have at the end of its time: Megatron's, and a bound far below."""
    found = make_plan(gpt.train_step(SMALL), MESH, chip("v5e"), rules=NAMED["Megatron on x"].rules)
    bound = 0.5 * found.solution.objective
    return replace(found, solution=replace(found.solution, bound=bound))


def test_an_expert_s_faster_plan_is_taken_where_nothing_is_proved(slow: Plan):
    rivals = [restricted_plan(slow, [1], e.rules) for e in NAMED.values()]
    least = min(r.solution.objective for r in rivals if r.fits)
    found = no_slower(slow, [1])
    assert found.fits and found.solution.objective == least < slow.solution.objective
    assert found.solution.bound == slow.solution.bound and found.solution.gap > 0


def test_a_proved_plan_and_one_under_a_layout_stay(slow: Plan):
    proved = replace(slow, solution=replace(slow.solution, bound=slow.solution.objective))
    asked = replace(slow, ready=replace(slow.ready, layout="batch:y"))
    assert no_slower(proved, [1]) is proved and no_slower(asked, [1]) is asked


def test_an_expert_takes_as_few_parts_as_fit(slow: Plan):
    whole = restricted_plan(slow, [1, 4], NAMED["FSDP"].rules)
    assert whole.ready.microbatches == 1
    parts = restricted_plan(slow, [4], NAMED["FSDP"].rules)
    short = replace(slow, memory_limit=parts.memory.peak)
    assert whole.memory.peak > NEAR * short.memory_limit
    parts = restricted_plan(short, [1, 4], NAMED["FSDP"].rules)
    assert parts.fits and parts.ready.microbatches == 4
    assert parts.memory_limit == short.memory_limit
