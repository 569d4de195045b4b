"""Messages along edges: the dual of the pairwise problem at given memory prices.

Prices of memory (Lagrange multipliers of the slots) turn it into node costs, and messages move
cost between a node and its edges without changing any assignment's. Whatever the prices and the
messages, the sum of each part's minimum is a lower bound (`bound`): that is weak duality, and all
that a proof needs.

To raise it, nodes are passed in order and back (sequential tree-reweighted message passing,
Kolmogorov 2006): each shares its cost equally among the monotonic chains through it. At a
temperature above zero minima are soft, ``-t log sum exp(-x / t)``: the same pass is then exact
coordinate ascent on a smooth concave function and cannot stall, as the hard one does, far below
the linear relaxation (Meltzer, Globerson, Weiss 2009).
"""

from __future__ import annotations

import numpy as np

from neocc.passes.layout.pairwise.compiled import fast, njit
from neocc.passes.layout.pairwise.graph import Graph
from neocc.passes.layout.pairwise.problem import Floats, Ints


class Messages:
    """Messages over a graph, and the node costs ``priced`` by the last `price`."""

    def __init__(self, graph: Graph):
        self.graph = graph
        nodes = len(graph.first) - 1
        sizes = np.diff(graph.first)
        into = sizes[graph.edges]
        flat = np.cumsum(into.ravel()) - into.ravel()
        self.at: Ints = flat.reshape(-1, 2)  # where the message into each end of an edge begins
        self.values: Floats = np.zeros(int(into.sum()))
        before = np.bincount(graph.edges.max(axis=1), minlength=nodes)
        after = np.bincount(graph.edges.min(axis=1), minlength=nodes)
        self.before: Ints = before.astype(np.int64)
        self.share: Floats = 1.0 / np.maximum(1, np.maximum(before, after))
        self.priced: Floats = graph.cost.copy()
        self.total: Floats = graph.cost.copy()
        self.weight: Floats = np.zeros(len(graph.cost))

    def price(self, prices: Floats) -> None:
        priced_costs(self.graph, prices, self.priced)

    def sweep(self, temperature: float) -> None:
        """All nodes in order, then back."""
        for forward in (True, False):
            sweep(
                self.graph, self.priced, self.at, self.values, self.share, forward,
                temperature, self.total,
            )  # fmt: skip

    def load(self, temperature: float) -> Floats:
        """What the slots hold on average under the chains' distributions: the derivative by the
        prices, of the smooth bound, is this less the room."""
        marginals(
            self.graph, self.priced, self.at, self.values, self.share, temperature,
            self.total, self.weight,
        )  # fmt: skip
        return load_of_weights(self.graph, self.weight)

    def bound(self, prices: Floats) -> float:
        """A lower bound of any assignment's cost that keeps the room, for any messages.

        The cost of an assignment is at least its cost plus ``prices . (load - room)``, which is
        the sum over nodes and edges of parts that each contain a node or an edge alone; it is at
        least the sum of their minima. What rounding can have added is taken off.
        """
        low, size, terms = bound(
            self.graph, self.priced, self.at, self.values, self.share, self.before, self.total
        )
        held = float(prices @ self.graph.room)
        terms += len(prices)
        return low - held - terms * (size + held) * 2.0**-52

    def decode(self) -> Ints:
        """An assignment: each node in order takes what is best with those before it and with the
        messages of those after it."""
        return decode(self.graph, self.priced, self.at, self.values)


@njit
def priced_costs(graph, prices, out):
    """Node costs with what the node holds at these prices."""
    sums = np.zeros(len(prices) + 1)
    for t in range(len(prices)):
        sums[t + 1] = sums[t] + prices[t]
    for i in range(len(graph.first) - 1):
        f = graph.first[i]
        size = graph.first[i + 1] - f
        for s in range(size):
            out[f + s] = graph.cost[f + s]
        for h in range(graph.holders[i], graph.holders[i + 1]):
            price = sums[graph.end[h]] - sums[graph.begin[h]]
            if price > 0:
                for s in range(size):
                    out[f + s] += price * graph.holding[graph.holder_at[h] + s]


