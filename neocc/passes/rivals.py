"""What experts would do in a plan's place; where nothing is proved, the best of it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from neocc.ir.errors import NeoccError
from neocc.passes.layout.problem import Rules
from neocc.passes.layout.rules import experts
from neocc.passes.layout.within import TOLERANCE
from neocc.passes.plan import Plan, make_plan

NEAR = 1.15  # times the memory that a fastest layout needs before more parts are tried instead
HOPELESS = 2.0  # the same where there are no more parts


def restricted_plan(
    plan: Plan, counts: Sequence[int], rules: Rules | None = None, layout: str = ""
) -> Plan:
    """The fastest plan that fits of those that an expert's rules, or a layout, allow on a plan's
    mesh and wires, with the batch in as few of ``counts`` parts as let it fit; where none does,
    one that does not.

    Raises:
        LayoutError: the rules leave an op no strategy, or the layout is none of the model's.
        NeoccError: no layout was found that fits, and none proved not to be.
    """

    def planned(memory: float, count: int) -> Plan:
        made = make_plan(
            plan.ready.source,
            plan.mesh,
            plan.chip,
            layout,
            rules,
            memory,
            plan.topology,
            count,
            collectives=plan.ready.cost.collectives,
        )
        return replace(made, memory_limit=plan.memory_limit)

    def fitted(count: int, near: float) -> Plan:
        made = planned(math.inf, count)
        # Its layouts are some of those that the plan was chosen from: if none of all fits, none.
        if plan.fits and not made.fits and made.memory.peak <= near * plan.memory_limit:
            made = planned(plan.memory_limit, count)
        return made

    *fewer, most = counts
    for count in fewer:
        if (made := fitted(count, NEAR)).fits:
            return made
    return fitted(most, HOPELESS)


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
            yield restricted_plan(plan, counts, expert.rules)
        except NeoccError:  # the model leaves the expert no strategy
            continue
