"""Solve a pairwise problem within a time: two threads, a bound from one, assignments from both.

One thread climbs the dual (`prices`) and decodes assignments on the way; the other polishes what
was decoded and searches on from the best (`search`) at the dual's prices. What the two leave of a
small problem goes to HiGHS (`exact`). Nothing that comes back is believed: cost and usage are those
of the problem as it was given.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from neocc.passes.layout.pairwise.exact import PAIRS, TRUST, exact, left
from neocc.passes.layout.pairwise.graph import Graph, cost_in, graph_of
from neocc.passes.layout.pairwise.messages import Messages
from neocc.passes.layout.pairwise.prices import Ascent
from neocc.passes.layout.pairwise.problem import (
    Floats,
    Ints,
    Problem,
    cost_of,
    feasible,
    make_problem,
)
from neocc.passes.layout.pairwise.reduce import Reduced, reduce
from neocc.passes.layout.pairwise.search import Place, Search, gap

KICK = 6.0  # blocks that one kick takes
FREE = 20  # hard sweeps at no price, to learn the scale of costs
COOLING = 0.85  # of the time, for the temperature to fall in
SHARE = 0.25  # of the time, for the two threads before HiGHS has its turn
LEAST = 5  # turns of either thread, even if there is no time


@dataclass(frozen=True)
class Result:
    """``picked`` is None where no assignment was found that keeps the limit.

    ``bound`` is at most the cost of every assignment that keeps it: infinity if there is none.
    ``dual`` is what the messages prove alone, by weak duality; where ``bound`` is higher, HiGHS
    proved it.
    """

    picked: Ints | None
    cost: float
    bound: float
    dual: float
    seconds: float
    nodes: int  # left after reduction, those with a choice
    steps: int  # of the dual

    @property
    def gap(self) -> float:
        return gap(self.cost, self.bound)


def solve(problem: Problem, seconds: float, seed: int = 0) -> Result:
    """The best assignment found within ``seconds`` of wall clock, and a proved bound."""
    begin = time.perf_counter()
    reduced = reduce(problem)
    if reduced is None:
        return Result(None, math.inf, math.inf, math.inf, time.perf_counter() - begin, 0, 0)
    choices = int((np.diff(reduced.first) > 1).sum())
    graph, start = _scaled(reduced)
    ascent = Ascent(graph, max(cost_in(graph, start), 1e-12))
    search = Search(graph, np.random.default_rng(seed))
    search.offer(search.place(start))
    bound = -math.inf
    if choices and len(graph.tables) <= 10 * PAIRS:
        _Run(ascent, search, begin, SHARE * seconds).run()
        bound = _close(ascent, search, begin, seconds)
    ascent.prove()
    bound = max(bound, ascent.bound)
    assert search.best is not None
    if choices and not (search.best.over <= 0 and closed(search.best.cost, bound)):
        _Run(ascent, search, begin, seconds).run()
    bound = max(bound, ascent.bound)
    picked = reduced.lift(search.best.picked)
    cost = cost_of(problem, picked)
    fits = feasible(problem, picked)
    return Result(
        picked if fits else None,
        cost if fits else math.inf,
        bound,
        ascent.bound,
        time.perf_counter() - begin,
        choices,
        ascent.steps,
    )


def compile_loops() -> None:
    """Compile every loop of the solver, or load it if that was done on this machine before: else
    the first `solve` spends its time on it."""
    pair = [0.0, 3.0, 2.0, 1.0]
    reduced = reduce(
        make_problem(
            [[0, 2], [1, 0], [2, 1]], [[3, 1], [3, 2], [4, 1]], [(0, 2), (0, 3), (1, 3)],
            [(0, 1), (1, 2), (0, 2)], [pair, pair[::-1], pair], 7,
        )
    )  # fmt: skip
    assert reduced is not None
    graph, start = _scaled(reduced)
    ascent = Ascent(graph, 1.0)
    for _ in range(5):
        ascent.step(0.5)
    search = Search(graph, np.random.default_rng(0))
    place = search.polish(search.place(start), ascent.prices, 1)
    search.cross(search.kick(place, ascent.prices, 1), place)
    left(ascent.messages, ascent.prices, place.cost)


def closed(cost: float, bound: float) -> bool:
    """Whether the bound proves the cost, but for rounding."""
    return bound >= cost - 4 * TRUST * max(1.0, abs(cost))


def _close(ascent: Ascent, search: Search, begin: float, seconds: float) -> float:
    """Have HiGHS prove what the bound leaves, if that is little; returns a bound."""
    best = search.best
    if best is None or best.over > 0 or closed(best.cost, ascent.bound):
        return ascent.bound
    kept = left(ascent.messages, ascent.prices, best.cost)
    if not kept.small:
        return ascent.bound
    spare = 0.95 * (seconds - (time.perf_counter() - begin))
    picked, bound = exact(search.graph, kept, ascent.prices, spare)
    if picked is not None:
        search.offer(search.place(picked))
    return bound


def _scaled(reduced: Reduced) -> tuple[Graph, Ints]:
    """The graph with costs capped well above an assignment's, and that assignment."""
    finite = [v[np.isfinite(v)].max(initial=0.0) for v in (reduced.cost, reduced.tables)]
    cap = 4 * max(1.0, *finite) * max(1.0, math.log2(reduced.nodes + 1))
    graph, start = _free(reduced, cap)
    cost = cost_in(graph, start)
    if cost >= cap:  # something forbidden
        return graph, start
    return _free(reduced, min(cap, 16 * cost + 1))