@njit
def gather(graph, priced, into, values, i, total):
    """Priced cost of node i plus all messages into it."""
    f = graph.first[i]
    size = graph.first[i + 1] - f
    for s in range(size):
        total[f + s] = priced[f + s]
    for k in range(graph.ring[i], graph.ring[i + 1]):
        e = graph.around[k]
        at = into[e, 0 if graph.edges[e, 0] == i else 1]
        for s in range(size):
            total[f + s] += values[at + s]


@fast
def send(tables, base, row, rows, columns, give, values, out, temperature, sums):
    """One message, into the other end of an edge; ``give`` is the sender's share."""
    if row:
        for t in range(columns):
            values[out + t] = np.inf
        for s in range(rows):
            for t in range(columns):
                value = give[s] + tables[base + s * columns + t]
                if value < values[out + t]:
                    values[out + t] = value
        if temperature > 0:
            cold = 1 / temperature
            for t in range(columns):
                sums[t] = 0.0
            for s in range(rows):
                for t in range(columns):
                    d = (values[out + t] - give[s] - tables[base + s * columns + t]) * cold
                    if d > -30:
                        sums[t] += np.exp(d)
            for t in range(columns):
                values[out + t] -= temperature * np.log(sums[t])
        count = columns
    else:
        cold = 1 / temperature if temperature > 0 else 0.0
        for t in range(rows):
            at = base + t * columns
            low = np.inf
            for s in range(columns):
                value = give[s] + tables[at + s]
                if value < low:
                    low = value
            if temperature > 0:
                total = 0.0
                for s in range(columns):
                    d = (low - give[s] - tables[at + s]) * cold
                    if d > -30:
                        total += np.exp(d)
                low -= temperature * np.log(total)
            values[out + t] = low
        count = rows
    low = np.inf
    for t in range(count):
        low = min(low, values[out + t])
    for t in range(count):
        values[out + t] -= low


@njit
def sweep(graph, priced, into, values, share, forward, temperature, total):
    """Nodes in order, or in reverse: each sends to those after it, or before it."""
    nodes = len(graph.first) - 1
    widest = 1
    for i in range(nodes):
        widest = max(widest, graph.first[i + 1] - graph.first[i])
    give = np.empty(widest)
    sums = np.empty(widest)
    for q in range(nodes):
        i = q if forward else nodes - 1 - q
        gather(graph, priced, into, values, i, total)
        f = graph.first[i]
        size = graph.first[i + 1] - f
        for k in range(graph.ring[i], graph.ring[i + 1]):
            e = graph.around[k]
            side = 0 if graph.edges[e, 0] == i else 1
            j = graph.edges[e, 1 - side]
            if (j > i) != forward:
                continue
            for s in range(size):
                give[s] = share[i] * total[f + s] - values[into[e, side] + s]
            others = graph.first[j + 1] - graph.first[j]
            rows, columns = (size, others) if side == 0 else (others, size)
            send(
                graph.tables, graph.at[e], side == 0, rows, columns, give, values,
                into[e, 1 - side], temperature, sums,
            )  # fmt: skip


@njit
def marginals(graph, priced, into, values, share, temperature, total, weight):
    """Probability of each strategy in the chains through its node."""
    for i in range(len(graph.first) - 1):
        gather(graph, priced, into, values, i, total)
        low, f, after = np.inf, graph.first[i], graph.first[i + 1]
        for s in range(f, after):
            low = min(low, total[s])
        mass = 0.0
        for s in range(f, after):
            weight[s] = np.exp((low - total[s]) * share[i] / temperature)
            mass += weight[s]
        for s in range(f, after):
            weight[s] /= mass


@njit
def load_of_weights(graph, weight):
    """What the slots hold, a strategy counted by its weight."""
    change = np.zeros(len(graph.room) + 1)
    for i in range(len(graph.first) - 1):
        f = graph.first[i]
        for h in range(graph.holders[i], graph.holders[i + 1]):
            amount = 0.0
            for s in range(graph.first[i + 1] - f):
                amount += weight[f + s] * graph.holding[graph.holder_at[h] + s]
            change[graph.begin[h]] += amount
            change[graph.end[h]] -= amount
    return np.cumsum(change)[:-1]


