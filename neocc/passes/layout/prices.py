"""Prices of what a relaxation does not decide itself: memory, and communication that stands over.

Any prices give a bound; the best are those of the linear program. That is solved over the options
and moves that matter under the prices so far; its duals are the next prices, under which others
matter, until its value and the bound meet (column generation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import highspy
import numpy as np

from neocc.passes.layout.bound import Prices, Relaxation
from neocc.passes.layout.formulate import Formulation, formulate
from neocc.passes.layout.objective import Limit
from neocc.passes.layout.problem import Problem
from neocc.passes.layout.prune import Kept, keep, union

ROUNDS = 8
CLOSE = 1e-6  # a share of the bound: so near to the linear program's value, prices are good
SHARE = 0.2  # of all options that the first linear program has
MATTERS = 1e-4  # a share of the bound: what adds less under new prices joins the linear program
CAP = 1e3  # how many times the bound the overfill of a whole limit costs, where limits are hard


def free(limits: Sequence[Limit], memory_price: float | None) -> Prices:
    """Where nothing is known: nothing stands over, and the limits share their price evenly."""
    return Prices({}, [(memory_price or 0.0) / len(limits) for _ in limits])


def value(relaxation: Relaxation, hard: bool) -> float:
    """The bound of the objective: Lagrange's, less the prices of limits that are kept to."""
    return relaxation.bound - (sum(relaxation.prices.limits) if hard else 0.0)


def improve(
    relaxation: Relaxation,
    limits: Sequence[Limit],
    memory_price: float | None,
    margin: float,
    time_limit: float,
    enough: float = math.inf,
) -> None:
    """Gives a settled relaxation better prices. ``memory_price`` in microseconds; None where the
    limits are hard. ``enough``: a bound that needs no better one."""
    problem, hard = relaxation.problem, memory_price is None
    best, prices = value(relaxation, hard), relaxation.prices
    most = SHARE * sum(len(c.options) for c in problem.choices) + len(problem.choices)
    kept = keep(relaxation, at_most(relaxation, most), margin)
    elastic = CAP * best if hard else None
    if hard:
        # Some of what holds little is wanted from the start.
        relaxation.price(Prices({}, [best / len(limits) for _ in limits]))
        relaxation.settle()
        kept = union(kept, keep(relaxation, MATTERS * best + margin, margin))
    before = math.inf
    for _ in range(ROUNDS):
        reached, found = duals(problem, limits, memory_price, kept, elastic, time_limit)
        if found is None or before - reached <= CLOSE * abs(reached):
            break
        before = reached
        relaxation.price(found)
        relaxation.settle()
        if (now := value(relaxation, hard)) > best:
            best, prices = now, found
        if best > enough or reached - best <= CLOSE * abs(reached):
            break
        kept = union(kept, keep(relaxation, MATTERS * abs(now) + margin, margin))
    if relaxation.prices is not prices:
        relaxation.price(prices)
        relaxation.settle()


def at_most(relaxation: Relaxation, options: float) -> float:
    """The slack that leaves so many options in all."""
    slacks = np.concatenate([relaxation.slack(c) for c in relaxation.problem.choices])
    last = min(int(options), len(slacks)) - 1
    return float(np.partition(slacks, last)[last])


def duals(
    problem: Problem,
    limits: Sequence[Limit],
    memory_price: float | None,
    kept: Kept,
    elastic: float | None,
    time_limit: float,
) -> tuple[float, Prices | None]:
    """The value of the linear program, in microseconds, and its prices, if it has a solution."""
    formulation = formulate(problem, limits, memory_price, kept, elastic=elastic)
    solver = formulation.model.highs(time_limit, relaxed=True)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return 0.0, None
    return solver.getInfo().objective_function_value, read(formulation, solver)


def read(formulation: Formulation, solver: highspy.Highs) -> Prices:
    dual = np.array(solver.getSolution().row_dual)
    exposed = {r: float(np.clip(dual[i], 0.0, 1.0)) for r, i in formulation.exposed.items()}
    return Prices(exposed, [max(0.0, -float(dual[i])) for i in formulation.limits])
