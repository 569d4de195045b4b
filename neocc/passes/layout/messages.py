"""Lower bounds of a choice of one option per node, with costs of options and of pairs of options.

Messages between nodes move costs about until a sum of minima, which bounds every choice, hardly
rises: sequential tree-reweighted message passing (V. Kolmogorov, "Convergent tree-reweighted
message passing for energy minimization", PAMI 28, 2006). What an option then costs above its
node's cheapest is what it adds to the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SWEEPS = 60
STILL = 1e-8  # a share of the bound: when a sweep gains less, the messages have settled


@dataclass(frozen=True, eq=False)
class Fold:
    """The least of each row's options."""

    order: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(rows: np.ndarray) -> Fold:
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        return Fold(order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(values[self.order], self.starts)


@dataclass(eq=False)
class Edge:
    """Costs between two nodes: ``table[a_rows[x], b_rows[y]]`` for option x of a and y of b.

    ``to_a``, ``to_b``: messages, per row and column. ``from_a``, ``from_b``: what the node had
    left for this edge when it last sent one. ``pairs``: what a pair of options adds to the bound.
    """

    a: int
    b: int
    a_rows: np.ndarray
    b_rows: np.ndarray
    table: np.ndarray
    to_a: np.ndarray = field(init=False)
    to_b: np.ndarray = field(init=False)
    from_a: np.ndarray = field(init=False)
    from_b: np.ndarray = field(init=False)
    pairs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.table.shape
        self.to_a, self.to_b = np.zeros(rows), np.zeros(columns)
        self.from_a, self.from_b = np.zeros(rows), np.zeros(columns)
        self.pairs = np.zeros_like(self.table)
        self.a_fold, self.b_fold = Fold.of(self.a_rows), Fold.of(self.b_rows)

    def message(self, node: int) -> np.ndarray:
        """What this edge tells each option of one of its nodes."""
        return self.to_a[self.a_rows] if node == self.a else self.to_b[self.b_rows]

    def send(self, node: int, share: np.ndarray) -> float:
        """Tells the other node what ``share`` of each option's cost, with this edge, leaves it
        at the least; returns that least over all its options, which the message leaves out."""
        if node == self.a:
            self.from_a = self.a_fold(share) - self.to_a
            found = (self.from_a[:, None] + self.table).min(axis=0)
            least = found.min()
            self.to_b = found - least
        else:
            self.from_b = self.b_fold(share) - self.to_b
            found = (self.from_b[None, :] + self.table).min(axis=1)
            least = found.min()
            self.to_a = found - least
        return float(least)

    def compare(self, node: int, slack: np.ndarray) -> None:
        """Sets ``pairs``, from ``slack``: what each option of the node that is about to send
        adds."""
        if node == self.a:
            left = self.from_b[None, :] + self.table
            self.pairs = self.a_fold(slack)[:, None] + left - left.min(axis=1, keepdims=True)
        else:
            left = self.from_a[:, None] + self.table
            self.pairs = self.b_fold(slack)[None, :] + left - left.min(axis=0, keepdims=True)


class Messages:
    """``costs``: of each node's options; ``places``: of each node in the order of sweeps.

    ``bound``: of every choice of options. ``slack``: per node, how much more than the bound every
    choice costs that takes an option; ``edges`` have the same of pairs of options.
    """

    def __init__(self, costs: list[np.ndarray], edges: list[Edge], places: Sequence[float]):
        self.costs = costs
        self.edges = edges
        self.order = sorted(range(len(costs)), key=places.__getitem__)
        self.before: list[list[Edge]] = [[] for _ in costs]
        self.after: list[list[Edge]] = [[] for _ in costs]
        for e in edges:
            first, second = sorted((e.a, e.b), key=places.__getitem__)
            self.after[first].append(e)
            self.before[second].append(e)
        self.slack = [np.zeros(len(c)) for c in costs]
        self.bound = -np.inf

    def sweep(self, backward: bool, last: bool = False) -> float:
        """Messages along the order of the nodes, or against it; returns the bound. ``last``:
        notes what options and pairs add to the bound that the sweep before has returned."""
        total = 0.0
        nodes = reversed(self.order) if backward else self.order
        into, out = (self.after, self.before) if backward else (self.before, self.after)
        for i in nodes:
            cost = self.costs[i].copy()
            for e in into[i]:
                cost += e.message(i)
            for e in out[i]:
                cost += e.message(i)
            # As many trees end, begin or pass here; each has an equal share of the node's cost.
            trees = max(len(into[i]), len(out[i]), 1)
            least = float(cost.min())
            if last:
                self.slack[i] = cost - least
                for e in out[i]:
                    e.compare(i, self.slack[i])
            share = cost / trees
            for e in out[i]:
                total += e.send(i, share)
            total += (trees - len(out[i])) * least / trees
        return total

    def settle(self, sweeps: int = SWEEPS) -> float:
        """Sweeps until the bound hardly rises. Returns it."""
        before = -np.inf
        for _ in range(sweeps):
            self.sweep(backward=False)
            found = self.sweep(backward=True)
            if found - before <= STILL * abs(found):
                break
            before = found
        self.bound = self.sweep(backward=False)
        self.sweep(backward=True, last=True)
        return self.bound

    def cheapest(self) -> list[int]:
        """The option of each node that adds nothing to the bound."""
        return [int(np.argmin(s)) for s in self.slack]

    def state(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(e.to_a, e.to_b) for e in self.edges]

    def clear(self) -> None:
        self.restore([(np.zeros_like(e.to_a), np.zeros_like(e.to_b)) for e in self.edges])

    def restore(self, state: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for e, (to_a, to_b) in zip(self.edges, state, strict=True):
            e.to_a, e.to_b = to_a, to_b
