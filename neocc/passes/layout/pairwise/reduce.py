"""Smaller problems with the same optimum.

Until nothing changes: strategies without a partner or dominated by another go; what a table has
per row or column moves to the nodes; nodes whose strategy another decides follow it; parallel
edges become one. Usage that no choice changes is taken off the limit, and of the times only those
are kept whose live nodes are not all live at another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neocc.passes.layout.pairwise import reduce_kernels as kernels
from neocc.passes.layout.pairwise.problem import Floats, Ints, Problem

ROOM = 4.0  # a follower's tables may grow by this much: fewer nodes for bigger tables


@dataclass(frozen=True)
class Reduced:
    """What is left, and the way back.

    A node may hold memory over several intervals: ``holders[i]:holders[i + 1]`` are those of node
    ``i``; holder ``h`` holds ``holding[holder_at[h] + s]`` in slots ``begin[h] <= t < end[h]``
    where the node takes strategy ``s``. ``room`` is what each slot has for them.
    """

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
    room: Ints
    root: Ints  # of each original node
    origin_at: Ints
    origin: Ints  # original strategy of each original node per strategy of its root

    @property
    def nodes(self) -> int:
        return len(self.first) - 1

    def lift(self, picked: Ints) -> Ints:
        """Strategies of the original nodes."""
        return self.origin[self.origin_at + picked[self.root]]


@dataclass
class _State:
    first: Ints
    cost: Floats
    edges: Ints
    at: Ints
    tables: Floats
    root: Ints
    origin_at: Ints
    origin: Ints
    holders: Ints
    holder_at: Ints
    holding: Ints
    begin: Ints
    end: Ints
    fixed: Ints  # usage by time that no choice changes


def reduce(problem: Problem, room: float = ROOM) -> Reduced | None:
    """The smaller problem; None if nothing allowed is left for some node or time."""
    last = int(problem.end.max(initial=0)) + 1
    nodes = problem.nodes
    state = _State(
        problem.first, problem.cost.copy(), problem.edges.copy(), problem.at,
        problem.tables.copy(), np.arange(nodes), problem.first[:-1].copy(),
        np.arange(len(problem.cost)) - np.repeat(problem.first[:-1], problem.strategies),
        np.arange(nodes + 1), problem.first[:-1].copy(), problem.usage.copy(),
        problem.begin, problem.end, np.zeros(last, np.int64),
    )  # fmt: skip
    _hold(problem, state)
    # Everybody follows himself: parallel edges become one.
    _merge(problem, state, np.arange(nodes), state.first[:-1].copy(), state.origin.copy())
    while True:
        before = len(state.cost), len(state.edges)
        if not _drop(problem, state):
            return None
        empty = kernels.split_sums(state.first, state.cost, state.edges, state.at, state.tables)
        state.edges, state.at = state.edges[~empty], state.at[~empty]
        parent, map_at, maps = kernels.choose_mergers(
            state.first, state.cost, state.edges, state.at, state.tables,
            state.holders, state.holder_at, state.holding, room,
        )  # fmt: skip
        root, follow_at, follow = kernels.resolve(state.first, parent, map_at, maps)
        _merge(problem, state, root, follow_at, follow)
        if (len(state.cost), len(state.edges)) == before:
            break
    return _finish(problem, state)


def _drop(problem: Problem, state: _State) -> bool:
    alive = np.ones(len(state.cost), np.bool_)
    kernels.unsupported(state.first, state.cost, state.edges, state.at, state.tables, alive)
    kernels.dominated(
        state.first, state.cost, state.edges, state.at, state.tables,
        state.holders, state.holder_at, state.holding, alive,
    )  # fmt: skip
    counts = np.add.reduceat(alive, state.first[:-1]) if len(alive) else np.ones(0)
    if not (counts > 0).all():
        return False
    if not alive.all():
        old = state.first
        state.first, state.cost, state.at, state.tables, kept = kernels.keep_alive(
            old, state.cost, state.edges, state.at, state.tables, alive
        )
        local = kept - np.repeat(old[:-1], np.diff(state.first))
        sizes = np.diff(state.first)[state.root]
        at = np.concatenate([[0], np.cumsum(sizes)])
        inner = np.arange(at[-1]) - np.repeat(at[:-1], sizes)
        picked = local[np.repeat(state.first[state.root], sizes) + inner]
        state.origin = state.origin[np.repeat(state.origin_at, sizes) + picked]
        state.origin_at = at[:-1]
        _hold(problem, state)
    return True


def _merge(problem: Problem, state: _State, root: Ints, follow_at: Ints, follow: Ints) -> None:
    first, cost, edges, at, tables, number = kernels.merge(
        state.first, state.cost, state.edges, state.at, state.tables, root, follow_at, follow
    )
    old_root = state.root
    new_root = number[root[old_root]]
    sizes = np.diff(first)[new_root]
    start = np.concatenate([[0], np.cumsum(sizes)])
    inner = np.arange(start[-1]) - np.repeat(start[:-1], sizes)
    taken = follow[np.repeat(follow_at[old_root], sizes) + inner]
    state.origin = state.origin[np.repeat(state.origin_at, sizes) + taken]
    state.origin_at = start[:-1]
    state.root = new_root
    state.first, state.cost, state.edges, state.at, state.tables = first, cost, edges, at, tables
    _hold(problem, state)


def _hold(problem: Problem, state: _State) -> None:
    """Holders of each root out of its original nodes: equal intervals together, the part that no
    choice changes apart."""
    nodes = len(state.first) - 1
    sizes = np.diff(state.first)
    live = np.flatnonzero(problem.begin < problem.end)
    order = live[np.lexsort((problem.end[live], problem.begin[live], state.root[live]))]
    key = np.stack([state.root[order], problem.begin[order], problem.end[order]], axis=1)
    new = np.ones(len(order), np.bool_)
    new[1:] = (key[1:] != key[:-1]).any(axis=1)
    group = np.cumsum(new) - 1
    heads = order[new]
    root, begin, end = state.root[heads], problem.begin[heads], problem.end[heads]
    at = np.concatenate([[0], np.cumsum(sizes[root])]).astype(np.int64)
    holding = np.zeros(at[-1], np.int64)
    count = sizes[state.root[order]]
    inner = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    picked = state.origin[np.repeat(state.origin_at[order], count) + inner]
    usage = problem.usage[np.repeat(problem.first[order], count) + picked]
    np.add.at(holding, np.repeat(at[group], count) + inner, usage)
    low = np.minimum.reduceat(holding, at[:-1]) if len(heads) else holding
    high = np.maximum.reduceat(holding, at[:-1]) if len(heads) else holding
    fixed = np.zeros_like(state.fixed)
    np.add.at(fixed, begin, low)
    np.subtract.at(fixed, end, low)
    state.fixed = np.cumsum(fixed)
    holding -= np.repeat(low, sizes[root])
    keep = high > low
    entries = np.repeat(keep, sizes[root])
    root, begin, end = root[keep], begin[keep], end[keep]
    state.begin, state.end, state.holding = begin, end, holding[entries]
    state.holder_at = (np.cumsum(sizes[root]) - sizes[root]).astype(np.int64)
    state.holders = np.searchsorted(root, np.arange(nodes + 1)).astype(np.int64)


def _finish(problem: Problem, state: _State) -> Reduced | None:
    room = problem.limit - state.fixed
    if (room < 0).any():
        return None
    begin, end, tight = _slots(state, room)
    return Reduced(
        state.first, state.cost, state.edges, state.at, state.tables,
        state.holders, state.holder_at, state.holding, begin, end, tight,
        state.root, state.origin_at, state.origin,
    )  # fmt: skip


def _slots(state: _State, room: Ints) -> tuple[Ints, Ints, Ints]:
    """Begin, end and room in slots in place of times.

    Times between two events are one slot, of the least room; slots that cannot be overfilled go,
    and those whose holders are all live in the slot before or after, where there is no more room.
    """
    starts, ends = np.zeros(len(room) + 1, np.bool_), np.zeros(len(room) + 1, np.bool_)
    starts[state.begin], ends[state.end] = True, True
    starts[0] = True
    cuts = np.flatnonzero((starts | ends)[: len(room)])
    tight = np.minimum.reduceat(room, cuts)
    begin, end = np.searchsorted(cuts, state.begin), np.searchsorted(cuts, state.end)
    most = np.maximum.reduceat(state.holding, state.holder_at) if len(begin) else begin
    total = np.zeros(len(cuts) + 1, np.int64)
    np.add.at(total, begin, most)
    np.subtract.at(total, end, most)
    keep = np.cumsum(total)[:-1] > tight
    keep[:-1] &= ends[cuts[1:]] | (tight[1:] > tight[:-1])
    keep[1:] &= starts[cuts[1:]] | (tight[:-1] > tight[1:])
    number = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return number[begin], number[end], tight[keep]
