"""The fastest assignment within memory, sought apart for every set of stacks that has room.

What a loop keeps for its gradient is kept of all layers or of none: too lumpy for prices of memory,
under which a part of a stack would do. So the search branches on what is kept. Of the sets of
stacks that fit, each largest one is a problem of its own, in which all other stacks are off or on
the host; every
assignment that fits is one of such a problem's. In most of them memory is no longer short, so
that bounds are tight, and most are ruled out by the best of another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from neocc.ir.errors import NeoccError
from neocc.passes.layout.bound import Prices, Relaxation
from neocc.passes.layout.objective import MICRO, Limit
from neocc.passes.layout.prices import improve, value
from neocc.passes.layout.problem import Choice, Flow, Problem
from neocc.passes.layout.prune import everything
from neocc.passes.layout.solve import LIKELY, MARGIN, Clock, Infeasible, Size, Solution, solve

HEAVY = 0.01  # of a limit: what holds less is not branched on
STACKS = 10  # the heaviest ones are branched on
SETS = 64  # more sets than these are not searched apart
WIDER = 4.0  # times as far is a branch searched each time
DEAR = 1e4  # times what assignments may cost, for all of a limit: memory hardly costs less


Only = Mapping[Choice, np.ndarray]  # the options that choices are left, where not all


@dataclass(frozen=True)
class Stack:
    """A value that is kept or not, and the choice that reads it if it is."""

    flow: Flow
    reader: Choice

    @property
    def maker(self) -> Choice:
        return self.flow.sources[0].choice


@dataclass(frozen=True)
class Branch:
    """Assignments of some choices' options; ``bound``: seconds that any takes, under ``prices`` or
    as proved since. Next it is searched up to ``slack``, a share of that, above. ``again``: it has
    been searched before."""

    bound: float
    only: Only
    prices: Prices
    slack: float = LIKELY
    again: bool = False


def solve_apart(
    problem: Problem,
    limits: Sequence[Limit],
    relaxation: Relaxation,
    enough: float,
    seconds: float,
) -> Solution | None:
    """The fastest assignment that keeps hard limits; None where none takes less than ``enough``
    seconds. ``relaxation``: of the whole problem, with good prices; its prices are changed.

    Raises:
        NeoccError: none was found in time.
    """
    clock = Clock(seconds)
    heavy = heavy_stacks(problem, limits)
    open_ = branches(relaxation, kept_sets(problem, limits, heavy, relaxation.prices, enough))
    closed: list[float] = []
    best: Solution | None = None
    below = enough
    while open_ and clock.left > 0:
        branch = min(open_, key=lambda b: b.bound)
        if branch.bound >= below:
            break
        open_.remove(branch)
        relaxation.price(branch.prices, branch.only)
        relaxation.settle()
        if branch.again:
            improve(relaxation, limits, None, MARGIN, clock.least, below * MICRO)
            better = max(branch.bound, value(relaxation, True) / MICRO)
            branch = replace(branch, prices=relaxation.prices, bound=better)
            if better >= below:
                closed.append(better)
                continue
        reach = min(below, branch.bound * (1 + branch.slack))
        wider = replace(branch, bound=reach, slack=WIDER * branch.slack, again=True)
        try:
            found = solve(
                problem, limits, time_limit=clock.least, relaxation=relaxation, below=reach
            )
        except Infeasible:
            open_.append(wider)
            continue
        except NeoccError:  # none was found in time
            open_.append(branch)
            break
        if found.objective <= reach or reach == below:
            closed.append(found.bound)
        else:
            open_.append(replace(wider, bound=found.bound))
        if found.objective < below:
            best, below = found, found.objective
    bound = min([*closed, *(b.bound for b in open_)], default=enough)
    if best is not None:
        whole = Size.of(everything(problem))
        bound = min(best.objective, bound)
        return replace(best, bound=bound, seconds=clock.spent, whole=whole)
    if bound < enough:
        raise NeoccError("no layout was found within memory in time")
    return None


def branches(relaxation: Relaxation, sets: Sequence[Only]) -> list[Branch]:
    """A branch for each set of options that are left."""
    prices, whole = relaxation.prices, value(relaxation, True) / MICRO
    if len(sets) > SETS or not any(sets):
        return [Branch(whole, {}, prices)]
    return [cheapest(relaxation, only, prices, whole) for only in sets]


def cheapest(relaxation: Relaxation, only: Only, prices: Prices, whole: float) -> Branch:
    """The better bound of free memory and, where that is no better than the ``whole`` problem's,
    of memory as dear as there."""
    free = Prices(prices.exposed, [0.0] * len(prices.limits))
    found: list[Branch] = []
    for tried in (free, prices):
        relaxation.price(tried, only)
        relaxation.settle()
        found.append(Branch(value(relaxation, True) / MICRO, only, tried))
        if found[-1].bound > whole:
            break
    return max(found, key=lambda b: b.bound)


def heavy_stacks(problem: Problem, limits: Sequence[Limit]) -> dict[Stack, list[float]]:
    """The heaviest stacks and the least share of each limit that they hold where they are kept."""
    held = {
        s: [least_kept(problem, limit, s) / max(limit.limit, 1.0) for limit in limits]
        for s in kept_or_not(problem)
    }
    heavy = sorted((s for s in held if max(held[s]) > HEAVY), key=lambda s: -max(held[s]))
    return {s: held[s] for s in heavy[:STACKS]}


def kept_sets(
    problem: Problem,
    limits: Sequence[Limit],
    held: Mapping[Stack, list[float]],
    prices: Prices,
    enough: float,
) -> list[Only]:
    """What is left where no more than a largest set of stacks is kept, for all such sets: no
    assignment that takes less than ``enough`` seconds and keeps the limits keeps more."""
    heavy = list(held)
    if not heavy:
        return [{}]
    room = 1.0 - np.array(least_rest(problem, limits, heavy, prices, enough))
    fit: list[frozenset[Stack]] = []
    for size in range(len(heavy), -1, -1):
        for kept in map(frozenset, itertools.combinations(heavy, size)):
            total = np.sum([held[s] for s in kept], axis=0) if kept else np.zeros(len(limits))
            if np.all(total <= room + 1e-9) and not any(kept < other for other in fit):
                fit.append(kept)
    return [{s.reader: s.reader.away for s in heavy if s not in kept} for kept in fit]


def kept_or_not(problem: Problem) -> Iterator[Stack]:
    """Values whose one source and one reader may be off or away; no choice is of two of them."""
    seen: set[Choice] = set()
    for flow in problem.flows:
        if len(flow.sources) == len(flow.sinks) == 1:
            ends = {flow.sources[0].choice, flow.sinks[0].choice}
            if len(ends) == 2 and all(len(c.away) for c in ends) and not ends & seen:
                seen |= ends
                yield Stack(flow, flow.sinks[0].choice)


def least_kept(problem: Problem, limit: Limit, stack: Stack) -> float:
    """The least bytes at a point of a stack that is kept: as made, as its copies, as read."""
    flow, graph = stack.flow, problem.reshards_of(stack.flow)
    copies = limit.moves.get(flow, {})
    weights = np.array([copies.get(layout, 0.0) for layout in graph.index])[graph.target]
    made, read = (graph.numbers(end.layouts) for end in (flow.sources[0], flow.sinks[0]))
    found = graph.distances(weights)[np.ix_(made, read)]
    found += np.array(limit.options.get(stack.maker, np.zeros(len(made))))[:, None]
    found += np.array(limit.options.get(stack.reader, np.zeros(len(read))))[None, :]
    found[stack.maker.away, :] = found[:, stack.reader.away] = np.inf
    return float(found.min(initial=np.inf))


def least_rest(
    problem: Problem,
    limits: Sequence[Limit],
    stacks: Sequence[Stack],
    prices: Prices,
    enough: float,
) -> list[float]:
    """The least share of each limit of all but the stacks, in any assignment that takes less than
    ``enough`` seconds: memory at a price bounds cost and memory together."""
    own = {c for s in stacks for c in (s.maker, s.reader)}
    flows = {s.flow for s in stacks}
    rest = [without(limit, own, flows) for limit in limits]
    most = enough * MICRO
    price = DEAR * most
    relaxation = Relaxation(problem, rest, prices)
    found = []
    for i in range(len(rest)):
        only = [price if j == i else 0.0 for j in range(len(rest))]
        relaxation.price(Prices(prices.exposed, only))
        relaxation.settle()
        found.append((relaxation.bound - most) / price)
    return found


def without(limit: Limit, choices: set[Choice], flows: set[Flow]) -> Limit:
    options: Mapping[Choice, list[float]] = limit.options
    return replace(
        limit,
        options={c: held for c, held in options.items() if c not in choices},
        moves={f: held for f, held in limit.moves.items() if f not in flows},
    )
