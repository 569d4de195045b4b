"""What else a plan could have decided: forced, solved again, and never better than the proof."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.alternatives import Place, alternatives, closed, derived
from neocc.passes.partition import verify_partitioned
from neocc.passes.plan import Plan, make_plan
from tests.passes.layout import programs as small

MESH = Mesh.parse("4")
V5E = chip("v5e")


def plan_of(name: str, layout: str = "") -> tuple[Plan, float]:
    """A plan, costed again as what is asked about has to be, and the bound that was proved,
    less what ties count for."""
    plan = make_plan(getattr(small, name)(), MESH, V5E, layout)
    ties = plan.solution.objective - plan.timeline.step
    return closed(plan), plan.solution.bound - ties


@given(st.data())
@settings(max_examples=4)
def test_no_alternative_is_better_than_the_proof(data: st.DataObject) -> None:
    plan, bound = plan_of(data.draw(st.sampled_from(["mlp", "residual", "layers", "kept_or_not"])))
    ops = [op for op in plan.program.body.walk() if op.kind in ("einsum", "tanh")]
    op = data.draw(st.sampled_from(ops))
    found = alternatives(plan, Place(op=op), 3.0, bound)
    (chosen,) = [a for a in found if a.chosen]
    assert chosen.option == plan.assignment.strategies[op]
    assert chosen.local is not None and chosen.local.timeline == plan.timeline
    assert chosen.local.memory == plan.memory
    assert len({a.option for a in found}) == len(found) > 1
    for a in found:
        for made in (a.local, a.solved):
            if made is not None:
                assert made.assignment.strategies[op] == a.option
                assert made.timeline.step >= bound - 1e-8
                verify_partitioned(made.partitioned, made.program)
        if a.local is not None and a.solved is not None:
            # What is solved again is at least as good as what only has that one thing changed.
            assert a.solved.timeline.step <= a.local.timeline.step + 1e-6


def test_how_an_input_is_stored_may_be_otherwise():
    plan, _ = plan_of("shared_input")
    info = plan.program.inputs[1]
    found = alternatives(plan, Place(stored=info), 3.0)
    assert sum(a.chosen for a in found) == 1
    for a in found:
        assert a.best is not None
        lies = a.best.partitioned.program.input_value(info.name).type.layout
        assert lies == a.option


def test_without_time_the_others_have_bounds_only():
    plan, bound = plan_of("mlp")
    op = plan.program.body.ops[0]
    found = alternatives(plan, Place(op=op), 0.0, bound)
    assert all(a.solved is None for a in found)
    assert all(a.bound == bound <= a.best.timeline.step + 1e-8 for a in found if a.best)


def test_a_layout_that_was_given_stays_when_the_rest_is_solved_again():
    plan, _ = plan_of("layers", "batch:x")
    op = next(op for op in plan.program.body.walk() if op.kind == "einsum")
    for a in alternatives(plan, Place(op=op), 3.0):
        if a.solved is not None and a.option.axes[0] == "batch":
            every = a.solved.assignment.strategies.items()
            assert all(s.axes[0] == "batch" for o, s in every if o.result.type.has("batch"))


@pytest.mark.parametrize("name", ["mlp", "trained", "embedding", "kept_or_not"])
def test_a_derived_plan_has_the_same_figures(name: str):
    plan = make_plan(getattr(small, name)(), MESH, V5E)
    found = derived(plan)
    assert found.timeline == plan.timeline
    assert found.collectives == plan.collectives
    assert found.memory == plan.memory
