"""Loops of `search`, compiled: blocks of nodes solved by dynamic programming.

A block is a random set of nodes whose edges among themselves make a forest; all other nodes stay
as they are. At given prices of memory its best assignment is exact. The prices start as the whole
problem's and climb by subgradient steps towards the cost to beat, so that the block either proves
that it has nothing better, or passes assignments on the way of which the best that keeps the room
is taken.
"""

from __future__ import annotations

import numpy as np

from neocc.passes.layout.pairwise.compiled import njit
from neocc.passes.layout.pairwise.graph import over

LIMIT = 4096  # nodes that wait at a block's border


@njit
def grow(random, graph, size, start, skip, scatter, pool, mark, count, block, up, parent):
    """A random block from ``start`` (or anywhere, if negative), without the node ``skip``.

    Fills ``block`` with nodes, ``up`` with the edge to each one's parent and ``parent`` with the
    parent's place in the block, or -1; returns how many. ``scatter``: chance of a new tree.
    """
    border = np.empty(LIMIT, np.int64)
    waiting = 0
    n = 0
    if start >= 0:
        if start == skip:
            for k in range(graph.ring[skip], graph.ring[skip + 1]):
                if waiting < LIMIT:
                    e = graph.around[k]
                    border[waiting] = graph.edges[e, 0] + graph.edges[e, 1] - skip
                    waiting += 1
        else:
            border[0] = start
            waiting = 1
    tries = 0
    while n < size and tries < 4 * size + 20:
        tries += 1
        if waiting == 0 or random.random() < scatter:
            v = pool[random.integers(0, len(pool))]
        else:
            q = random.integers(0, waiting)
            v = border[q]
            waiting -= 1
            border[q] = border[waiting]
        if v == skip or mark[v] != 0 or count[v] > 1:
            continue
        mark[v] = n + 1
        block[n], up[n], parent[n] = v, -1, -1
        for k in range(graph.ring[v], graph.ring[v + 1]):
            e = graph.around[k]
            j = graph.edges[e, 0] + graph.edges[e, 1] - v
            if mark[j] != 0:
                up[n], parent[n] = e, mark[j] - 1
            count[j] += 1
            free = mark[j] == 0 and count[j] == 1 and graph.first[j + 1] - graph.first[j] > 1
            if free and waiting < LIMIT:
                border[waiting] = j
                waiting += 1
        n += 1
    for q in range(n):
        v = block[q]
        mark[v] = 0
        for k in range(graph.ring[v], graph.ring[v + 1]):
            e = graph.around[k]
            count[graph.edges[e, 0]] = 0
            count[graph.edges[e, 1]] = 0
    return n


@njit
def node_costs(graph, picked, n, block, up, parent, mark, offset, own):
    """Costs of block nodes with all that is outside the block; returns the block's cost now."""
    base = 0.0
    for q in range(n):
        mark[block[q]] = q + 1
    for q in range(n):
        v = block[q]
        f = graph.first[v]
        size = graph.first[v + 1] - f
        o = offset[q]
        for s in range(size):
            own[o + s] = graph.cost[f + s]
        for k in range(graph.ring[v], graph.ring[v + 1]):
            e = graph.around[k]
            a, b = graph.edges[e]
            j = b if a == v else a
            if mark[j] != 0:
                continue
            if a == v:
                others = graph.first[j + 1] - graph.first[j]
                for s in range(size):
                    own[o + s] += graph.tables[graph.at[e] + s * others + picked[j]]
            else:
                row = graph.at[e] + picked[j] * size
                for s in range(size):
                    own[o + s] += graph.tables[row + s]
        base += own[o + picked[v]]
        if parent[q] >= 0:
            a, b = graph.edges[up[q]]
            columns = graph.first[b + 1] - graph.first[b]
            base += graph.tables[graph.at[up[q]] + picked[a] * columns + picked[b]]
    for q in range(n):
        mark[block[q]] = 0
    return base


