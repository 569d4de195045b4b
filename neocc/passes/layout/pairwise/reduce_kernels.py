"""Loops of `reduce`, compiled. Graphs are flat, as in `problem`; infinity is forbidden."""

from __future__ import annotations

import numpy as np

from neocc.passes.layout.pairwise.compiled import njit
from neocc.passes.layout.pairwise.graph import adjacency


@njit
def unsupported(first, cost, edges, at, tables, alive):
    """Clear ``alive`` where a strategy has no partner across some edge; returns how many went."""
    gone = 0
    for s in range(len(cost)):
        if alive[s] and cost[s] == np.inf:
            alive[s] = False
            gone += 1
    begin, around = adjacency(len(first) - 1, edges)
    waiting = np.ones(len(edges), np.bool_)
    queue = np.arange(len(edges))
    more = True
    while more:
        more = False
        for e in queue:
            if not waiting[e]:
                continue
            waiting[e] = False
            i, j = edges[e]
            rows, columns = first[i + 1] - first[i], first[j + 1] - first[j]
            for side in range(2):
                mine = rows if side == 0 else columns
                other = columns if side == 0 else rows
                here = first[i] if side == 0 else first[j]
                there = first[j] if side == 0 else first[i]
                lost = False
                for s in range(mine):
                    if not alive[here + s]:
                        continue
                    found = False
                    for t in range(other):
                        k = s * columns + t if side == 0 else t * columns + s
                        if alive[there + t] and tables[at[e] + k] < np.inf:
                            found = True
                            break
                    if not found:
                        alive[here + s] = False
                        gone += 1
                        lost = True
                if lost:
                    node = i if side == 0 else j
                    for k in range(begin[node], begin[node + 1]):
                        waiting[around[k]] = True
                    more = True
    return gone


@njit
def dominated(first, cost, edges, at, tables, holders, holder_at, holding, alive):
    """Clear ``alive`` where another strategy of the node never costs or holds more.

    ``a`` may stand for ``b`` if it holds no more in each of the node's intervals and its cost,
    each edge at its worst, is no higher.
    """
    gone = 0
    nodes = len(first) - 1
    begin, around = adjacency(nodes, edges)
    for i in range(nodes):
        size = first[i + 1] - first[i]
        if size == 1:
            continue
        for b in range(size):
            if not alive[first[i] + b]:
                continue
            for a in range(size):
                if a == b or not alive[first[i] + a]:
                    continue
                less = True
                for h in range(holders[i], holders[i + 1]):
                    if holding[holder_at[h] + a] > holding[holder_at[h] + b]:
                        less = False
                        break
                if not less:
                    continue
                worst = cost[first[i] + a] - cost[first[i] + b]
                for k in range(begin[i], begin[i + 1]):
                    e = around[k]
                    row = edges[e, 0] == i
                    j = edges[e, 1] if row else edges[e, 0]
                    others = first[j + 1] - first[j]
                    step = 1 if row else size
                    pa = at[e] + (a * others if row else a)
                    pb = at[e] + (b * others if row else b)
                    most = -np.inf
                    if not row:
                        step = size
                    for t in range(others):
                        if not alive[first[j] + t]:
                            continue
                        vb = tables[pb + t * step]
                        if vb == np.inf:
                            continue
                        extra = tables[pa + t * step] - vb
                        if extra > most:
                            most = extra
                            if most == np.inf:
                                break
                    worst += most
                    if worst == np.inf:
                        break
                if worst <= 0:
                    alive[first[i] + b] = False
                    gone += 1
                    break
    return gone


