"""Solve the layout problem exactly: bounds leave few options, a mixed-integer program the best.

A relaxation (``bound``) says what every option and every move adds to a lower bound. The program
(``formulate``) is solved by HiGHS over those that add little; its optimum is an assignment, and
what adds more than that costs is proved to be in no better one. Where too little was taken, the
program is solved again over all that is not ruled out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

from neocc.ir.errors import NeoccError
from neocc.passes.layout.algebra import Assignment
from neocc.passes.layout.bound import Relaxation
from neocc.passes.layout.formulate import Formulation, formulate
from neocc.passes.layout.objective import MICRO, Limit
from neocc.passes.layout.prices import free, improve, value
from neocc.passes.layout.problem import Choice, Flow, Problem
from neocc.passes.layout.prune import Kept, everything, keep

FIRST = 1e-5  # a share of the bound: what adds less is in the first program
LIKELY = 5e-4  # the same where memory is short, or nothing need be proved
STEP = 4.0  # times as much slack has the next program where memory is short
MARGIN = 1e-3  # microseconds: the solver's own tolerance
WORTH = 0.8  # pruning that leaves more of the columns than this is not worth a second program


class Infeasible(NeoccError):
    """No assignment keeps the rules and the memory limits; the CLI exits with 1."""


@dataclass(frozen=True)
class Size:
    """How many options a program has to choose from, and its columns."""

    options: int
    columns: int

    @staticmethod
    def of(kept: Kept) -> Size:
        return Size(kept.option_count, kept.columns)


@dataclass(frozen=True)
class Solution:
    """objective: seconds of the step (and what ties count for); bound: proved lower bound of the
    objective of any assignment that keeps the limits; seconds: time that solving took. ``whole``
    and ``left``: the program's size before and after pruning; columns and rows are of the latter.
    """

    assignment: Assignment
    picked: dict[Choice, int]
    objective: float
    bound: float
    seconds: float
    columns: np.ndarray
    rows: int
    nodes: int
    whole: Size = Size(0, 0)
    left: Size = Size(0, 0)

    @property
    def gap(self) -> float:
        """(objective - bound) / objective: 0 is a proof of optimality."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.bound) / self.objective)


def solve(
    problem: Problem,
    limits: Sequence[Limit] = (),
    memory_price: float | None = None,
    start: Solution | None = None,
    time_limit: float = 60.0,
    prune: bool = True,
    relaxation: Relaxation | None = None,
    prove: bool = True,
    below: float = math.inf,
) -> Solution:
    """The assignment with the least predicted step time, with the solver's bound.

    The limits are hard, or, with ``memory_price``, the fullest point's share of its limit costs
    that many seconds. ``start``: a solution of the same problem that keeps the limits.
    ``time_limit`` in seconds: when it ends, the best assignment so far is returned, with its gap.
    ``prune``: leave out what bounds rule out, which changes no answer. ``relaxation``: one of
    the same limits that is settled and has good prices; options that it rules out are not taken.
    ``prove``: if not, the best of what is likely will do. ``below``: seconds; what costs as much is
    of no use.

    Raises:
        Infeasible: no assignment satisfies the limits, or none costs less than ``below``.
        NeoccError: none was found in time.
    """
    clock = Clock(time_limit)
    every = everything(problem, relaxation.only if relaxation is not None else None)
    price = None if memory_price is None else memory_price * MICRO
    picked = start.picked if start is not None else None
    if not prune:
        whole = solve_kept(problem, limits, price, every, picked, clock)
        return solution(problem, whole, price, whole.bound, every, clock)
    priced = bool(limits)
    if relaxation is None:
        relaxation = Relaxation(problem, limits, free(limits, price))
        relaxation.settle()
        if priced:
            improve(relaxation, limits, price, MARGIN, clock.least)
    bound = proved = value(relaxation, price is None)
    short = bool(limits) and price is None
    slack = (LIKELY if short or not prove else FIRST) * abs(bound) + MARGIN
    found: Found | None = None
    if math.isfinite(below):
        slack = below * MICRO - bound
    while True:
        room = below * MICRO - bound
        if room <= 0:
            raise Infeasible("no better layout fits the memory of a device")
        slack = min(slack, room)
        kept = keep(relaxation, slack, MARGIN)
        if kept.columns > WORTH * every.columns:
            kept, slack = every, math.inf
        try:
            found = solve_kept(problem, limits, price, kept, picked, clock)
        except Infeasible:
            if kept is every or slack >= room:
                raise
            slack *= 10  # what is left has no assignment at all
            continue
        except NeoccError:  # none was found in time
            if found is None:
                raise
            return solution(problem, found, price, min(proved, found.cost), every, clock)
        proved = max(proved, min(found.bound, bound + slack))
        done = found.cost <= bound + slack or slack >= room
        if done or clock.left <= 0 or not prove:
            return solution(problem, found, price, min(proved, found.cost), every, clock)
        picked = found.picked
        if not priced:
            priced = True
            improve(relaxation, limits, price, MARGIN, clock.least)
            bound = value(relaxation, price is None)
            proved = max(proved, bound)
        # Where memory is short the bound may be far off: then the last program is a large one,
        # and a better assignment from one in between makes it smaller.
        step = STEP * slack if short else math.inf
        slack = min(found.cost - bound + MARGIN, step)


