"""Prices of memory and messages together: the annealed ascent of the dual.

The temperature falls geometrically. Few slots need a price: one gets it when it is further over
its room than any that has one. Each priced slot steps by the sign of its excess, longer while the
sign stays and half as far when it turns (Rprop, Riedmiller and Braun 1993), so no scale has to be
known.
"""

from __future__ import annotations

import math

import numpy as np

from neocc.passes.layout.pairwise.graph import Graph
from neocc.passes.layout.pairwise.messages import Messages
from neocc.passes.layout.pairwise.problem import Floats

HOT = 0.3  # the first temperature, times nodes, per the scale of costs
COLD = 3e-4  # the last


class Ascent:
    """``bound`` is proved; ``prices`` and ``messages`` are of the last step."""

    def __init__(self, graph: Graph, scale: float):
        self.messages = Messages(graph)
        self.scale = scale
        self.prices: Floats = np.zeros(len(graph.room))
        self.bound = -math.inf
        self.steps = 0
        self._graph = graph
        self._unit = max(1.0, float(graph.room.max(initial=0.0)))
        self._active = np.zeros(len(graph.room), np.bool_)
        self._step = np.zeros(len(graph.room))
        self._last = np.zeros(len(graph.room))
        self._choices = max(1, int((np.diff(graph.first) > 1).sum()))

    def step(self, done: float) -> None:
        """One sweep and one step of the prices; ``done`` of the schedule, 0 to 1, has passed."""
        temperature = self.scale / self._choices * HOT * (COLD / HOT) ** min(1.0, done)
        self.messages.price(self.prices)
        self.messages.sweep(temperature)
        self.steps += 1
        if self.steps % 5 == 0:
            self.prove()
        if not len(self.prices):
            return
        excess = (self.messages.load(temperature) - self._graph.room) / self._unit
        if self.steps % 3 == 0:
            self._activate(excess, done)
        self._move(excess)

    def prove(self) -> None:
        """Take the bound of the messages and prices as they are, if it is the best."""
        self.messages.price(self.prices)
        self.bound = max(self.bound, self.messages.bound(self.prices))

    def _activate(self, excess: Floats, done: float) -> None:
        covered = max(0.0, excess[self._active].max(initial=0.0))
        worst = int(np.argmax(np.where(self._active, -np.inf, excess)))
        if excess[worst] > 0.003 + 1.05 * covered and not self._active[worst]:
            self._active[worst] = True
            self._step[worst] = 0.02 * self.scale / self._unit * (COLD / HOT) ** (done / 2)

    def _move(self, excess: Floats) -> None:
        active = np.flatnonzero(self._active)
        now, last, step = excess[active], self._last[active], self._step[active]
        agree = np.sign(now) * np.sign(last)
        most = 0.2 * self.scale / self._unit
        step = np.where(agree > 0, np.minimum(step * 1.2, most), step)
        step = np.where(agree < 0, step * 0.5, step)
        now = np.where(agree < 0, 0.0, now)
        self._step[active] = step
        prices = self.prices[active]
        self._last[active] = np.where((prices <= 0) & (now < 0), 0.0, now)
        moved = prices + step * np.sign(now) * np.minimum(1.0, 50 * np.abs(now))
        # Readers in other threads see old prices or new ones, never some of both.
        fresh = self.prices.copy()
        fresh[active] = np.maximum(0.0, moved)
        self.prices = fresh
