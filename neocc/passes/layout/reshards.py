"""The moves of one type of tensor as arrays: its layouts, the single-axis moves between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from neocc.ir.mesh import Layout
from neocc.passes.layout.algebra import Move


@dataclass(frozen=True, eq=False)
class Reshards:
    """Every layout that moves lead to from some layouts, numbered; move i goes from layout
    ``source[i]`` to layout ``target[i]`` and takes ``seconds[i]``, the share ``wires[i]`` of it on
    wires; ``host[i]``: to a host's memory or back."""

    index: dict[Layout, int]
    moves: list[Move]
    source: np.ndarray
    target: np.ndarray
    seconds: np.ndarray
    wires: np.ndarray
    host: np.ndarray

    def numbers(self, layouts: Iterable[Layout | None]) -> np.ndarray:
        """Numbers of layouts; -1 for None."""
        return np.array([-1 if lay is None else self.index[lay] for lay in layouts], dtype=np.intp)

    def reach(self, starts: np.ndarray) -> np.ndarray:
        """Which layouts moves lead to from ``starts`` (-1 is none)."""
        return spread(len(self.index), starts, self.source, self.target)

    def lead(self, ends: np.ndarray) -> np.ndarray:
        """From which layouts moves lead to ``ends`` (-1 is none)."""
        return spread(len(self.index), ends, self.target, self.source)

    def distances(self, weights: np.ndarray) -> np.ndarray:
        """``[i, j]``: the least sum of the moves' ``weights`` on a path from layout i to j (Floyd
        and Warshall); infinite where there is none."""
        n = len(self.index)
        far = np.full((n, n), np.inf)
        far[np.arange(n), np.arange(n)] = 0.0
        far[self.source, self.target] = weights  # at most one move joins two layouts
        for k in range(n):
            np.minimum(far, far[:, k, None] + far[None, k], out=far)
        return far


def spread(size: int, seeds: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    found = np.zeros(size, bool)
    found[seeds[seeds >= 0]] = True
    while True:
        more = target[found[source] & ~found[target]]
        if not len(more):
            return found
        found[more] = True


def reshards(
    layouts: Iterable[Layout],
    moves_from: Callable[[Layout], list[Move]],
    on_wires: Callable[[Move], float],
    copying: Callable[[Move], float],
) -> Reshards:
    """All that can be reached from ``layouts``. A move takes its seconds on wires and those in
    which the device itself copies."""
    index: dict[Layout, int] = {}
    for layout in layouts:
        index.setdefault(layout, len(index))
    found: list[Move] = []
    stack = list(index)
    while stack:
        for m in moves_from(stack.pop()):
            if m.target not in index:
                index[m.target] = len(index)
                stack.append(m.target)
            found.append(m)
    wires = np.array([on_wires(m) for m in found], dtype=float)
    takes = wires + np.array([copying(m) for m in found], dtype=float)
    return Reshards(
        index,
        found,
        np.array([index[m.source] for m in found], dtype=np.intp),
        np.array([index[m.target] for m in found], dtype=np.intp),
        takes,
        np.divide(wires, takes, out=np.ones_like(takes), where=takes > 0),
        np.array([m.axis is None for m in found], dtype=bool),
    )
