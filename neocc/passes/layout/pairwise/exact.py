"""What is left of a problem, when it is small: proved optimal by HiGHS.

A 0/1 column per strategy and a continuous one per pair across an edge (the local polytope, which is
integral more often than not), less those that the messages rule out: whatever contains them costs
more than the assignment in hand. Memory rows come as solutions break them. A few do where slots
are thousands.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import highspy
import numpy as np

from neocc.passes.layout.formulate import THREADS, Quiet
from neocc.passes.layout.pairwise.graph import Graph, load_in
from neocc.passes.layout.pairwise.messages import Messages, load_of_weights, raises
from neocc.passes.layout.pairwise.problem import Floats, Ints

PAIRS = 100_000  # pairs left at most, for a problem to be small
NEAR = 20  # slots: of excesses so close to each other one gets a row
ROWS = 30  # memory rows added at once
TRUST = 1e-6  # of the cost, taken off bounds: what HiGHS's tolerances may have added


@dataclass(frozen=True)
class Left:
    """Strategies and pairs that an assignment cheaper than ``cost`` may have, as masks."""

    strategies: np.ndarray
    pairs: np.ndarray
    cost: float

    @property
    def small(self) -> bool:
        return int(self.pairs.sum()) <= PAIRS


def left(messages: Messages, prices: Floats, cost: float) -> Left:
    """What the bound of these messages, raised by each strategy and pair, does not rule out."""
    messages.price(prices)
    slack = cost - messages.bound(prices) + TRUST * abs(cost)
    graph = messages.graph
    by_strategy, by_pair = raises(
        graph, messages.priced, messages.at, messages.values, messages.share, messages.before,
        messages.total,
    )  # fmt: skip
    strategies = by_strategy <= slack
    rows = np.diff(graph.first)[graph.edges[:, 0]]
    columns = np.diff(graph.first)[graph.edges[:, 1]]
    sizes = rows * columns
    inner = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    wide = np.repeat(columns, sizes)
    one = np.repeat(graph.first[graph.edges[:, 0]], sizes) + inner // wide
    two = np.repeat(graph.first[graph.edges[:, 1]], sizes) + inner % wide
    where = np.repeat(graph.at, sizes) + inner
    pairs = np.zeros(len(graph.tables), np.bool_)
    pairs[where] = (by_pair[where] <= slack) & strategies[one] & strategies[two]
    return Left(strategies, pairs, cost)


def exact(graph: Graph, kept: Left, prices: Floats, seconds: float) -> tuple[Ints | None, float]:
    """The best assignment of what is left, if one was found, and a bound on all of them.

    The bound is for assignments cheaper than ``kept.cost``, so at most that. ``prices`` say which
    memory rows to begin with.
    """
    begin = time.perf_counter()
    program = _Program(graph, kept)
    rows = set(np.flatnonzero(prices > 0)[-ROWS:].tolist())
    for slot in rows:
        program.limit(slot)
    low = -math.inf
    whole = False
    while (spare := seconds - (time.perf_counter() - begin)) > 0:
        found = program.solve(spare, whole)
        if found is None:  # nothing is cheaper than the cost in hand, or it is not known in time
            return None, kept.cost - TRUST * program.unit if program.empty else low
        weight, bound = found
        low = max(low, min(bound, kept.cost))
        if whole:
            picked = program.picked(weight)
            load = load_in(graph, picked)
        else:
            picked, load = None, load_of_weights(graph, weight)
        slots = [s for s in _worst(load - graph.room) if s not in rows]
        if slots:
            rows.update(slots)
            for slot in slots:
                program.limit(slot)
        elif whole:
            return picked, low
        else:
            whole = True
    return None, low


def _worst(excess: Floats) -> list[int]:
    """Slots over their room, the worst first, none near another."""
    unit = max(1.0, float(np.abs(excess).max(initial=0.0)))
    near = np.zeros(len(excess), np.bool_)
    found: list[int] = []
    for slot in np.argsort(-excess):
        if excess[slot] <= 1e-7 * unit or len(found) == ROWS:
            break
        if not near[slot]:
            near[max(0, slot - NEAR) : slot + NEAR + 1] = True
            found.append(int(slot))
    return found


class _Program:
    """The mixed-integer program; costs are in units of the cost in hand."""

    def __init__(self, graph: Graph, kept: Left):
        self.graph, self.kept = graph, kept
        self.empty = False
        self.unit = max(abs(kept.cost), 1e-12)
        self.room = max(1.0, float(graph.room.max(initial=0.0)))
        self.column = np.cumsum(kept.strategies) - 1
        self.strategies = int(kept.strategies.sum())
        self.solver = self._solver()

    def _solver(self) -> highspy.Highs:
        graph, kept = self.graph, self.kept
        costs = [graph.cost[kept.strategies]]
        row: list[Ints] = []
        column: list[Ints] = []
        value: list[Floats] = []
        right: list[float] = []

        def add(rows: Ints, columns: Ints, sign: float) -> None:
            row.append(rows)
            column.append(columns)
            value.append(np.full(len(rows), sign))

        count = self.strategies
        for i in range(len(graph.first) - 1):
            alive = np.flatnonzero(kept.strategies[graph.first[i] : graph.first[i + 1]])
            add(np.full(len(alive), len(right)), self.column[graph.first[i] + alive], 1.0)
            right.append(1.0)
        for e, (i, j) in enumerate(graph.edges):
            ends = [slice(graph.first[v], graph.first[v + 1]) for v in (i, j)]
            shape = tuple(s.stop - s.start for s in ends)
            span = slice(graph.at[e], graph.at[e] + shape[0] * shape[1])
            pairs = np.flatnonzero(kept.pairs[span])
            costs.append(graph.tables[span][pairs])
            sides = np.unravel_index(pairs, shape)
            for end, side in zip(ends, sides, strict=True):
                alive = np.flatnonzero(kept.strategies[end])
                place = np.cumsum(kept.strategies[end]) - 1 + len(right)
                add(place[side], count + np.arange(len(pairs)), 1.0)
                add(place[alive], self.column[end][alive], -1.0)
                right += [0.0] * len(alive)
            count += len(pairs)
        rows, columns = np.concatenate(row), np.concatenate(column)
        order = np.lexsort((rows, columns))
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = count, len(right)
        self.costs = np.concatenate(costs) / self.unit
        lp.col_cost_ = self.costs
        lp.col_lower_, lp.col_upper_ = np.zeros(count), np.ones(count)
        lp.row_lower_ = lp.row_upper_ = np.array(right)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.concatenate(
            [[0], np.cumsum(np.bincount(columns, minlength=count))]
        )
        lp.a_matrix_.index_ = rows[order]
        lp.a_matrix_.value_ = np.concatenate(value)[order]
        solver = self._options(Quiet())
        solver.passModel(lp)
        return solver

    def _options(self, solver: highspy.Highs) -> highspy.Highs:
        solver.setOptionValue("threads", THREADS)
        solver.setOptionValue("mip_rel_gap", 1e-9)
        for kind in ("mip", "primal", "dual"):
            # A choice that is whole but for 1e-6 may dodge a cost a million times its own.
            solver.setOptionValue(f"{kind}_feasibility_tolerance", 1e-9)
        return solver

    def limit(self, slot: int) -> None:
        """Add the row of a slot."""
        graph = self.graph
        held = np.zeros(len(graph.cost))
        sizes = np.diff(graph.first)
        owner = np.repeat(np.arange(len(sizes)), np.diff(graph.holders))
        for h in np.flatnonzero((graph.begin <= slot) & (slot < graph.end)):
            first, size = graph.first[owner[h]], sizes[owner[h]]
            held[first : first + size] += graph.holding[
                graph.holder_at[h] : graph.holder_at[h] + size
            ]
        held = held[self.kept.strategies] / self.room
        index = np.flatnonzero(held)
        self.solver.addRow(
            -highspy.kHighsInf, float(graph.room[slot] / self.room), len(index),
            index.astype(np.int32), held[index],
        )  # fmt: skip

    def solve(self, seconds: float, whole: bool) -> tuple[Floats, float] | None:
        """Weights of all strategies and a bound; None if there is no solution, or none in time that
        adds up to the objective that HiGHS reports."""
        solver = self.solver
        chosen = np.arange(self.strategies, dtype=np.int32)
        if whole:
            # A fresh solver: one that has solved the relaxation may misreport the objective.
            solver = self._options(Quiet())
            solver.passModel(self.solver.getLp())
            kind = np.full(self.strategies, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
            solver.changeColsIntegrality(self.strategies, chosen, kind)
        solver.setOptionValue("time_limit", solver.getRunTime() + seconds)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        self.empty = status == highspy.HighsModelStatus.kInfeasible
        if status != highspy.HighsModelStatus.kOptimal:
            return None
        solution = np.array(solver.getSolution().col_value)
        if abs(self.costs @ solution - info.objective_function_value) > TRUST:
            return None
        weight = np.zeros(len(self.graph.cost))
        weight[self.kept.strategies] = solution[chosen]
        bound = info.mip_dual_bound if whole else info.objective_function_value
        return weight, (bound - TRUST * max(1.0, abs(bound))) * self.unit

    def picked(self, weight: Floats) -> Ints:
        """The strategy of each node that weighs most."""
        first = self.graph.first
        return np.array(
            [int(np.argmax(weight[a:b])) for a, b in pairwise(first)],
            dtype=np.int64,
        )
