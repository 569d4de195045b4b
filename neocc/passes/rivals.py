"""What experts would do in a plan's place; where nothing is proved, the best of it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from neocc.ir.errors import NeoccError
from neocc.passes.layout.rules import Expert, experts
from neocc.passes.layout.within import TOLERANCE
from neocc.passes.plan import Plan, make_plan

HOPELESS = 2.0  # an expert whose fastest layout needs this many times the memory has none that fits


def expert_plan(plan: Plan, expert: Expert, counts: Sequence[int]) -> Plan:
    """The fastest plan that an expert's rules allow on a plan's mesh and wires, with the batch in
    as few of ``counts`` parts as let it fit; where even the last does not, and is not hopeless,
    the fastest that does.

    Raises:
        NeoccError: the rules leave an op no strategy.
    """
    limit = plan.memory_limit

    def planned(memory: float, count: int) -> Plan:
        made = make_plan(
            plan.ready.source,
            plan.mesh,
            plan.chip,
            "",
            expert.rules,
            memory,
            plan.topology,
            count,
            collectives=plan.ready.cost.collectives,
        )
        return replace(made, memory_limit=limit)

    made = planned(float("inf"), counts[0])
    for count in counts[1:]:
        if made.fits:
            break
        made = planned(float("inf"), count)
    # Its layouts are some of those that the plan was chosen from: if none of all fits, none.
    if plan.fits and not made.fits and made.memory.peak <= HOPELESS * limit:
        made = planned(limit, counts[-1])
    return made


def no_slower(plan: Plan, counts: Sequence[int]) -> Plan:
    """A plan that was made under no layout, or, where time ran out before it was proved the
    fastest, that of an expert with the batch in one of ``counts`` parts if that is faster."""
    if plan.ready.layout or not plan.fits or plan.solution.gap <= TOLERANCE:
        return plan
    fitting = [made for made in expert_plans(plan, counts) if made.fits]
    best = min([plan, *fitting], key=lambda made: made.solution.objective)
    return replace(best, solution=replace(best.solution, bound=plan.solution.bound))


def expert_plans(plan: Plan, counts: Sequence[int]) -> Iterator[Plan]:
    for expert in experts(plan.mesh, plan.ready.source.dims):
        try:
            yield expert_plan(plan, expert, counts)
        except NeoccError:  # the model leaves the expert no strategy
            continue
