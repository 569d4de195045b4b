"""How one value gets from the layout it is made in to all the layouts that are wanted of it.

The moves form a tree that shares what it can: q, k and v read one gather.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Iterable

from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import Move, moves

Cost = Callable[[Move, TensorType], float]
Arcs = Callable[[Layout, TensorType], list[tuple[float, Move]]]
Allowed = frozenset[tuple[Layout, Layout]]


def sent_bytes(mesh: Mesh) -> Cost:
    """The default cost: bytes that one device sends in a ring algorithm.

    With p devices on the axis and n the bytes of the larger of the two blocks, a gather, a
    scatter and an all-to-all send n (p-1)/p, an all-reduce twice that. Each move costs one
    byte more, so that of equal ways the shortest wins; a local slice costs that byte alone, and so
    does a move to the host or back, which another wire carries.
    """

    def cost(move: Move, type: TensorType) -> float:
        if move.axis is None or move.kind == "slice":
            return 1.0
        p = mesh.sizes[move.axis]
        n = max(type.local_bytes(mesh, move.source), type.local_bytes(mesh, move.target))
        return 1.0 + (2 if move.kind == "all_reduce" else 1) * n * (p - 1) / p

    return cost


def arcs(mesh: Mesh, cost: Cost) -> Arcs:
    """Every move out of a layout of a type, with its cost; each asked for once."""

    @functools.cache
    def out_of(layout: Layout, type: TensorType) -> list[tuple[float, Move]]:
        return [(cost(move, type), move) for move in moves(layout, type, mesh)]

    return out_of


def reshard_tree(
    type: TensorType,
    made: Layout,
    wanted: Iterable[Layout],
    arcs: Arcs,
    allowed: Allowed | None = None,
) -> dict[Layout, Move]:
    """The move that makes each layout reached, the ``made`` one excepted.

    Grows a tree from ``made``: each time the cheapest path from any layout in the tree to the
    nearest one still wanted joins it (the path heuristic of Takahashi and Matsuyama 1980 for
    Steiner trees; at most twice the optimum where moves cost the same both ways). With
    ``allowed``, only those (source, target) pairs are used.

    Raises:
        LayoutError: a wanted layout cannot be reached.
    """
    tree: dict[Layout, Move] = {}
    missing = set(wanted) - {made}
    while missing:
        path = shortest(type, [made, *tree], missing, arcs, allowed)
        if path is None:
            names = ", ".join(sorted(map(str, missing)))
            raise LayoutError(f"no moves lead from {type.with_layout(made)} to {names}")
        for move in path:
            tree[move.target] = move
            missing.discard(move.target)
    return tree


def shortest(
    type: TensorType,
    sources: list[Layout],
    targets: set[Layout],
    arcs: Arcs,
    allowed: Allowed | None,
) -> list[Move] | None:
    """Cheapest path from any source to the nearest target (Dijkstra); None if there is none."""
    order = itertools.count()  # breaks ties the same way in every run
    queue = [(0.0, next(order), s) for s in sources]
    best = dict.fromkeys(sources, 0.0)
    into: dict[Layout, Move] = {}
    while queue:
        far, _, layout = heapq.heappop(queue)
        if far > best[layout]:
            continue
        if layout in targets:
            path: list[Move] = []
            while layout in into:
                path.append(into[layout])
                layout = path[-1].source
            return path[::-1]
        for length, move in arcs(layout, type):
            if allowed is not None and (move.source, move.target) not in allowed:
                continue
            length += far
            if length < best.get(move.target, float("inf")):
                best[move.target], into[move.target] = length, move
                heapq.heappush(queue, (length, next(order), move.target))
    return None
