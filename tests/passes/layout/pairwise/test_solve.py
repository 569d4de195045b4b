"""The bound never lies, the search keeps its books, and small problems are solved."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from neocc.passes.layout.pairwise import graph, messages, reduce_kernels, search_kernels
from neocc.passes.layout.pairwise.graph import cost_in, graph_of, load_in
from neocc.passes.layout.pairwise.messages import Messages
from neocc.passes.layout.pairwise.problem import (
    BadProblem,
    cost_of,
    feasible,
    make_problem,
    peak_of,
    usage_of,
)
from neocc.passes.layout.pairwise.reduce import reduce
from neocc.passes.layout.pairwise.search import Search
from neocc.passes.layout.pairwise.solve import solve
from tests.passes.layout.pairwise.samples import INF, every, layers, lists, optimum, problems

SECONDS = 3.0  # at most: a proof ends it


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 3.0]))
def test_any_messages_and_prices_give_a_lower_bound(problem, seed, temperature):
    reduced = reduce(problem)
    if reduced is None:
        return
    random = np.random.default_rng(seed)
    messages = Messages(graph_of(reduced, 1e4))
    messages.values[:] = random.normal(0, 5, len(messages.values))
    prices = random.exponential(1.0, len(reduced.room)) * random.integers(0, 2, len(reduced.room))
    messages.price(prices)
    best = optimum(problem)
    assert messages.bound(prices) <= best
    messages.sweep(temperature)
    assert messages.bound(prices) <= best


def test_sweeps_of_a_tree_reach_its_optimum():
    chain = lists(layers(4))
    free = make_problem(**{**chain, "usages": [[0] * len(u) for u in chain["usages"]]})
    result = solve(free, SECONDS)
    assert result.picked is not None
    assert result.cost == pytest.approx(min(cost_of(free, p) for p in every(free)))
    assert result.gap < 1e-6


@settings(max_examples=40, deadline=None)
@given(problems())
def test_small_problems_are_solved(problem):
    best = optimum(problem)
    result = solve(problem, SECONDS)
    assert result.bound <= best
    if best == INF:
        assert result.picked is None
        assert result.cost == INF
        return
    assert result.picked is not None
    assert feasible(problem, result.picked)
    assert result.cost == cost_of(problem, result.picked)
    assert math.isclose(result.cost, best, abs_tol=1e-6)
    assert result.bound >= best - 1e-4


@pytest.mark.parametrize("count", [3, 40])
def test_layers_under_a_tight_limit_are_solved(count):
    problem = layers(count)
    result = solve(problem, SECONDS)
    assert result.picked is not None
    assert peak_of(problem, result.picked) <= problem.limit
    loose = solve(make_problem(**{**lists(problem), "limit": None}), SECONDS)
    assert result.cost - 1e-2 <= result.bound <= result.cost
    assert loose.cost < result.cost, "the limit has to bind for this to test anything"
    if count == 3:
        assert result.cost == pytest.approx(optimum(problem))


def test_search_keeps_its_books_and_never_leaves_the_room():
    reduced = reduce(layers(30))
    assert reduced is not None
    graph = graph_of(reduced, 1e6)
    search = Search(graph, np.random.default_rng(0))
    prices = np.zeros(len(graph.room))
    place = search.place(np.zeros(reduced.nodes, np.int64))
    while place.over > 0:
        place = search.polish(place, prices, 20)
    for turn in range(10):
        before = place.cost
        move = search.polish if turn % 2 else search.kick
        place = move(place, prices, 10)
        assert place.cost <= before + 1e-6
        assert place.over == 0
        np.testing.assert_allclose(place.load, load_in(graph, place.picked))
        assert place.cost == pytest.approx(cost_in(graph, place.picked))


@settings(max_examples=60, deadline=None)
@given(problems(nodes=8), st.randoms(use_true_random=False))
def test_crossing_never_costs_or_overfills_more(problem, random):
    reduced = reduce(problem)
    if reduced is None:
        return
    graph = graph_of(reduced, 1e3)
    search = Search(graph, np.random.default_rng(0))
    sizes = np.diff(graph.first)
    mine, theirs = (
        search.place(np.array([random.randrange(int(k)) for k in sizes])) for _ in range(2)
    )
    before = mine.cost, mine.over
    counted = search_kernels.cross(graph, mine.picked, mine.load, theirs.picked)
    np.testing.assert_allclose(mine.load, load_in(graph, mine.picked), atol=1e-9)
    after = search.place(mine.picked)
    assert after.cost == pytest.approx(before[0] + counted)
    assert after.cost <= before[0] + 1e-6
    assert after.over <= before[1]
    own = mine.picked != theirs.picked
    assert (mine.picked[~own] == theirs.picked[~own]).all()
    if not own.any():
        assert after.cost == pytest.approx(theirs.cost)


def test_a_solve_finds_all_loops_compiled():
    modules = (graph, messages, reduce_kernels, search_kernels)
    loops = [f for m in modules for f in vars(m).values() if isinstance(f, Dispatcher)]
    before = [len(loop.signatures) for loop in loops]
    assert any(before)
    assert solve(layers(20), 1.0).picked is not None
    assert [len(loop.signatures) for loop in loops] == before


def test_usage_counts_a_node_from_its_begin_to_before_its_end():
    problem = make_problem([[0], [0]], [[3], [4]], [(0, 2), (1, 3)], [], [], 7)
    assert usage_of(problem, np.array([0, 0])).tolist() == [3, 7, 4]
    assert peak_of(problem, np.array([0, 0])) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": [[1, 2], []]}, "node 1 has 0 costs"),
        ({"usages": [[1, 1]]}, "2 nodes have costs, 1 usages"),
        ({"intervals": [(0, 1), (-1, 2)]}, "node 1 is live over"),
        ({"edges": [(0, 5)]}, r"edge 0 joins \(0, 5\)"),
        ({"tables": [[1, 2, 3]]}, "edge 0 has 3 costs for 2 x 1 pairs"),
        ({"usages": [[1, -1], [1]]}, "negative"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    whole = {
        "costs": [[1, 2], [3]], "usages": [[1, 1], [1]], "intervals": [(0, 1), (0, 2)],
        "edges": [(0, 1)], "tables": [[0, 0]], "limit": 3,
    }  # fmt: skip
    with pytest.raises(BadProblem, match=message):
        make_problem(**{**whole, **change})