@njit
def keep_alive(first, cost, edges, at, tables, alive):
    """The graph with the alive strategies only, and the old entry of each."""
    nodes = len(first) - 1
    new_first = np.zeros(nodes + 1, np.int64)
    kept = np.flatnonzero(alive)
    for i in range(nodes):
        count = 0
        for s in range(first[i], first[i + 1]):
            count += alive[s]
        new_first[i + 1] = new_first[i] + count
    sizes = new_first[1:] - new_first[:-1]
    new_at = np.zeros(len(edges) + 1, np.int64)
    for e in range(len(edges)):
        new_at[e + 1] = new_at[e] + sizes[edges[e, 0]] * sizes[edges[e, 1]]
    new_tables = np.empty(new_at[-1], np.float64)
    for e in range(len(edges)):
        i, j = edges[e]
        columns = first[j + 1] - first[j]
        k = new_at[e]
        for s in range(new_first[i], new_first[i + 1]):
            row = at[e] + (kept[s] - first[i]) * columns
            for t in range(new_first[j], new_first[j + 1]):
                new_tables[k] = tables[row + kept[t] - first[j]]
                k += 1
    return new_first, cost[kept], new_at[:-1], new_tables, kept


@njit
def split_sums(first, cost, edges, at, tables):
    """Move into node costs what an edge's table has per row and per column.

    Each table is left with a zero in every row and column, or as all zeros if it was a sum of the
    two (such an edge is marked in the result).
    """
    empty = np.zeros(len(edges), np.bool_)
    for e in range(len(edges)):
        i, j = edges[e]
        rows, columns = first[i + 1] - first[i], first[j + 1] - first[j]
        base = at[e]
        for s in range(rows):
            low = np.inf
            for t in range(columns):
                low = min(low, tables[base + s * columns + t])
            cost[first[i] + s] += low
            for t in range(columns):
                tables[base + s * columns + t] -= low
        for t in range(columns):
            low = np.inf
            for s in range(rows):
                low = min(low, tables[base + s * columns + t])
            if low != 0:
                cost[first[j] + t] += low
                for s in range(rows):
                    tables[base + s * columns + t] -= low
        zero = True
        for k in range(base, base + rows * columns):
            if tables[k] != 0:
                zero = False
                break
        empty[e] = zero
    return empty


@njit
def choose_mergers(first, cost, edges, at, tables, holders, holder_at, holding, room):
    """Nodes that follow another: ``parent[y] = x`` and for each strategy of x the one of y.

    y follows x where an edge leaves one strategy of y to each of x, or where y has no other edge
    and one of its strategies is best, in cost and in each interval, for each of x. ``room``: how
    many times more entries the tables of y may take after it.
    """
    nodes = len(first) - 1
    sizes = first[1:] - first[:-1]
    begin, _ = adjacency(nodes, edges)
    parent = np.arange(nodes)
    map_at = np.full(nodes, -1, np.int64)
    maps = np.empty(16, np.int64)
    used = 0
    for e in range(len(edges)):
        for side in range(2):
            x, y = edges[e, side], edges[e, 1 - side]
            if parent[y] != y:
                continue
            top = x
            while parent[top] != top:
                top = parent[top]
            if top == y:
                continue
            degree = begin[y + 1] - begin[y]
            if degree > 1 and sizes[x] > room * sizes[y]:
                continue
            while used + sizes[x] > len(maps):
                maps = np.concatenate((maps, np.empty(len(maps), np.int64)))
            follows = True
            for s in range(sizes[x]):
                best, low = -1, np.inf
                count = 0
                for t in range(sizes[y]):
                    k = s * sizes[y] + t if side == 0 else t * sizes[x] + s
                    value = tables[at[e] + k]
                    if value < np.inf:
                        count += 1
                        value += cost[first[y] + t]
                        if value < low:
                            best, low = t, value
                if count == 0:
                    best = 0
                elif count > 1:
                    if degree > 1:
                        follows = False
                        break
                    # Of strategies that cost the same the one that holds least.
                    for t in range(sizes[y]):
                        k = s * sizes[y] + t if side == 0 else t * sizes[x] + s
                        if tables[at[e] + k] + cost[first[y] + t] == low:
                            less = True
                            for h in range(holders[y], holders[y + 1]):
                                if holding[holder_at[h] + t] > holding[holder_at[h] + best]:
                                    less = False
                                    break
                            if less:
                                best = t
                    for t in range(sizes[y]):
                        k = s * sizes[y] + t if side == 0 else t * sizes[x] + s
                        if tables[at[e] + k] == np.inf:
                            continue
                        for h in range(holders[y], holders[y + 1]):
                            if holding[holder_at[h] + t] < holding[holder_at[h] + best]:
                                follows = False
                                break
                        if not follows:
                            break
                    if not follows:
                        break
                maps[used + s] = best
            if follows:
                parent[y] = x
                map_at[y] = used
                used += sizes[x]
    return parent, map_at, maps[:used]


