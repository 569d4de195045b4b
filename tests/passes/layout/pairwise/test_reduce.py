"""Reduction keeps the optimum and the way back."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings

from neocc.passes.layout.pairwise.graph import cost_in, graph_of, load_in
from neocc.passes.layout.pairwise.problem import cost_of, feasible, make_problem
from neocc.passes.layout.pairwise.reduce import reduce
from tests.passes.layout.pairwise.samples import INF, optimum, problems


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_optimum_stays_and_lifts(problem):
    best = optimum(problem)
    reduced = reduce(problem)
    if reduced is None:
        assert best == INF
        return
    graph = graph_of(reduced, 1e9)
    found = INF
    for picked in itertools.product(*map(range, np.diff(reduced.first))):
        picked = np.array(picked)
        lifted = reduced.lift(picked)
        fits = (load_in(graph, picked) <= graph.room).all()
        cost = cost_in(graph, picked)
        allowed = cost < 1e9
        assert (fits and allowed) == feasible(problem, lifted)
        if allowed:
            assert math.isclose(cost, cost_of(problem, lifted), abs_tol=1e-6)
        if fits and allowed:
            found = min(found, cost)
    assert found == best or math.isclose(found, best, abs_tol=1e-6)


def test_followers_and_dominated_strategies_go():
    same = [0, INF, INF, 0]
    problem = make_problem(
        [[3, 1], [0, 0], [2, 2, 9]], [[1, 4], [2, 0], [1, 1, 1]], [(0, 4), (1, 3), (2, 2)],
        [(0, 1), (1, 2)], [same, [0, 7, 9, 7, 0, 9]], 100,
    )  # fmt: skip
    reduced = reduce(problem)
    assert reduced is not None
    assert reduced.nodes == 1
    assert [reduced.lift(np.array([s])).tolist() for s in (0, 1)] == [[0, 0, 0], [1, 1, 1]]
    assert reduced.cost.tolist() == [5, 3]


def test_times_that_cannot_overflow_go():
    problem = make_problem(
        [[1, 0], [1, 0]], [[1, 5], [1, 5]], [(0, 9), (4, 6)], [(0, 1)], [[0, 3, 2, 0]], 6
    )
    reduced = reduce(problem)
    assert reduced is not None
    assert reduced.room.tolist() == [4]


def test_no_assignment_at_all_is_seen():
    forbidden = make_problem([[0, 0], [0]], [[1, 1], [1]], [(0, 1)] * 2, [(0, 1)], [[INF, INF]], 9)
    assert reduce(forbidden) is None
    full = make_problem([[0, 0]], [[7, 8]], [(0, 1)], [], [], 6)
    assert reduce(full) is None
