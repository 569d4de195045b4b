"""Small pairwise problems, and their optimum by trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import strategies as st

from neocc.passes.layout.pairwise.problem import Problem, cost_of, feasible, make_problem

pytest.importorskip("numba", reason="extra `solver` or `dev`")

INF = math.inf


@st.composite
def problems(draw: st.DrawFn, nodes: int = 6, forbid: bool = True) -> Problem:
    """Up to ``nodes`` nodes of up to 3 strategies, sparse edges, memory from loose to tight."""
    n = draw(st.integers(1, nodes))
    sizes = [draw(st.integers(1, 3)) for _ in range(n)]
    price = st.integers(0, 9)
    pair = st.one_of(price, st.just(0), st.just(INF)) if forbid else price
    costs = [[draw(price) for _ in range(k)] for k in sizes]
    usages = [[draw(st.integers(0, 5)) for _ in range(k)] for k in sizes]
    intervals = []
    for _ in range(n):
        begin = draw(st.integers(0, 5))
        intervals.append((begin, draw(st.integers(begin, 6))))
    edges, tables = [], []
    if n > 1:
        for _ in range(draw(st.integers(0, 2 * n))):
            i, j = draw(st.permutations(range(n)))[:2]
            edges.append((i, j))
            tables.append([draw(pair) for _ in range(sizes[i] * sizes[j])])
    return make_problem(costs, usages, intervals, edges, tables, draw(st.integers(2, 12)))


def lists(problem: Problem) -> dict:
    """What `make_problem` would make the problem from."""
    ranges = list(itertools.pairwise(problem.first))
    return {
        "costs": [problem.cost[a:b].tolist() for a, b in ranges],
        "usages": [problem.usage[a:b].tolist() for a, b in ranges],
        "intervals": list(zip(problem.begin.tolist(), problem.end.tolist(), strict=True)),
        "edges": problem.edges.tolist(),
        "tables": [problem.table(e).ravel().tolist() for e in range(len(problem.edges))],
        "limit": problem.limit,
    }


def every(problem: Problem) -> list[np.ndarray]:
    """All assignments."""
    return [np.array(p) for p in itertools.product(*map(range, problem.strategies))]


def optimum(problem: Problem) -> float:
    """The least cost that keeps the limit; infinity if nothing does."""
    return min((cost_of(problem, p) for p in every(problem) if feasible(problem, p)), default=INF)


def layers(count: int, seed: int = 0) -> Problem:
    """A chain of layers as a model has them: a weight cut or whole that lives throughout, an
    activation that lives from its layer to the mirrored one, and reshards between."""
    random = np.random.default_rng(seed)
    costs, usages, intervals, edges, tables = [], [], [], [], []
    for i in range(count):
        size = int(random.integers(4, 9))
        costs += [[0, 30 + 5 * size, 90], [0, 8, 20, 45]]
        usages += [[8 * size, 4 * size, size], [12, 6, 6, 2]]
        intervals += [(0, 2 * count), (i, 2 * count - i)]
        edges.append((2 * i, 2 * i + 1))
        tables.append(random.integers(0, 40, 12).tolist())
        if i:
            table = np.where(np.eye(4, dtype=bool), 0, random.integers(5, 60, (4, 4)))
            edges.append((2 * i - 1, 2 * i + 1))
            tables.append(table.ravel().tolist())
    least = sum(min(u) for u in usages)
    return make_problem(costs, usages, intervals, edges, tables, int(1.6 * least))