@njit
def resolve(first, parent, map_at, maps):
    """Roots, and for each node the strategy for each of its root's: flat from ``begin``."""
    nodes = len(parent)
    root = np.empty(nodes, np.int64)
    begin = np.zeros(nodes + 1, np.int64)
    for i in range(nodes):
        top = i
        while parent[top] != top:
            top = parent[top]
        root[i] = top
        begin[i + 1] = begin[i] + first[top + 1] - first[top]
    full = np.empty(begin[-1], np.int64)
    path = np.empty(nodes, np.int64)
    for i in range(nodes):
        depth = 0
        top = i
        while parent[top] != top:
            path[depth] = top
            depth += 1
            top = parent[top]
        for s in range(first[top + 1] - first[top]):
            value = s
            for d in range(depth - 1, -1, -1):
                value = maps[map_at[path[d]] + value]
            full[begin[i] + s] = value
    return root, begin, full


@njit
def merge(first, cost, edges, at, tables, root, follow_at, follow):
    """The graph of the roots alone: costs and tables of followers in terms of their roots."""
    nodes = len(first) - 1
    number = np.full(nodes, -1, np.int64)
    count = 0
    for i in range(nodes):
        if root[i] == i:
            number[i] = count
            count += 1
    new_first = np.zeros(count + 1, np.int64)
    for i in range(nodes):
        if root[i] == i:
            new_first[number[i] + 1] = first[i + 1] - first[i]
    for i in range(count):
        new_first[i + 1] += new_first[i]
    new_cost = np.zeros(new_first[-1], np.float64)
    for i in range(nodes):
        r = number[root[i]]
        for s in range(new_first[r + 1] - new_first[r]):
            new_cost[new_first[r] + s] += cost[first[i] + follow[follow_at[i] + s]]
    # Edges of the same two roots become one.
    low = np.empty(len(edges), np.int64)
    high = np.empty(len(edges), np.int64)
    for e in range(len(edges)):
        a, b = number[root[edges[e, 0]]], number[root[edges[e, 1]]]
        low[e], high[e] = min(a, b), max(a, b)
    order = np.argsort(low * count + high)
    target = np.full(len(edges), -1, np.int64)
    pairs = np.empty((len(edges), 2), np.int64)
    new_at = np.zeros(len(edges) + 1, np.int64)
    kept = 0
    for e in order:
        a, b = low[e], high[e]
        if a == b:
            continue
        if kept == 0 or pairs[kept - 1, 0] != a or pairs[kept - 1, 1] != b:
            pairs[kept, 0], pairs[kept, 1] = a, b
            size = (new_first[a + 1] - new_first[a]) * (new_first[b + 1] - new_first[b])
            new_at[kept + 1] = new_at[kept] + size
            kept += 1
        target[e] = kept - 1
    new_tables = np.zeros(new_at[kept], np.float64)
    for e in range(len(edges)):
        i, j = edges[e]
        a, b = number[root[i]], number[root[j]]
        columns = first[j + 1] - first[j]
        if a == b:
            for s in range(new_first[a + 1] - new_first[a]):
                k = follow[follow_at[i] + s] * columns + follow[follow_at[j] + s]
                new_cost[new_first[a] + s] += tables[at[e] + k]
            continue
        rows_a, rows_b = new_first[a + 1] - new_first[a], new_first[b + 1] - new_first[b]
        base = new_at[target[e]]
        for s in range(rows_a):
            row = at[e] + follow[follow_at[i] + s] * columns
            for t in range(rows_b):
                value = tables[row + follow[follow_at[j] + t]]
                k = s * rows_b + t if a < b else t * rows_a + s
                new_tables[base + k] += value
    return new_first, new_cost, pairs[:kept].copy(), new_at[:kept].copy(), new_tables, number
