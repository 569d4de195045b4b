"""What messages rule out costs more than what is in hand; HiGHS proves the rest."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.passes.layout.pairwise.exact import exact, left
from neocc.passes.layout.pairwise.graph import Graph, cost_in, graph_of, load_in
from neocc.passes.layout.pairwise.messages import Messages
from neocc.passes.layout.pairwise.reduce import reduce
from tests.passes.layout.pairwise.samples import layers, problems


def fitting(graph: Graph) -> list[tuple[float, np.ndarray]]:
    """Assignments that keep the room, cheapest first."""
    every = (np.array(p) for p in itertools.product(*map(range, np.diff(graph.first))))
    kept = [(cost_in(graph, p), p) for p in every if (load_in(graph, p) <= graph.room).all()]
    return sorted(kept, key=lambda pair: pair[0])


@settings(max_examples=40, deadline=None)
@given(problems(nodes=5), st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_nothing_cheaper_is_ruled_out_and_the_best_is_found(problem, seed, sweeps):
    reduced = reduce(problem)
    if reduced is None:
        return
    graph = graph_of(reduced, 1e3)
    found = fitting(graph)
    if not found:
        return
    random = np.random.default_rng(seed)
    messages = Messages(graph)
    messages.values[:] = random.normal(0, 2, len(messages.values))
    prices = random.exponential(0.5, len(graph.room)) * random.integers(0, 2, len(graph.room))
    messages.price(prices)
    for _ in range(sweeps):
        messages.sweep(0.0)
    hand = found[random.integers(len(found))][0]
    kept = left(messages, prices, hand)
    columns = np.diff(graph.first)[graph.edges[:, 1]]
    for cost, picked in found:
        if cost < hand:
            i, j = graph.edges.T
            assert kept.strategies[graph.first[:-1] + picked].all()
            assert kept.pairs[graph.at + picked[i] * columns + picked[j]].all()
    picked, bound = exact(graph, kept, prices, 10.0)
    best = found[0][0]
    assert bound <= best + 1e-9
    if picked is not None:
        assert (load_in(graph, picked) <= graph.room).all()
        assert math.isclose(cost_in(graph, picked), best, abs_tol=1e-6)
    else:
        assert hand == best, "something cheaper than what is in hand was not found"
    assert math.isclose(bound, best, abs_tol=1e-5 * max(1.0, hand))


def test_no_time_gives_no_proof():
    reduced = reduce(layers(10))
    assert reduced is not None
    graph = graph_of(reduced, 1e6)
    messages = Messages(graph)
    prices = np.zeros(len(graph.room))
    assert exact(graph, left(messages, prices, 1e4), prices, 0.0) == (None, -math.inf)
