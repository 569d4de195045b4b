"""The problem that a layout comes down to: one strategy per node, priced alone and in pairs.

    minimise    sum of cost[i, x_i] over nodes + sum of table[e][x_i, x_j] over edges e = (i, j)
    subject to  at each time t, the sum of usage[i, x_i] over nodes live at t  <=  limit

A node is live at the times ``begin <= t < end``. A forbidden strategy or pair costs infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neocc.ir.errors import NeoccError

Floats = np.ndarray
Ints = np.ndarray

FORBIDDEN = float("inf")


class BadProblem(NeoccError):
    """The arrays do not make a problem; the message names the node or edge."""


@dataclass(frozen=True)
class Problem:
    """Nodes and edges, flat.

    Strategy ``s`` of node ``i`` is entry ``first[i] + s`` of ``cost`` (float64) and of ``usage``
    (int64, the unit is the limit's). Edge ``e`` joins ``edges[e] = (i, j)``; its table, a row per
    strategy of ``i``, begins at ``tables[at[e]]``.
    """

    first: Ints
    cost: Floats
    usage: Ints
    begin: Ints
    end: Ints
    edges: Ints
    at: Ints
    tables: Floats
    limit: int

    @property
    def nodes(self) -> int:
        return len(self.begin)

    def table(self, edge: int) -> Floats:
        i, j = self.edges[edge]
        rows, columns = self.strategies[i], self.strategies[j]
        return self.tables[self.at[edge] : self.at[edge] + rows * columns].reshape(rows, columns)

    @property
    def strategies(self) -> Ints:
        """Number of strategies per node."""
        return np.diff(self.first)


def make_problem(
    costs: Sequence[Sequence[float]],
    usages: Sequence[Sequence[int]],
    intervals: Sequence[tuple[int, int]],
    edges: Sequence[tuple[int, int]],
    tables: Sequence[Sequence[float]],
    limit: int | None,
) -> Problem:
    """A problem out of lists, one item per node or edge; a table is flat and row-major.

    Raises BadProblem if they do not fit together.
    """
    counts = np.array([len(c) for c in costs], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if not len(counts) == len(usages) == len(intervals):
        raise BadProblem(
            f"{len(counts)} nodes have costs, {len(usages)} usages and {len(intervals)} intervals"
        )
    for i, (cost, usage, interval) in enumerate(zip(costs, usages, intervals, strict=True)):
        if not len(cost) == len(usage) > 0:
            raise BadProblem(f"node {i} has {len(cost)} costs and {len(usage)} usages")
        if len(interval) != 2 or interval[0] < 0:
            raise BadProblem(f"node {i} is live over {interval}: not times from 0 on")
    if len(edges) != len(tables):
        raise BadProblem(f"{len(edges)} edges have {len(tables)} tables")
    for e, (ends, table) in enumerate(zip(edges, tables, strict=True)):
        if len(ends) != 2 or not all(0 <= i < len(counts) for i in ends):
            raise BadProblem(f"edge {e} joins {ends}: not two of the {len(counts)} nodes")
        if len(table) != counts[ends[0]] * counts[ends[1]]:
            raise BadProblem(
                f"edge {e} has {len(table)} costs for {counts[ends[0]]} x {counts[ends[1]]} pairs"
            )
    spans = np.array(intervals, dtype=np.int64).reshape(-1, 2)
    sizes = np.array([len(t) for t in tables], dtype=np.int64)
    flat_usage = _flat(usages, np.int64, int(first[-1]))
    if len(flat_usage) and flat_usage.min() < 0:
        raise BadProblem("a usage is negative")
    return Problem(
        first=first,
        cost=_flat(costs, np.float64, int(first[-1])),
        usage=flat_usage,
        begin=spans[:, 0].copy(),
        end=spans[:, 1].copy(),
        edges=np.array(edges, dtype=np.int64).reshape(-1, 2),
        at=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)[:-1],
        tables=_flat(tables, np.float64, int(sizes.sum())),
        limit=int(flat_usage.sum()) if limit is None else limit,
    )


def _flat(rows: Sequence[Sequence[float]], dtype: type, size: int) -> np.ndarray:
    flat = np.empty(size, dtype=dtype)
    position = 0
    for row in rows:
        flat[position : position + len(row)] = row
        position += len(row)
    return flat


def cost_of(problem: Problem, picked: Ints) -> float:
    """Cost of one strategy per node; infinity if any of it is forbidden."""
    nodes = problem.cost[problem.first[:-1] + picked].sum()
    i, j = problem.edges[:, 0], problem.edges[:, 1]
    pairs = problem.at + picked[i] * problem.strategies[j] + picked[j]
    return float(nodes + problem.tables[pairs].sum())


def usage_of(problem: Problem, picked: Ints) -> Ints:
    """Usage at each time from 0 to the last end."""
    total = np.zeros(int(problem.end.max(initial=0)) + 1, dtype=np.int64)
    live = problem.begin < problem.end
    amount = problem.usage[problem.first[:-1] + picked][live]
    np.add.at(total, problem.begin[live], amount)
    np.subtract.at(total, problem.end[live], amount)
    return np.cumsum(total)[:-1]


def peak_of(problem: Problem, picked: Ints) -> int:
    """The highest usage."""
    return int(usage_of(problem, picked).max(initial=0))


def feasible(problem: Problem, picked: Ints) -> bool:
    """Whether the usage keeps the limit and nothing forbidden is picked."""
    return peak_of(problem, picked) <= problem.limit and np.isfinite(cost_of(problem, picked))