def floor(problem: Problem, limits: Sequence[Limit], enough: float) -> Relaxation:
    """The relaxation of all assignments that keep the limits, settled, under the best prices, or
    some for which its value passes ``enough`` seconds."""
    relaxation = Relaxation(problem, limits, free(limits, None))
    relaxation.settle()
    improve(relaxation, limits, None, MARGIN, highspy.kHighsInf, enough * MICRO)
    return relaxation


@dataclass
class Clock:
    """What is left of a time limit, in seconds."""

    limit: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        return self.limit - self.spent

    @property
    def least(self) -> float:
        """What a next step may take: a tenth of the limit even where nothing is left."""
        return max(self.left, self.limit / 10)


@dataclass(frozen=True, eq=False)
class Found:
    """The best of what is left of a program. cost, bound: in microseconds, as the program counts:
    with the price of the fullest point's share of its limit, ``full``."""

    formulation: Formulation
    columns: np.ndarray
    picked: dict[Choice, int]
    cost: float
    bound: float
    nodes: int

    @property
    def full(self) -> float:
        return float(self.columns[self.formulation.fullest])


def solve_kept(
    problem: Problem,
    limits: Sequence[Limit],
    memory_price: float | None,
    kept: Kept,
    picked: dict[Choice, int] | None,
    clock: Clock,
) -> Found:
    """The best assignment of the options and moves that are left, with HiGHS; ``picked``: options
    to start from.

    Raises:
        Infeasible: there is none.
        NeoccError: none was found in time.
    """
    whole: set[Flow] = set()
    while True:
        formulation = formulate(problem, limits, memory_price, kept, whole)
        solver = formulation.model.highs(clock.least)
        if picked is not None:
            chosen = formulation.columns_of(picked)
            solver.setSolution(len(chosen), chosen, np.ones(len(chosen)))
        solver.run()
        bound = solver.getInfo().mip_dual_bound
        if picked is not None and not formulation.model.reached(solver):
            # Presolve of HiGHS 1.16 may map a start onto a better point and then return the start,
            # which is what there is where nothing else is found in time.
            again = formulation.model.highs(clock.least)
            again.run()
            bound = max(bound, again.getInfo().mip_dual_bound)
            solver = again if has_solution(again) else solver
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            raise Infeasible("no layout fits the memory of a device")
        if not has_solution(solver):
            raise NeoccError(
                f"the solver found no layout within {clock.limit:.0f} s "
                f"(status: {solver.modelStatusToString(status)}); raise the time limit"
            )
        columns = np.array(solver.getSolution().col_value)
        picked = formulation.picked(columns)
        # Whole choices nearly always have whole trees; a flow with none gets 0/1 columns.
        split = formulation.split(columns) - whole
        if not split:
            cost = formulation.model.cost_of(columns)
            nodes = max(0, solver.getInfo().mip_node_count)
            return Found(formulation, columns, picked, cost, min(bound, cost), nodes)
        whole |= split


def has_solution(solver: highspy.Highs) -> bool:
    feasible = highspy.SolutionStatus.kSolutionStatusFeasible
    return solver.getInfo().primal_solution_status == int(feasible)


def solution(
    problem: Problem,
    found: Found,
    memory_price: float | None,
    bound: float,
    every: Kept,
    clock: Clock,
) -> Solution:
    """What was found, as an assignment; ``bound``: proved for the whole program. Bound and price
    are in microseconds."""
    used = {
        flow.value: frozenset(
            (m.source, m.target)
            for m, col in zip(a.moves, a.pays, strict=True)
            if found.columns[col] > 1e-6
        )
        for flow, a in found.formulation.arcs.items()
    }
    price = (memory_price or 0.0) / MICRO
    return Solution(
        problem.assignment(found.picked, used),
        found.picked,
        found.cost / MICRO - price * found.full,
        # The fullest point's share is at most 1 where the limits hold: Lagrange's bound.
        bound / MICRO - price,
        clock.spent,
        found.columns,
        len(found.formulation.model.low),
        found.nodes,
        Size.of(every),
        Size.of(found.formulation.kept),
    )
