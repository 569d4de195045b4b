"""A reduced problem as the compiled loops read it: arrays in a tuple, nothing forbidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from neocc.passes.layout.pairwise.compiled import njit
from neocc.passes.layout.pairwise.problem import Floats, Ints

if TYPE_CHECKING:
    from neocc.passes.layout.pairwise.reduce import Reduced


class Graph(NamedTuple):
    """Fields as in `Reduced`; edges at node ``i`` are ``around[ring[i]:ring[i + 1]]``."""

    first: Ints
    cost: Floats
    edges: Ints
    at: Ints
    tables: Floats
    holders: Ints
    holder_at: Ints
    holding: Ints
    begin: Ints
    end: Ints
    room: Floats
    ring: Ints
    around: Ints


def graph_of(reduced: Reduced, cap: float) -> Graph:
    """The graph with every cost above ``cap``, and what is forbidden, at ``cap``.

    No cost is raised, so a bound for the graph is one for the problem.
    """
    ring, around = adjacency(reduced.nodes, reduced.edges)
    return Graph(
        reduced.first, np.minimum(reduced.cost, cap), reduced.edges, reduced.at,
        np.minimum(reduced.tables, cap), reduced.holders, reduced.holder_at, reduced.holding,
        reduced.begin, reduced.end, reduced.room.astype(np.float64), ring, around,
    )  # fmt: skip


@njit
def adjacency(nodes, edges):
    """Edges at each node, flat: those of node ``i`` are ``around[ring[i]:ring[i + 1]]``."""
    ring = np.zeros(nodes + 1, np.int64)
    for e in range(len(edges)):
        ring[edges[e, 0] + 1] += 1
        ring[edges[e, 1] + 1] += 1
    for i in range(nodes):
        ring[i + 1] += ring[i]
    fill = ring[:-1].copy()
    around = np.empty(2 * len(edges), np.int64)
    for e in range(len(edges)):
        for side in range(2):
            i = edges[e, side]
            around[fill[i]] = e
            fill[i] += 1
    return ring, around


@njit
def cost_in(graph, picked):
    """Cost of an assignment."""
    total = 0.0
    for i in range(len(graph.first) - 1):
        total += graph.cost[graph.first[i] + picked[i]]
    for e in range(len(graph.edges)):
        i, j = graph.edges[e]
        columns = graph.first[j + 1] - graph.first[j]
        total += graph.tables[graph.at[e] + picked[i] * columns + picked[j]]
    return total


@njit
def load_in(graph, picked):
    """What an assignment holds in each slot."""
    change = np.zeros(len(graph.room) + 1)
    for i in range(len(graph.first) - 1):
        for h in range(graph.holders[i], graph.holders[i + 1]):
            amount = graph.holding[graph.holder_at[h] + picked[i]]
            change[graph.begin[h]] += amount
            change[graph.end[h]] -= amount
    return np.cumsum(change)[:-1]


@njit
def over(load, room):
    """How far loads are over their room, summed."""
    total = 0.0
    for t in range(len(room)):
        if load[t] > room[t]:
            total += load[t] - room[t]
    return total
