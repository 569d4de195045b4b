"""Cost a layout that somebody chose, with the cost model that the planner solves with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from neocc.cost.algorithms import FORMULAS
from neocc.cost.choice import check_kernel
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Input, Op, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.decisions import Decisions, assign
from neocc.passes.layout.algebra import Assignment, Boundary, Move, Strategy, op_layouts
from neocc.passes.layout.build import build
from neocc.passes.layout.memory import peak
from neocc.passes.layout.notation import layout_text
from neocc.passes.layout.problem import Choice, Problem, Rules
from neocc.passes.layout.rules import given_layout
from neocc.passes.layout.solve import Solution
from neocc.passes.names import Names, program_names
from neocc.passes.partition.reshard import Allowed, reshard_tree
from neocc.passes.partition.verify import verify_partitioned
from neocc.passes.plan import Plan, Ready, costed
from neocc.passes.remat import decide


@dataclass(frozen=True)
class Recosted:
    """A plan of given decisions. rerouted: values, by region and name, whose recorded moves do not
    lead from how they are made to how they are wanted, and that take the cheapest way instead."""

    plan: Plan
    rerouted: tuple[str, ...]


def recost(ready: Ready, given: Decisions, available: float) -> Recosted:
    """Checks decisions and costs them; ``available``: bytes that a device may hold.

    The figures of decisions that no one changed are the planner's own, to the bit: the same
    problem is built, and its options are picked instead of solved for.

    Raises:
        LayoutError: a decision is not legal, or not one that neocc can cost.
    """
    decided = decide(ready.program, given.saved)
    ready = replace(ready, program=decided, products=ready.cost.collectives.products)
    assignment = assign(ready.program, ready.mesh, given)
    used = {name for named in (assignment.algorithms or {}).values() for name in named.values()}
    for f in FORMULAS.values():
        if f.name in used:
            check_kernel(f, ready.chip)
    problem, picked = locate(ready, assignment)
    moves, rerouted = routes(problem, assignment)
    plan = as_given(ready, problem, picked, moves, available, assignment.algorithms)
    verify_partitioned(plan.partitioned, plan.program)
    return Recosted(replace(plan, saved=given.saved), rerouted)


def as_given(
    ready: Ready,
    problem: Problem,
    picked: dict[Choice, int],
    moves: dict[Value, Allowed],
    available: float,
    algorithms: dict[Value, dict[tuple[Layout, Layout], str]] | None = None,
) -> Plan:
    """The plan of an option for each choice; nothing is proved of it. ``algorithms``: as in
    ``Assignment``."""
    nothing = np.zeros(0)
    assignment = replace(problem.assignment(picked, moves), algorithms=algorithms)
    solution = Solution(assignment, picked, 0.0, 0.0, 0.0, nothing, 0, 0)
    memory, _ = peak(problem, solution)
    plan = costed(ready, problem, solution, memory, available)
    found = replace(solution, objective=plan.timeline.step)
    return replace(plan, solution=found, given=True)


def locate(ready: Ready, assignment: Assignment) -> tuple[Problem, dict[Choice, int]]:
    """The problem that an assignment is a solution of, and the option of each choice.

    Raises:
        LayoutError: it is legal, but in no space that neocc costs.
    """
    problem = build(ready.program, ready.mesh, ready.cost, given_layout(ready.given))
    picked, missing = options(problem, assignment)
    if missing is None:
        return problem, picked
    # A decision that the layout's rules forbid, or that parts what a choice holds together:
    # a problem in which each op has the one strategy that it is given.
    args = assignment.boundaries[ready.program.body].args
    stored = dict(zip(ready.program.inputs, args, strict=True))

    def strategy(op: Op, s: Strategy) -> bool:
        return assignment.strategies[op] == s

    def lies(info: Input, type: TensorType, layout: Layout) -> bool:
        return stored[info] == layout

    problem = build(
        ready.program, ready.mesh, ready.cost, Rules(strategy, lies, rings=lambda op: True)
    )
    picked, missing = options(problem, assignment)
    if missing is not None:
        raise LayoutError(f"{missing}: what the plan decides is legal, but neocc cannot cost it")
    return problem, picked


def options(problem: Problem, assignment: Assignment) -> tuple[dict[Choice, int], str | None]:
    """Each choice's option in an assignment; and a choice that has none such, if there is one."""
    allowed = {c: set(range(len(c.options))) for c in problem.choices}
    for choice in problem.choices:
        for op, made in choice.strategies.items():
            wanted = assignment.strategies[op]
            allowed[choice] &= {i for i, s in enumerate(made) if s == wanted}
    for region, (args, outputs) in problem.boundaries.items():
        boundary = assignment.boundaries[region]
        for end, layout in zip((*args, *outputs), (*boundary.args, *boundary.outputs), strict=True):
            allowed[end.choice] &= {i for i, lies in enumerate(end.layouts) if lies == layout}
    picked = {c: min(found) for c, found in allowed.items() if found}
    return picked, next((c.name for c, found in allowed.items() if not found), None)