@njit
def segments(graph, picked, n, block, load, sums, change, flag):
    """The block's holders over segments between their ends, in place of slots.

    Returns per holder its node's place, first segment, last segment + 1 and table; per segment the
    least room that the rest leaves, and the price. ``change`` and ``flag`` are zeros on entry and
    on return.
    """
    count = 0
    low, high = len(load), 0
    for q in range(n):
        v = block[q]
        for h in range(graph.holders[v], graph.holders[v + 1]):
            if graph.begin[h] == graph.end[h]:
                continue
            count += 1
            held = graph.holding[graph.holder_at[h] + picked[v]]
            change[graph.begin[h]] += held
            change[graph.end[h]] -= held
            flag[graph.begin[h]] = 1
            flag[graph.end[h]] = 1
            low, high = min(low, graph.begin[h]), max(high, graph.end[h])
    # Slots from low on: number the segments in flag, take the least room of each.
    total = 0
    for t in range(low, high + 1):
        if flag[t] != 0:
            total += 1
            flag[t] = total
    room = np.empty(max(total, 1))
    price = np.zeros(max(total, 1))
    now = -1
    mine = 0.0
    for t in range(low, high):
        if flag[t] != 0:
            now += 1
            mine += change[t]
            room[now] = np.inf
            price[now] = -sums[t]
            if now > 0:
                price[now - 1] += sums[t]
        left = graph.room[t] - load[t] + mine
        if left < room[now]:
            room[now] = left
    if now >= 0:
        price[now] += sums[high]
    place = np.empty(count, np.int64)
    start = np.empty(count, np.int64)
    stop = np.empty(count, np.int64)
    table = np.empty(count, np.int64)
    k = 0
    for q in range(n):
        v = block[q]
        for h in range(graph.holders[v], graph.holders[v + 1]):
            if graph.begin[h] == graph.end[h]:
                continue
            place[k], table[k] = q, graph.holder_at[h]
            start[k], stop[k] = flag[graph.begin[h]] - 1, flag[graph.end[h]] - 1
            k += 1
    for q in range(n):
        v = block[q]
        for h in range(graph.holders[v], graph.holders[v + 1]):
            flag[graph.begin[h]] = 0
            flag[graph.end[h]] = 0
            change[graph.begin[h]] = 0
            change[graph.end[h]] = 0
    return place, start, stop, table, room[: now + 1], price[: now + 1]


@njit
def tree_best(graph, n, up, parent, offset, back_at, value, back, new):
    """The best assignment of a forest with node costs ``value`` (used up); returns its cost."""
    total = 0.0
    for q in range(n - 1, -1, -1):
        o = offset[q]
        size = offset[q + 1] - o
        if parent[q] < 0:
            low, best = np.inf, 0
            for s in range(size):
                if value[o + s] < low:
                    low, best = value[o + s], s
            new[q] = best
            total += low
            continue
        p, e = parent[q], up[q]
        others = offset[p + 1] - offset[p]
        # The child is the edge's first end if its node number is: rows are the first end's.
        row = back_at[q] >= 0
        where = back_at[q] if row else -back_at[q] - 1
        for t in range(others):
            low, best = np.inf, 0
            at = graph.at[e] + (t if row else t * size)
            step = others if row else 1
            for s in range(size):
                d = value[o + s] + graph.tables[at + s * step]
                if d < low:
                    low, best = d, s
            value[offset[p] + t] += low
            back[where + t] = best
    for q in range(n):
        if parent[q] >= 0:
            where = back_at[q] if back_at[q] >= 0 else -back_at[q] - 1
            new[q] = back[where + new[parent[q]]]
    return total


