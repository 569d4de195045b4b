"""Collectives go inside products where the step becomes shorter, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.algorithms import PRODUCTS
from neocc.cost.choice import STANDARD_ONLY, Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.overlap import overlapped
from neocc.passes.partition.verify import verify_partitioned
from neocc.passes.plan import Collective, Plan, make_plan, timeline

WIDE = replace(gpt.PRESETS["gpt3-175b"], layers=2, batch=16, vocab=50304, recompute=False)
MESH = Mesh.parse("8x16")
AUTO = Collectives()


def tensor(
    config: gpt.Config, collectives: Collectives, axis: int = 0, target: str = "v5p"
) -> Plan:
    rules = tensor_parallel(MESH)[axis].rules
    program = gpt.train_step(config)
    return make_plan(program, MESH, chip(target), rules=rules, collectives=collectives)


@pytest.fixture(scope="module")
def plain() -> Plan:
    return tensor(WIDE, STANDARD_ONLY)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tensor(WIDE, AUTO)


def inside(plan: Plan) -> list[Collective]:
    return [c for c in plan.collectives if c.inside]


def test_products_hide_gathers_and_scatters_of_activations(plain: Plan, plan: Plan) -> None:
    found = inside(plan)
    assert {c.kind for c in found} == {"all_gather", "reduce_scatter"}
    assert {c.axis for c in found} == {"x"} and all(c.dim == "seq" for c in found)
    assert plan.timeline.step < plain.timeline.step
    assert plan.timeline.exposed < 0.8 * plain.timeline.exposed
    assert all(c.algorithm == PRODUCTS and c.standard > 0 for c in found)
    same = [(c.id, c.kind, c.bytes, c.standard) for c in plan.collectives]
    assert same == [(c.id, c.kind, c.bytes, c.standard) for c in plain.collectives]
    verify_partitioned(plan.partitioned, plan.program)


def test_each_one_by_itself_makes_the_step_shorter(plan: Plan) -> None:
    for i, c in enumerate(plan.collectives):
        if c.inside:
            rows = list(plan.collectives)
            rows[i] = replace(c, inside=None, seconds=c.standard)
            without = timeline(plan.problem, plan.solution, rows)
            assert without.step > plan.timeline.step


def test_none_goes_inside_where_nothing_is_gained() -> None:
    few = replace(gpt.PRESETS["gpt2-medium"], layers=2, batch=16, recompute=False)
    assert not inside(tensor(few, AUTO))


def test_none_goes_inside_where_the_compiler_runs_permutes_at_once() -> None:
    assert not inside(tensor(WIDE, AUTO, target="v5e"))


def test_all_that_can_go_inside_when_that_is_asked_for() -> None:
    few = replace(gpt.PRESETS["gpt2-medium"], layers=2, batch=16, recompute=False)
    asked = Collectives.asked(forced=["all_gather=products"])
    found = inside(tensor(few, asked, target="v5e"))
    assert {c.kind for c in found} == {"all_gather"} and len(found) > 2


@pytest.mark.slow
def test_tensor_parallel_layouts_are_tried_for_what_their_products_hide() -> None:
    program = gpt.train_step(WIDE)
    best = make_plan(program, MESH, chip("v5p"))
    plan = overlapped(make_plan(program, MESH, chip("v5p"), collectives=AUTO))
    assert inside(plan) and plan.timeline.step < best.timeline.step
    assert plan.solution.bound == best.solution.bound
    verify_partitioned(plan.partitioned, plan.program)
