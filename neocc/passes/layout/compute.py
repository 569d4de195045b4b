"""Compute seconds of clusters, by what of their region a plan leaves out.

What passes through memory depends on what else is there: a product that is computed again reads
what a fusion could have kept on chip, and a result that is kept for the backward pass is written.
So a cluster has a price for each state of its region's switches: ops and outputs that may be off.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from neocc.cost.model import CostModel
from neocc.ir.mesh import Mesh, Strategy
from neocc.ir.program import Op, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.cluster import Cluster
from neocc.passes.layout.liveness import Fusion
from neocc.passes.remat import Droppable

EVERY = 6  # of a region with so many switches every state is looked at
BASES = 6  # states of larger ones, beside two, that are compared with all that differ in a switch
MOST = 8  # switches that a price may depend on; with more, both ways of each either are priced

Switch = Op | int  # an op that may be off, or the place of an output that may be
State = tuple[bool, ...]  # of each switch, whether it is on


@dataclass(frozen=True, eq=False)
class View:
    """A region without what is off and without ``either``; ``new``: what its ops became."""

    region: Region
    new: dict[Op, Op]

    @staticmethod
    def of(region: Region, off: frozenset[Switch]) -> View:
        gone = {v for op in region.ops if op in off for v in op.results}
        alias: dict[Value, Value] = {}
        new: dict[Op, Op] = {}
        for op in region.ops:
            if op in off:
                continue
            operands = [alias.get(v, v) for v in op.operands]
            if op.kind == "either":
                alias[op.result] = operands[op.operands[1] not in gone]
            elif any(v in alias for v in op.operands):
                new[op] = Op(op.kind, operands, op.results, op.attrs, op.regions, op.loc)
            else:
                new[op] = op
        outputs = (alias.get(v, v) for i, v in enumerate(region.outputs) if i not in off)
        return View(Region(region.args, tuple(new.values()), tuple(outputs)), new)

    @cached_property
    def fusion(self) -> Fusion:
        return Fusion.of(self.region)

    @cached_property
    def readers(self) -> dict[Value, set[Op | None]]:
        """The ops that read each value; None stands for the region's outputs."""
        found: dict[Value, set[Op | None]] = defaultdict(set)
        for op in self.region.ops:
            for v in op.operands:
                found[v].add(op)
        for v in self.region.outputs:
            found[v].add(None)
        return found


@dataclass(frozen=True)
class Traffic:
    """What decides a cluster's price beside its strategy. ``passing``: of one op, whether each
    operand and result passes through memory; of several, how many values of each type do, which
    are ``values``. ``again``: how often more than once each op runs."""

    passing: frozenset[tuple[TensorType, int]] | tuple[bool, ...]
    again: tuple[int, ...]
    values: tuple[Value, ...] = field(compare=False)


@dataclass(frozen=True, eq=False)
class Prices:
    """Seconds of one run of a cluster: ``seconds[v][s]`` of strategy s in variant v;
    ``variants``: the variant of each state of ``switches``, in the order of ``states``."""

    seconds: list[list[float]]
    switches: tuple[Switch, ...] = ()
    variants: tuple[int, ...] = (0,)

    @property
    def least(self) -> list[float]:
        """Of each strategy, in the cheapest variant."""
        return [min(each) for each in zip(*self.seconds, strict=True)]

    @property
    def more(self) -> np.ndarray:
        """``[s, v]``: what variant v of strategy s costs above its cheapest one."""
        return (np.array(self.seconds, float) - np.array(self.least, float)).T


def states(switches: int) -> Iterator[State]:
    return itertools.product((False, True), repeat=switches)