@njit
def solve_block(graph, picked, load, sums, n, block, up, parent, rounds, mark, change, flag):
    """Improve the block in place; returns how much its cost changed.

    Less overload comes first, then less cost. ``sums``: prices of the slots, summed from 0.
    """
    offset = np.zeros(n + 1, np.int64)
    back_at = np.zeros(n, np.int64)
    used = 0
    for q in range(n):
        v = block[q]
        offset[q + 1] = offset[q] + graph.first[v + 1] - graph.first[v]
        if parent[q] >= 0:
            back_at[q] = used if graph.edges[up[q], 0] == v else -used - 1
            p = block[parent[q]]
            used += graph.first[p + 1] - graph.first[p]
    own = np.empty(offset[n])
    value = np.empty(offset[n])
    back = np.empty(used, np.int32)
    new = np.empty(n, np.int64)
    best = np.empty(n, np.int64)
    base = node_costs(graph, picked, n, block, up, parent, mark, offset, own)
    place, start, stop, table, room, price = segments(
        graph, picked, n, block, load, sums, change, flag
    )
    holders, length = len(place), len(room)
    held = np.zeros(length + 1)
    for h in range(holders):
        amount = graph.holding[table[h] + picked[block[place[h]]]]
        held[start[h]] += amount
        held[stop[h]] -= amount
    over_now, running = 0.0, 0.0
    for t in range(length):
        running += held[t]
        over_now += max(0.0, running - room[t])
    best_cost, best_over, found = base, over_now, False
    inner = np.zeros(length + 1)
    tiny = 1e-9 * (1 + abs(base))
    for turn in range(rounds):
        for t in range(length):
            inner[t + 1] = inner[t] + price[t]
        for k in range(offset[n]):
            value[k] = own[k]
        for h in range(holders):
            w = inner[stop[h]] - inner[start[h]]
            if w > 0:
                q = place[h]
                for s in range(offset[q + 1] - offset[q]):
                    value[offset[q] + s] += w * graph.holding[table[h] + s]
        low = tree_best(graph, n, up, parent, offset, back_at, value, back, new)
        cost = 0.0
        for q in range(n):
            cost += own[offset[q] + new[q]]
            if parent[q] >= 0:
                p = parent[q]
                mine, other = new[q], new[p]
                if back_at[q] >= 0:
                    k = mine * (offset[p + 1] - offset[p]) + other
                else:
                    k = other * (offset[q + 1] - offset[q]) + mine
                cost += graph.tables[graph.at[up[q]] + k]
        for t in range(length + 1):
            held[t] = 0.0
        for h in range(holders):
            amount = graph.holding[table[h] + new[place[h]]]
            held[start[h]] += amount
            held[stop[h]] -= amount
        running, over_new, norm = 0.0, 0.0, 0.0
        for t in range(length):
            running += held[t]
            held[t] = running
        for t in range(length):
            low -= price[t] * room[t]
            held[t] -= room[t]
            over_new += max(0.0, held[t])
            if price[t] <= 0 and held[t] < 0:
                held[t] = 0.0
            norm += held[t] * held[t]
        less = over_new < best_over - 1e-6
        if less or (over_new <= best_over and cost < best_cost - tiny):
            best_cost, best_over, found = cost, over_new, True
            for q in range(n):
                best[q] = new[q]
        if norm == 0 or (best_over <= 0 and low >= best_cost - tiny):
            break
        if best_over <= 0:
            step = (best_cost - low) / norm
        else:
            step = 0.1 * 1.3**turn * max(abs(low), 1.0) / norm
        for t in range(length):
            price[t] = max(0.0, price[t] + step * held[t])
    if not found:
        return 0.0
    take(graph, picked, load, n, block, best, change)
    return best_cost - base


@njit
def take(graph, picked, load, n, block, new, change):
    """Give the block's nodes their new strategies and the slots their new loads."""
    low, high = len(load), 0
    for q in range(n):
        v = block[q]
        if picked[v] == new[q]:
            continue
        for h in range(graph.holders[v], graph.holders[v + 1]):
            at = graph.holder_at[h]
            amount = graph.holding[at + new[q]] - graph.holding[at + picked[v]]
            change[graph.begin[h]] += amount
            change[graph.end[h]] -= amount
            low, high = min(low, graph.begin[h]), max(high, graph.end[h])
        picked[v] = new[q]
    running = 0.0
    for t in range(low, high):
        running += change[t]
        load[t] += running
        change[t] = 0.0
    if high >= low:
        change[high] = 0.0


@njit
def improve(random, graph, picked, load, prices, pool, blocks, smallest, largest, rounds):
    """Solve so many random blocks; sizes are spread evenly in the logarithm."""
    nodes = len(graph.first) - 1
    mark, count = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    change, flag = np.zeros(len(load) + 1), np.zeros(len(load) + 1, np.int64)
    block, up = np.empty(largest, np.int64), np.empty(largest, np.int64)
    parent = np.empty(largest, np.int64)
    sums = np.zeros(len(load) + 1)
    sums[1:] = np.cumsum(prices)
    for _ in range(blocks):
        size = int(smallest * (largest / smallest) ** random.random())
        scatter = 0.02 if random.random() < 0.5 else 0.2
        n = grow(random, graph, size, -1, -1, scatter, pool, mark, count, block, up, parent)
        solve_block(graph, picked, load, sums, n, block, up, parent, rounds, mark, change, flag)


