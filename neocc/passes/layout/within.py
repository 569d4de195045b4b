"""The fastest assignment within a device's memory.

A row keeps one point of the program within what there is; rows are added for points that solutions
overfill. Prices of the rows give a bound, an assignment that fits, and few options to search with
the rows as hard limits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import numpy as np

from neocc.ir.errors import NeoccError
from neocc.ir.program import Op
from neocc.passes.layout.bound import Prices, Relaxation
from neocc.passes.layout.branch import solve_apart
from neocc.passes.layout.memory import Memory, Point, limit, peak, points
from neocc.passes.layout.objective import MICRO, Limit
from neocc.passes.layout.prices import improve, value
from neocc.passes.layout.problem import Problem
from neocc.passes.layout.solve import MARGIN, Infeasible, Solution, floor, solve

PATIENCE = 4.0  # where no plan within so many times the fastest one's step fits, none is sought
TOLERANCE = 1e-6  # a gap, as a share of the step, that counts as none
DEARER = (1.01, 1.5, 4.0, 16.0)  # times the best price that are tried until a solution fits
LIKELY_PRICE = 0.15  # fastest steps that the whole memory costs where it is short
LITTLE = 64.0  # fastest steps that the whole memory costs where nothing fits


class Rows:
    """Limits of the points that have overfilled so far."""

    def __init__(self, problem: Problem, available: float):
        self.problem = problem
        self.available = available
        self.limits: dict[Op, Limit] = {}

    @cached_property
    def points(self) -> dict[Op, Point]:
        return {point.op: point for point in points(self.problem)}

    def measure(self, solution: Solution) -> tuple[Memory, bool]:
        """A solution's memory, and whether it overfills a point that had no row: it has now."""
        memory, op = peak(self.problem, solution)
        if memory.peak <= self.available or op in self.limits:
            return memory, False
        self.limits[op] = limit(self.problem, self.points[op], self.available)
        return memory, True

    @property
    def all(self) -> list[Limit]:
        return list(self.limits.values())


def bound_within(relaxation: Relaxation, available: float, enough: float) -> float:
    """Seconds below which no assignment is that fits ``available`` bytes, found without solving;
    one that passes ``enough`` need be no better. ``relaxation``: of the problem without limits,
    settled."""
    bound = value(relaxation, True) / MICRO
    if bound >= enough:
        return bound
    rows = Rows(relaxation.problem, available)
    if not rows.measure(likely(relaxation))[1]:
        return bound
    # A price of memory that is likely, before the best one.
    priced = Relaxation(relaxation.problem, rows.all, Prices({}, [LIKELY_PRICE * bound * MICRO]))
    priced.messages.settle()
    bound = max(bound, value(priced, True) / MICRO)
    if bound >= enough:
        return bound
    improve(priced, rows.all, None, MARGIN, math.inf, enough * MICRO)
    return max(bound, value(priced, True) / MICRO)


def likely(relaxation: Relaxation) -> Solution:
    """What adds nothing to the bound, each by itself: near the best assignment, if none itself."""
    problem = relaxation.problem
    options = relaxation.messages.cheapest()[: len(problem.choices)]
    picked = dict(zip(problem.choices, options, strict=True))
    nothing = np.zeros(0)
    return Solution(problem.assignment(picked, {}), picked, 0.0, 0.0, 0.0, nothing, 0, 0)


def seems_to_fit(relaxation: Relaxation, available: float) -> bool:
    """Whether the fastest assignment may well fit."""
    return peak(relaxation.problem, likely(relaxation))[0].peak <= available


def solve_within(
    problem: Problem, available: float, seconds: float, fastest: Solution | None = None
) -> tuple[Solution, Memory]:
    """The fastest assignment whose every point holds at most ``available`` bytes; or, where it is
    proved that none within ``PATIENCE`` times the fastest step does, one that holds little.
    The search with hard limits runs for at most ``seconds``. ``fastest``: in any memory."""
    rows = Rows(problem, available)
    fastest = fastest or solve(problem)
    memory, _ = rows.measure(fastest)
    if memory.peak <= available:
        return fastest, memory
    enough, bound = PATIENCE * fastest.objective, fastest.bound
    best: tuple[Solution, Memory] | None = None
    price = TOLERANCE * fastest.objective
    while seconds > 0:
        relaxation = floor(problem, rows.all, enough)
        prices = relaxation.prices
        bound = max(bound, value(relaxation, True) / MICRO)
        if bound > enough:
            return holds_little(problem, rows, LITTLE * fastest.objective)
        price = max(sum(prices.limits) / MICRO, price)
        try:
            found = solve_apart(problem, rows.all, relaxation, enough, seconds)
            if found is None:
                relaxation.price(prices, {})
                relaxation.settle()
                found = solve(problem, rows.all, time_limit=seconds, relaxation=relaxation)
        except Infeasible:
            return holds_little(problem, rows, LITTLE * fastest.objective)
        except NeoccError:
            break  # none was found in time
        seconds -= found.seconds
        bound = max(bound, found.bound)
        memory, _ = rows.measure(found)
        if memory.peak <= available:
            best = found, memory
            break
    # Memory with a price is no limit: there is always an assignment, if not the best.
    best = best or first_to_fit(problem, rows, price)
    best = best or holds_little(problem, rows, LITTLE * fastest.objective)
    if best[1].peak > available:
        raise NeoccError(
            "no layout was found that fits the memory of a device, and none was proved not to be"
        )
    return replace(best[0], bound=min(bound, best[0].objective)), best[1]


def first_to_fit(problem: Problem, rows: Rows, price: float) -> tuple[Solution, Memory] | None:
    """The best assignment, memory priced at ``price`` seconds or a little more, that fits."""
    for factor in DEARER:
        found, memory = priced(problem, rows, factor * price)
        if memory.peak <= rows.available:
            return found, memory
    return None


def holds_little(problem: Problem, rows: Rows, price: float) -> tuple[Solution, Memory]:
    """An assignment for which memory is dear."""
    return priced(problem, rows, price, prove=False)


def priced(
    problem: Problem, rows: Rows, price: float, prove: bool = True
) -> tuple[Solution, Memory]:
    """The best assignment where memory has a price, with rows for all that it overfills."""
    while True:
        found = solve(problem, rows.all, memory_price=price, prove=prove)
        memory, added = rows.measure(found)
        if not added:
            return found, memory
