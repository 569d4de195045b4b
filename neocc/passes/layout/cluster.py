"""Merge ops that share one strategy in the search space: what a compiler would fuse.

Elementwise ops and reductions that run over the same dims and are linked by values that carry
all of those dims form one cluster: a layer norm, a softmax, one parameter's optimizer update.
Sums that only add up products (``dq @ Wq + dk @ Wk``) stay alone, since it pays to add such
partial sums before they are reduced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from neocc.ir.ops import ELEMENTWISE
from neocc.ir.program import Op, Region, Value

LINEAR_SOURCES = ("einsum", "scatter_add", "gather", "repeat")


@dataclass(frozen=True, eq=False)
class Cluster:
    """Ops of one region that take one strategy together; ``dims`` is what they all run over."""

    ops: tuple[Op, ...]
    region: Region

    @property
    def dims(self) -> frozenset[str]:
        return space_dims(self.ops[0])

    def inputs(self) -> list[Value]:
        """Values that come from outside the cluster, each once."""
        made = {r for op in self.ops for r in op.results}
        return list(dict.fromkeys(v for op in self.ops for v in op.operands if v not in made))


def space_dims(op: Op) -> frozenset[str]:
    return frozenset(n for v in (*op.operands, *op.results) for n in v.type.names)


def accumulates(region: Region, value: Value) -> bool:
    """Whether a carried value is an accumulator: each step only adds to it."""
    for i, (arg, out) in enumerate(zip(region.args, region.outputs, strict=False)):
        if arg is value:
            readers = [op for op in region.ops if arg in op.operands]
            added = len(readers) == 1 and readers[0].kind == "add" and out in readers[0].results
            return added and region.outputs.index(out) == i
    return False


def clusters(region: Region, spare: Collection[Op] = ()) -> list[Cluster]:
    """The clusters of one region (not of those nested in it), in order of their first op. Ops
    that may be left out, the ``spare`` ones, are in none with others."""
    producer = {r: op for op in region.ops for r in op.results}
    uses: dict[Value, int] = defaultdict(int)
    for op in region.ops:
        for v in op.operands:
            uses[v] += 1
    for v in region.outputs:
        uses[v] += 1
    sums: set[Op] = set()
    for op in region.ops:
        if op.kind in ("add", "sub"):
            made_by = [producer.get(v) for v in op.operands if not accumulates(region, v)]
            if all(p is not None and (p.kind in LINEAR_SOURCES or p in sums) for p in made_by):
                sums.add(op)

    def fuses(op: Op) -> bool:
        return (op.kind in ELEMENTWISE or op.kind == "reduce") and op not in sums

    graph = nx.Graph()
    graph.add_nodes_from(op for op in region.ops if op.kind not in ("repeat", "either"))
    users: dict[Value, list[Op]] = defaultdict(list)
    for op in region.ops:
        if op.kind == "repeat" or not fuses(op):
            continue
        dims = space_dims(op)
        if not dims:
            continue
        for v in op.operands:
            if frozenset(v.type.names) == dims:
                users[v].append(op)
    for v, ops in users.items():
        source = producer.get(v)
        group = [source, *ops] if source is not None and source.kind != "repeat" else ops
        group = [op for op in group if fuses(op) and space_dims(op) == space_dims(ops[0])]
        for same in ([op for op in group if (op in spare) is off] for off in (False, True)):
            graph.add_edges_from(pairwise(same))
    order = {op: i for i, op in enumerate(region.ops)}
    found = [
        Cluster(tuple(sorted(c, key=order.__getitem__)), region)
        for c in nx.connected_components(graph)
    ]
    return sorted(found, key=lambda c: order[c.ops[0]])