@njit
def kick(random, graph, picked, load, prices, pool, kicks, largest, rounds):
    """Force a random node to a random strategy, mend around it, keep what is no worse.

    Blocks around the node are solved without it, then one with it. Assignments that keep the room
    stay so. Returns how much cost changed.
    """
    nodes = len(graph.first) - 1
    mark, count = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    change, flag = np.zeros(len(load) + 1), np.zeros(len(load) + 1, np.int64)
    block, up = np.empty(largest, np.int64), np.empty(largest, np.int64)
    parent = np.empty(largest, np.int64)
    sums = np.zeros(len(load) + 1)
    sums[1:] = np.cumsum(prices)
    was, before = picked.copy(), load.copy()
    new = np.empty(1, np.int64)
    total = 0.0
    for _ in range(kicks):
        v = pool[random.integers(0, len(pool))]
        size = graph.first[v + 1] - graph.first[v]
        new[0] = (picked[v] + random.integers(1, size)) % size
        block[0], up[0], parent[0] = v, -1, -1
        was[:] = picked
        before[:] = load
        delta = -node_costs(
            graph, picked, 1, block, up, parent, mark, np.zeros(2, np.int64), np.empty(size)
        )
        take(graph, picked, load, 1, block, new, change)
        delta += node_costs(
            graph, picked, 1, block, up, parent, mark, np.zeros(2, np.int64), np.empty(size)
        )
        for turn in range(4):
            start = v
            skip = v if turn < 3 else -1
            wide = int(4 * (largest / 4) ** random.random()) if largest > 4 else largest
            n = grow(random, graph, wide, start, skip, 0.0, pool, mark, count, block, up, parent)
            if n == 0:
                continue
            delta += solve_block(
                graph, picked, load, sums, n, block, up, parent, rounds, mark, change, flag
            )
        keep = delta <= 0
        if keep:
            for t in range(len(load)):
                if load[t] > graph.room[t] and load[t] > before[t]:
                    keep = False
                    break
        if keep:
            total += delta
        else:
            picked[:] = was
            load[:] = before
    return total


@njit
def cross(graph, picked, load, other):
    """Take from another assignment what is better there.

    The nodes that differ fall into pieces that no edge joins: each piece is worth what it is worth
    whatever becomes of the others. Those that cost less and overfill nothing more are taken.
    Returns how much cost changed.
    """
    nodes = len(graph.first) - 1
    piece = np.zeros(nodes, np.int64)
    block, old, new = (
        np.empty(nodes, np.int64),
        np.empty(nodes, np.int64),
        np.empty(nodes, np.int64),
    )
    change = np.zeros(len(load) + 1)
    before = over(load, graph.room)
    total, pieces = 0.0, 0
    for v in range(nodes):
        if piece[v] != 0 or picked[v] == other[v]:
            continue
        pieces += 1
        piece[v], block[0], n = pieces, v, 1
        delta, q = 0.0, 0
        while q < n:
            i = block[q]
            old[q], new[q] = picked[i], other[i]
            q += 1
            delta += graph.cost[graph.first[i] + other[i]] - graph.cost[graph.first[i] + picked[i]]
            for k in range(graph.ring[i], graph.ring[i + 1]):
                e = graph.around[k]
                a, b = graph.edges[e]
                j = a + b - i
                if picked[j] != other[j] and piece[j] == 0:
                    piece[j], block[n] = pieces, j
                    n += 1
                if piece[j] == pieces and j < i:
                    continue  # the edge counts at its lower end
                columns = graph.first[b + 1] - graph.first[b]
                delta -= graph.tables[graph.at[e] + picked[a] * columns + picked[b]]
                delta += graph.tables[graph.at[e] + other[a] * columns + other[b]]
        if delta >= 0:
            continue
        take(graph, picked, load, n, block, new, change)
        after = over(load, graph.room)
        if after > before:
            take(graph, picked, load, n, block, old, change)
        else:
            before, total = after, total + delta
    return total