def _free(reduced: Reduced, cap: float) -> tuple[Graph, Ints]:
    """The graph, and what messages make of it while memory is free."""
    graph = graph_of(reduced, cap)
    messages = Messages(graph)
    messages.price(np.zeros(len(graph.room)))
    for _ in range(FREE):
        messages.sweep(0.0)
    return graph, messages.decode()


class _Run:
    """State that the two threads share: the best decoded assignment waits for the search."""

    def __init__(self, ascent: Ascent, search: Search, begin: float, seconds: float):
        self.ascent, self.search = ascent, search
        self.begin, self.seconds = begin, seconds
        self.lock = threading.Lock()
        self.waiting: Ints | None = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        dual = threading.Thread(target=self._climb, daemon=True)
        dual.start()
        self._search()
        dual.join()
        if self.failure is not None:
            raise self.failure
        self.ascent.prove()

    def _left(self) -> float:
        return self.seconds - (time.perf_counter() - self.begin)

    def _finished(self) -> bool:
        best = self.search.best
        done = best is not None and best.over <= 0 and closed(best.cost, self.ascent.bound)
        return done or self._left() <= 0

    def _climb(self) -> None:
        try:
            first = time.perf_counter()
            last = 0.0
            whole = max(1e-3, self._left() * COOLING)
            shown = None
            while self.ascent.steps < LEAST or not self._finished():
                if self.ascent.steps >= LEAST and self._left() < 2 * last:
                    break
                now = time.perf_counter()
                self.ascent.step((now - first) / whole)
                if self.ascent.steps % 5 == 0:
                    picked = self.ascent.messages.decode()
                    if shown is None or not np.array_equal(picked, shown):
                        shown = picked
                        with self.lock:
                            self.waiting = picked
                last = time.perf_counter() - now
        except BaseException as error:  # raised again by run
            self.failure = error

    def _search(self) -> None:
        search = self.search
        assert search.best is not None
        now = search.best
        now = Place(now.picked.copy(), now.load.copy(), now.cost, now.over)
        pace = _Pace()
        turn = 0
        while self.failure is None and (turn < LEAST or not self._finished()):
            with self.lock:
                picked, self.waiting = self.waiting, None
            prices = self.ascent.prices
            if picked is not None:
                other = search.place(picked)
                now = search.cross(now, other)
                for _ in range(3):
                    other = pace.run(search.polish, other, prices)
                now = search.cross(now, other)
                if search.offer(other) or other.key < now.key:
                    now = other
            turn += 1
            if now.over > 0 or turn % 2:
                now = pace.run(search.polish, now, prices)
            else:
                now = pace.run(search.kick, now, prices, KICK)
            search.offer(now)


class _Pace:
    """How many blocks take about a tenth of a second."""

    def __init__(self) -> None:
        self.blocks = 4.0

    def run(
        self,
        work: Callable[[Place, Floats, int], Place],
        place: Place,
        prices: Floats,
        each: float = 1.0,
    ) -> Place:
        """``work`` on the place; ``each``: how many blocks one of its units is."""
        begin = time.perf_counter()
        result = work(place, prices, max(1, int(self.blocks / each)))
        taken = time.perf_counter() - begin
        grown = self.blocks * min(2.0, max(0.5, 0.1 / max(taken, 1e-4)))
        self.blocks = min(5000.0, max(2.0, grown))
        return result