@njit
def bound(graph, priced, into, values, share, before, total):
    """Sum of minima of the parts, sum of their sizes, number of operations behind them.

    The part of an edge to an earlier node holds ``share`` of the later node's cost, the part of a
    node what is left of its own.
    """
    low, size, terms = 0.0, 0.0, 0
    for i in range(len(graph.first) - 1):
        gather(graph, priced, into, values, i, total)
        left = 1 - before[i] * share[i]
        least, best = np.inf, graph.first[i]
        for s in range(graph.first[i], graph.first[i + 1]):
            if left * total[s] < least:
                least, best = left * total[s], s
        low += least
        size += abs(priced[best]) + abs(total[best])
        terms += graph.ring[i + 1] - graph.ring[i] + 2
    for e in range(len(graph.edges)):
        side = 0 if graph.edges[e, 0] > graph.edges[e, 1] else 1
        i, j = graph.edges[e, side], graph.edges[e, 1 - side]
        rows, columns = graph.first[i + 1] - graph.first[i], graph.first[j + 1] - graph.first[j]
        least, largest = np.inf, 0.0
        for s in range(rows):
            mine = share[i] * total[graph.first[i] + s] - values[into[e, side] + s]
            for t in range(columns):
                k = s * columns + t if side == 0 else t * rows + s
                theirs = values[into[e, 1 - side] + t]
                value = mine - theirs + graph.tables[graph.at[e] + k]
                if value < least:
                    least = value
                    largest = abs(mine) + abs(theirs) + abs(graph.tables[graph.at[e] + k])
        low += least
        size += largest
        terms += 3
    return low, size, terms


@njit
def decode(graph, priced, into, values):
    """See `Messages.decode`."""
    nodes = len(graph.first) - 1
    picked = np.zeros(nodes, np.int64)
    for i in range(nodes):
        f = graph.first[i]
        size = graph.first[i + 1] - f
        value = priced[f : f + size].copy()
        for k in range(graph.ring[i], graph.ring[i + 1]):
            e = graph.around[k]
            side = 0 if graph.edges[e, 0] == i else 1
            j = graph.edges[e, 1 - side]
            if j < i:
                others = graph.first[j + 1] - graph.first[j]
                for s in range(size):
                    k2 = s * others + picked[j] if side == 0 else picked[j] * size + s
                    value[s] += graph.tables[graph.at[e] + k2]
            else:
                for s in range(size):
                    value[s] += values[into[e, side] + s]
        picked[i] = np.argmin(value)
    return picked


@njit
def raises(graph, priced, into, values, share, before, total):
    """How much the bound rises if a node must take a strategy, and an edge a pair: the parts that
    the strategy or pair is in cannot take their minima."""
    strategy, pair = np.zeros(len(graph.cost)), np.zeros(len(graph.tables))
    for i in range(len(graph.first) - 1):
        gather(graph, priced, into, values, i, total)
        left = 1 - before[i] * share[i]
        low, f, after = np.inf, graph.first[i], graph.first[i + 1]
        for s in range(f, after):
            low = min(low, left * total[s])
        for s in range(f, after):
            strategy[s] = left * total[s] - low
    for e in range(len(graph.edges)):
        side = 0 if graph.edges[e, 0] > graph.edges[e, 1] else 1
        i, j = graph.edges[e, side], graph.edges[e, 1 - side]
        rows, columns = graph.first[i + 1] - graph.first[i], graph.first[j + 1] - graph.first[j]
        least = np.inf
        across = np.full(columns, np.inf)
        along = np.full(rows, np.inf)
        for s in range(rows):
            mine = share[i] * total[graph.first[i] + s] - values[into[e, side] + s]
            for t in range(columns):
                k = graph.at[e] + (s * columns + t if side == 0 else t * rows + s)
                value = mine - values[into[e, 1 - side] + t] + graph.tables[k]
                pair[k] = value
                least = min(least, value)
                along[s] = min(along[s], value)
                across[t] = min(across[t], value)
        for k in range(graph.at[e], graph.at[e] + rows * columns):
            pair[k] -= least
        for s in range(rows):
            strategy[graph.first[i] + s] += along[s] - least
        for t in range(columns):
            strategy[graph.first[j] + t] += across[t] - least
    return strategy, pair
