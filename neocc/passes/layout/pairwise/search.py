"""Local search with exact loads: blocks solved by dynamic programming, and kicks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from neocc.passes.layout.pairwise import search_kernels as kernels
from neocc.passes.layout.pairwise.graph import Graph, cost_in, load_in, over
from neocc.passes.layout.pairwise.problem import Floats, Ints

BLOCK = 300  # nodes in a block at most
KICK = 60  # nodes in a block around a kicked node
ROUNDS = 12  # price steps in a block
REPAIR = 30  # and in one that is over its room


@dataclass
class Place:
    """An assignment, its cost, its loads, and how far they are over the room."""

    picked: Ints
    load: Floats
    cost: float
    over: float

    @property
    def key(self) -> tuple[float, float]:
        """What is compared: overload first."""
        return self.over, self.cost


@dataclass
class Search:
    """Improves a place of a graph; the best found is kept."""

    graph: Graph
    random: np.random.Generator
    best: Place | None = None
    pool: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.pool = np.flatnonzero(np.diff(self.graph.first) > 1)

    def place(self, picked: Ints) -> Place:
        load = load_in(self.graph, picked)
        return Place(picked.copy(), load, cost_in(self.graph, picked), over(load, self.graph.room))

    def offer(self, place: Place) -> bool:
        """Keep it if it is the best so far."""
        if self.best is not None and place.key >= self.best.key:
            return False
        self.best = Place(place.picked.copy(), place.load.copy(), place.cost, place.over)
        return True

    def polish(self, place: Place, prices: Floats, blocks: int) -> Place:
        """Solve so many blocks, around the fullest slot while it is over its room."""
        if not len(self.pool):
            return place
        pool, rounds = self.pool, ROUNDS
        if place.over > 0:
            pool, rounds = self._live(int(np.argmax(place.load - self.graph.room))), REPAIR
        largest = max(2, min(BLOCK, len(self.pool)))
        kernels.improve(
            self.random, self.graph, place.picked, place.load, prices, pool, blocks, 2, largest,
            rounds,
        )  # fmt: skip
        return self.place(place.picked)

    def kick(self, place: Place, prices: Floats, kicks: int) -> Place:
        if not len(self.pool):
            return place
        largest = max(2, min(KICK, len(self.pool)))
        kernels.kick(
            self.random, self.graph, place.picked, place.load, prices, self.pool, kicks, largest,
            ROUNDS,
        )  # fmt: skip
        return self.place(place.picked)

    def cross(self, place: Place, other: Place) -> Place:
        """Take from the other what is better there."""
        kernels.cross(self.graph, place.picked, place.load, other.picked)
        return self.place(place.picked)

    def _live(self, slot: int) -> Ints:
        graph = self.graph
        owner = np.repeat(np.arange(len(graph.first) - 1), np.diff(graph.holders))
        here = np.unique(owner[(graph.begin <= slot) & (slot < graph.end)])
        live = here[np.diff(graph.first)[here] > 1]
        return live if len(live) else self.pool


def gap(cost: float, bound: float) -> float:
    """(cost - bound) / cost; infinity without a cost."""
    if not math.isfinite(cost):
        return math.inf
    return max(0.0, cost - bound) / abs(cost) if cost else float(bound < 0)