def routes(
    problem: Problem, assignment: Assignment
) -> tuple[dict[Value, Allowed], tuple[str, ...]]:
    """The moves of every value that does not lie as all its readers want it: the assignment's
    own where these lead there, else the cheapest; and the names of the latter values.

    Raises:
        LayoutError: no moves lead from how a value is made to how an op wants it.
    """

    def arcs(layout: Layout, type: TensorType) -> list[tuple[float, Move]]:
        found = problem.moves_from(layout, type)
        return [(problem.move_seconds(m, type) + 1e-12, m) for m in found]

    mesh = problem.mesh
    recorded = assignment.moves or {}
    moves: dict[Value, Allowed] = {}
    rerouted: list[str] = []
    for names in program_names(problem.program):
        labels = {v: name for name, v in names.values.items()}
        for value, made, wanted in needs(names, assignment):
            own = recorded.get(value)
            try:
                tree = reshard_tree(value.type, made, wanted, arcs, own or frozenset())
            except LayoutError:
                tree = None
            if tree is None:
                label = f"{names.body.name}: {labels[value]!r}"
                try:
                    tree = reshard_tree(value.type, made, wanted, arcs)
                except LayoutError:
                    raise LayoutError(f"{label} {stuck(made, wanted, mesh)}") from None
                if own:
                    rerouted.append(label)
            if tree:
                moves[value] = frozenset((m.source, m.target) for m in tree.values())
    return moves, tuple(rerouted)


def stuck(made: Layout, wanted: Iterable[Layout], mesh: Mesh) -> str:
    """Why no moves lead from one layout to others: only ever to partial sums."""
    partial = [w for w in wanted if w.partial_axes and w != made]
    asked = " and ".join(repr(layout_text(w, mesh)) for w in partial)
    return (
        f"lies as {layout_text(made, mesh)!r}, and an op that passes a partial sum on asks for "
        f"{asked} of it: nothing makes a partial sum of what is reduced; cut that op instead"
    )


def needs(names: Names, assignment: Assignment) -> Iterable[tuple[Value, Layout, list[Layout]]]:
    """Of each value of a region: how it is made, and each way that it is wanted, in order."""
    region = names.body.region
    boundary = assignment.boundaries[region]
    made: dict[Value, Layout] = dict(zip(region.args, boundary.args, strict=True))
    wanted: dict[Value, dict[Layout, None]] = {v: {} for v in region.args}

    def want(values: Iterable[Value], layouts: Iterable[Layout]) -> None:
        for value, layout in zip(values, layouts, strict=True):
            wanted[value][layout] = None

    for op in region.ops:
        takes, gives = layouts_of(op, assignment.strategies, assignment.boundaries)
        want(op.operands, takes)
        made.update(zip(op.results, gives, strict=True))
        wanted.update((v, {}) for v in op.results)
    want(region.outputs, boundary.outputs)
    for value, layout in made.items():
        yield value, layout, list(wanted[value])


def layouts_of(
    op: Op, strategies: Mapping[Op, Strategy], boundaries: Mapping[Region, Boundary]
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """How an op takes its operands and makes its results; a repeat's are its region's boundary."""
    if op.kind == "repeat":
        boundary = boundaries[op.regions[0]]
        return boundary.args, boundary.outputs
    return op_layouts(op, strategies[op])