class Computes:
    """The prices of a program's clusters on a mesh."""

    def __init__(self, mesh: Mesh, cost: CostModel, spare: Droppable):
        self.mesh = mesh
        self.cost = cost
        self.spare = spare
        self.known: dict[tuple[Region, State | None], View] = {}

    def switches(self, region: Region) -> tuple[Switch, ...]:
        ops = (op for op in region.ops if op in self.spare.ops)
        return (*ops, *sorted(self.spare.outputs.get(region, ())))

    def view(self, region: Region, state: State | None) -> View:
        """A region in a state of its switches; None: as the program has it."""
        if (region, state) not in self.known:
            if state is None:
                made = View(region, {op: op for op in region.ops})
            else:
                switches = zip(self.switches(region), state, strict=True)
                made = View.of(region, frozenset(switch for switch, on in switches if not on))
            self.known[region, state] = made
        return self.known[region, state]

    def prices(self, cluster: Cluster, strategies: Sequence[Strategy]) -> Prices:
        """Of each strategy, in each state that makes a difference."""
        region, switches = cluster.region, self.switches(cluster.region)
        own = {i for i, s in enumerate(switches) if s in cluster.ops}
        places = self.decisive(cluster, [i for i in range(len(switches)) if i not in own])
        if not places or len(places) > MOST:
            traffic = self.traffic(
                cluster, self.view(region, None if places else self.all_on(region))
            )
            return Prices([[self.seconds(cluster, traffic, s) for s in strategies]])
        found: dict[Traffic, int] = {}
        each = []
        for some in states(len(places)):
            state = list(self.all_on(region))
            for i, on in zip(places, some, strict=True):
                state[i] = on
            traffic = self.traffic(cluster, self.view(region, tuple(state)))
            each.append(found.setdefault(traffic, len(found)))
        seconds = [[self.seconds(cluster, t, s) for s in strategies] for t in found]
        different: list[list[float]] = []
        for one in seconds:
            if one not in different:
                different.append(one)
        table = np.array([different.index(seconds[i]) for i in each])
        table = table.reshape((2,) * len(places))
        kept: list[Switch] = []
        for i in places:
            off, on = np.take(table, 0, len(kept)), np.take(table, 1, len(kept))
            if np.array_equal(off, on):
                table = on
            else:
                kept.append(switches[i])
        return Prices(different, tuple(kept), tuple(table.ravel().tolist()))

    def all_on(self, region: Region) -> State:
        return (True,) * len(self.switches(region))

    def decisive(self, cluster: Cluster, places: list[int]) -> list[int]:
        """Those of some switches that a cluster's traffic may depend on."""
        region, count = cluster.region, len(self.switches(cluster.region))
        if count <= EVERY:
            return places
        draw = random.Random(0)
        bases = [[True] * count, [False] * count]
        bases += [[draw.random() < 0.5 for _ in range(count)] for _ in range(BASES)]
        found: set[int] = set()
        for base in bases:
            own = [on or i not in places for i, on in enumerate(base)]
            before = self.traffic(cluster, self.view(region, tuple(own)))
            for i in places:
                other = tuple(on != (i == j) for j, on in enumerate(own))
                if i not in found and self.traffic(cluster, self.view(region, other)) != before:
                    found.add(i)
        return sorted(found)

    def traffic(self, cluster: Cluster, view: View) -> Traffic:
        ops = tuple(view.new[op] for op in cluster.ops)
        fused, readers = self.cost.chip.vector_clock is not None, view.readers
        again = tuple(view.fusion.again(op) for op in ops) if fused else (0,) * len(ops)
        if len(ops) == 1:
            (op,) = cluster.ops
            unmoved = view.fusion.unmoved_by(ops[0]) if fused else frozenset()
            now = (*ops[0].operands, *ops[0].results)
            passing = tuple(v not in unmoved for v in now)
            every = zip((*op.operands, *op.results), passing, strict=True)
            return Traffic(passing, again, tuple(v for v, moved in every if moved))
        inside = set(ops)
        made = (v for op in ops for v in op.results if not readers[v] <= inside)
        written = (v for v in made if not fused or v in view.fusion.stored)
        moved = (*Cluster(ops, view.region).inputs(), *written)
        return Traffic(frozenset(Counter(v.type for v in moved).items()), again, moved)

    def seconds(self, cluster: Cluster, traffic: Traffic, strategy: Strategy) -> float:
        """Compute time of one run of a cluster on one device."""

        blocks = strategy.blocks(self.mesh)

        def parts(dim: str) -> int:
            return blocks.get(dim, 1)

        fused = self.cost.chip.vector_clock is not None
        if len(cluster.ops) == 1:
            (op,) = cluster.ops
            if (ring := self.cost.ring(op, strategy)) is not None:
                return ring.compute + ring.exposed
            if not fused:
                return self.cost.op_seconds(op, parts)
            unmoved = {*op.operands, *op.results}.difference(traffic.values)
            return self.cost.op_seconds(op, parts, unmoved, traffic.again[0])
        found = self.cost.traffic_seconds(traffic.values, parts)
        if not fused:
            return found
        counted = zip(cluster.ops, traffic.again, strict=True)
        every = (op for op, again in counted for _ in range(1 + again))
        return max(found, self.cost.vector_seconds(every, parts))
