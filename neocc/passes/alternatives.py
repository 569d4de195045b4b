"""What else a plan could have decided at one place, and what that would have cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from neocc.cost.model import CostModel
from neocc.cost.trace import traced_cost
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import Layout, Strategy
from neocc.ir.program import Input, Op
from neocc.ir.types import TensorType
from neocc.passes.decisions import decisions
from neocc.passes.layout.algebra import Assignment
from neocc.passes.layout.build import build
from neocc.passes.layout.problem import Case, Choice, Problem, Rules
from neocc.passes.layout.rules import given_layout
from neocc.passes.plan import Plan, costed, solve_within
from neocc.passes.recost import as_given, options, recost, routes
from neocc.passes.remat import open_values

SHARE = 0.5  # of the time that is left, which one more search may take


@dataclass(frozen=True)
class Place:
    """One decision of a plan: the strategy of the group that an op is in, or how an input is
    stored."""

    op: Op | None = None
    stored: Input | None = None


@dataclass(frozen=True)
class Alternative:
    """One option at a place.

    chosen: the plan's own. compute: seconds of a step that the group itself takes. moved: seconds
    of a step that all transfers take, hidden ones too, more than in the plan. local: the plan with
    this option, all else as it was and the moves anew; None, with the ``reason``, where no such
    thing is legal. solved: the best plan with this option, the same activations kept and all else
    decided anew; None where that was not tried, and then its step is between ``bound`` and the
    local plan's.
    """

    option: Strategy | Layout
    chosen: bool
    compute: float
    moved: float
    local: Plan | None
    reason: str
    solved: Plan | None
    bound: float

    @property
    def best(self) -> Plan | None:
        """The best plan that is known to have this option."""
        return self.local if self.chosen else self.solved or self.local


def closed(plan: Plan, cost: CostModel | None = None) -> Plan:
    """The same plan, costed again on the program in which what is kept and what is recomputed is
    decided; ``cost``: another cost model."""
    ready = replace(plan.ready, cost=cost or plan.ready.cost)
    given = decisions(plan)
    if not open_values(ready.program):
        given = replace(given, saved={})
    return replace(recost(ready, given, plan.memory_limit).plan, saved=plan.saved)


def derived(plan: Plan) -> Plan:
    """The same plan, each of its figures traced to the fields of ``hardware.json``."""
    return closed(plan, traced_cost(plan.ready.cost))


def alternatives(plan: Plan, place: Place, seconds: float, bound: float = 0.0) -> list[Alternative]:
    """Every option at a place of a ``closed`` plan, the fastest first; the most promising ones
    solved again, for about ``seconds`` in all. ``bound``: of the step of any plan."""
    problem, choice, picked = opened(plan, place)
    before = transfers(plan)
    found = []
    for i, option in enumerate(choice.options):
        if option is None or isinstance(option, Case):
            continue
        chosen = i == picked[choice]
        local, reason = changed(plan, problem, {**picked, choice: i})
        moved = transfers(local) - before if local else 0.0
        made = Alternative(option, chosen, choice.seconds[i], moved, local, reason, None, bound)
        found.append(made)
    found.sort(key=rank)
    deadline = time.monotonic() + seconds
    for i, a in enumerate(found):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        if not a.chosen:
            index = choice.options.index(a.option)
            found[i] = replace(a, solved=solved(plan, place, choice, index, SHARE * left))
    return sorted(found, key=rank)


def rank(a: Alternative) -> tuple[bool, float, bool]:
    """Those whose step is known to be least first; those that cannot be last."""
    return (a.best is None, a.best.timeline.step if a.best else 0.0, not a.chosen)


def transfers(plan: Plan) -> float:
    return sum(c.seconds * c.count for c in plan.collectives)


def opened(plan: Plan, place: Place) -> tuple[Problem, Choice, dict[Choice, int]]:
    """A problem in which the place is free, its choice, and the plan's option of each choice."""
    ready, assignment = plan.ready, plan.solution.assignment
    held = held_together(plan, place)
    args = assignment.boundaries[ready.program.body].args
    stored = dict(zip(ready.program.inputs, args, strict=True))

    def strategy(op: Op, s: Strategy) -> bool:
        return op in held or assignment.strategies[op] == s

    def lies(info: Input, type: TensorType, layout: Layout) -> bool:
        return info == place.stored or bool(held) or stored[info] == layout

    # The whole space where the plan is a point of it; else what its own rules, or it, leave free.
    kept = Rules(strategy, lies)
    for rules in (Rules(), given_layout(ready.given), kept, replace(kept, tied=False)):
        problem = build(ready.program, ready.mesh, ready.cost, rules)
        picked, missing = options(problem, assignment)
        if missing is None:
            return problem, choice_at(problem, place), picked
    raise LayoutError("the plan is in no space whose alternatives neocc can cost")


def held_together(plan: Plan, place: Place) -> frozenset[Op]:
    """The ops that take one strategy with the place's."""
    if place.op is None:
        return frozenset()
    return frozenset(choice_at(plan.problem, place).strategies)


def choice_at(problem: Problem, place: Place) -> Choice:
    if place.op is not None:
        op = place.op
        return next(c for c in problem.choices if op in c.strategies)
    program = problem.program
    args, _ = problem.boundaries[program.body]
    return args[program.inputs.index(place.stored)].choice  # pyright: ignore[reportArgumentType]


def changed(plan: Plan, problem: Problem, picked: dict[Choice, int]) -> tuple[Plan | None, str]:
    """The plan with one option changed, its moves where they still serve; or why there is none."""
    try:
        wanted = problem.assignment(picked, {})
        recorded = plan.solution.assignment.moves
        own = Assignment(wanted.strategies, wanted.boundaries, recorded)
        moves, _ = routes(problem, own)
        return as_given(plan.ready, problem, picked, moves, plan.memory_limit), ""
    except NeoccError as error:
        return None, error.message


def solved(plan: Plan, place: Place, choice: Choice, index: int, seconds: float) -> Plan | None:
    """The best plan in which the place takes an option and the rest is free, under the layout that
    the plan was made under; None where there is none, or none was found in time."""
    ready = plan.ready
    free = given_layout(ready.given)
    forced = {op: made[index] for op, made in choice.strategies.items()}

    def strategy(op: Op, s: Strategy) -> bool:
        return forced[op] == s if op in forced else free.strategy(op, s)

    def lies(info: Input, type: TensorType, layout: Layout) -> bool:
        if info == place.stored and isinstance(option := choice.options[index], Layout):
            return layout == option
        return free.stored(info, type, layout)

    try:
        problem = build(ready.program, ready.mesh, ready.cost, Rules(strategy, lies))
        solution, memory = solve_within(problem, plan.memory_limit, seconds)
    except NeoccError:
        return None
    return costed(ready, problem, solution, memory, plan.memory_limit)
