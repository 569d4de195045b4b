"""Collectives that run inside products: which can, and in what order a region then runs.

A gather can run inside the products that read it and do not sum over what it gathers, and a
reduce-scatter inside those whose sum it scatters (``neocc.lower.collectives.products``). A group is
one such collective and its products: one step of the program. What a gather makes is put together
from its shards where others read it; what a scatter reads is never whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from neocc.cost.algorithms import PRODUCTS
from neocc.ir.program import Op, Region, Value


@dataclass(frozen=True, eq=False)
class Group:
    """``sums``: the additions between products and the scatter of their sum. ``whole``: something
    else reads what is gathered."""

    collective: Op
    products: tuple[Op, ...]
    sums: tuple[Op, ...] = ()
    whole: bool = False

    @property
    def ops(self) -> tuple[Op, ...]:
        return (self.collective, *self.products, *self.sums)

    @property
    def gathers(self) -> bool:
        return self.collective.kind == "all_gather"

    @property
    def operands(self) -> list[Value]:
        """What it reads from outside."""
        own = {v for op in self.ops for v in op.results}
        return [v for op in self.ops for v in op.operands if v not in own]

    @property
    def results(self) -> list[Value]:
        """What others read: of a gather the products and the whole, of a scatter its block."""
        if self.gathers:
            return [self.collective.result, *(op.result for op in self.products)]
        return [self.collective.result]


def candidates(region: Region) -> list[Group]:
    """Every collective of a region that products read, or that scatters a sum of products that
    nothing else reads; each as a group by itself."""
    readers: dict[Value, list[Op | None]] = defaultdict(list)
    makers: dict[Value, Op] = {}
    for op in region.ops:
        makers.update((v, op) for v in op.results)
        for v in op.operands:
            readers[v].append(op)
    for v in region.outputs:
        readers[v].append(None)
    found: list[Group] = []
    for op in region.ops:
        if op.operands and op.operands[0].type.size == 0:
            continue
        if op.kind == "all_gather":
            read = readers[op.result]
            products = tuple(p for p in read if p is not None and shares(p, op))
            if products and len(set(products)) == len(products):
                found.append(Group(op, products, whole=len(products) < len(read)))
        elif op.kind == "reduce_scatter" and op.attrs["reduction"] == "sum":
            terms = summed(op.operands[0], makers, readers)
            if terms is not None:
                found.append(Group(op, *terms))
    return [g for g in found if schedule(region, [g]) is not None]


def shares(op: Op, gather: Op) -> bool:
    """Whether an op is a product that a shard of what is gathered gives a block of."""
    return op.kind == "einsum" and op.result.type.has(gather.attrs["dim"])


def summed(
    value: Value, makers: Mapping[Value, Op], readers: Mapping[Value, list[Op | None]]
) -> tuple[tuple[Op, ...], tuple[Op, ...]] | None:
    """The products whose sum a value is, and the additions; None where it is more than that, or
    something else reads any of it."""
    maker = makers.get(value)
    if maker is None or len(readers[value]) != 1:
        return None
    if maker.kind == "einsum":
        return (maker,), ()
    if maker.kind != "add":
        return None
    sides = [summed(v, makers, readers) for v in maker.operands]
    if any(side is None for side in sides):
        return None
    products = tuple(p for side in sides if side for p in side[0])
    sums = tuple(s for side in sides if side for s in side[1])
    same = {v.type for v in maker.operands} == {maker.result.type}
    return (products, (*sums, maker)) if same else None


def groups_of(region: Region) -> list[Group]:
    """The groups of a region whose collectives run inside their products."""
    marked = {op for op in region.ops if op.attrs.get("algorithm") == PRODUCTS}
    return [g for g in candidates(region) if g.collective in marked] if marked else []


def together(
    region: Region, kinds: Collection[str], taken: Sequence[Group] = ()
) -> Iterator[Group]:
    """The candidates of some kinds, in order, that can all be groups at once, beside others."""
    found = list(taken)
    for group in candidates(region):
        if group.collective.kind in kinds and schedule(region, [*found, group]) is not None:
            found.append(group)
            yield group


def schedule(region: Region, groups: Sequence[Group]) -> list[Op | Group] | None:
    """The region's ops in an order in which each group is one step; None where there is none, or
    where ops of a group lie on both sides of a loop, which waits for what is before it."""
    member = {op: g for g in groups for op in g.ops}
    if len(member) != sum(len(g.ops) for g in groups):
        return None
    have: set[Value] = set(region.args)
    waiting: dict[Op | Group, None] = {}
    found: list[Op | Group] = []
    done: set[Op | Group] = set()

    def runnable() -> Iterator[Op | Group]:
        for step in list(waiting):
            if all(v in have for v in step.operands):
                yield step

    for op in region.ops:
        if op.kind == "repeat" and waiting:
            return None
        step = member.get(op, op)
        if step not in done:
            waiting[step] = None
        while True:
            ready = list(runnable())
            for step in ready:
                del waiting[step]
                found.append(step)
                done.add(step)
                have.update(step.results)
            if not ready:
                break
    return None if waiting else found
