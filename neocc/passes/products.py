"""Choose which collectives run inside the products that read or make what they move.

After the layout is decided, edge by edge: a gather or reduce-scatter is decomposed only where this
makes the step that is predicted shorter, by enough to be worth the longer program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from neocc.cost.algorithms import PRODUCTS
from neocc.cost.model import CostModel, on_vector_unit
from neocc.cost.products import Overlapped, Product, gathered, scattered
from neocc.ir.program import Op, Region
from neocc.passes.layout.algebra import Strategy
from neocc.passes.partition.groups import Group, candidates, groups_of, schedule, together

if TYPE_CHECKING:
    from neocc.passes.plan import Collective

WORTH = 5e-4  # a share of the step: what gains less leaves the program as it is
Attrs = Mapping[str, object]


def priced(region: Region, cost: CostModel) -> dict[Op, Overlapped]:
    """What each collective of a partitioned region takes that runs inside products."""
    return {g.collective: price(cost, g) for g in groups_of(region)}


def price(cost: CostModel, group: Group) -> Overlapped:
    products = [product(cost, op, group.collective.attrs["dim"]) for op in group.products]
    op = group.collective
    axis = cost.mesh.index(op.attrs["axis"])
    if group.gathers:
        shard = op.operands[0].type.local_bytes(cost.mesh)
        return gathered(cost, axis, shard, products, group.whole)
    return scattered(cost, axis, op.result.type.local_bytes(cost.mesh), products)


def product(cost: CostModel, op: Op, dim: str) -> Product:
    strategy: Strategy = op.attrs["strategy"]
    return Product(op, lambda d: strategy.parts(d, cost.mesh), dim)


def choose(
    region: Region,
    rows: Sequence[Collective],
    cost: CostModel,
    seconds: Callable[[Sequence[Collective]], float],
    least: float,
) -> dict[Op, Attrs]:
    """The collectives of a region that run inside products, with the attributes that say so.
    ``seconds``: of a step in the region with some collectives; ``least``: what the first and each
    further one must gain.

    Of the kinds that are to run so, all that can. Of those that may, the one that gains most is
    taken first, since what it hides leaves less compute to hide others.
    """
    asked = cost.collectives
    forced = [kind for kind in ("all_gather", "reduce_scatter") if asked.of(kind) == PRODUCTS]
    taken = list(together(region, forced))
    now = {c.id: c for c in rows}

    def inside(group: Group) -> Collective:
        plain, own = now[group.collective.attrs["id"]], price(cost, group)
        return replace(plain, inside=own, seconds=own.wires, copying=0.0)

    for group in taken:
        now[group.collective.attrs["id"]] = inside(group)
    open = [
        g for g in candidates(region) if asked.of(g.collective.kind) is None and multiplies(cost, g)
    ]
    while open:
        step = seconds(list(now.values()))
        trials = [(group, inside(group)) for group in open]
        gains = [step - seconds(list({**now, row.id: row}.values())) for _, row in trials]
        best = max(range(len(open)), key=gains.__getitem__)
        if gains[best] <= least:
            break
        group, row = trials[best]
        open.remove(group)
        if schedule(region, [*taken, group]) is not None:
            taken.append(group)
            now[row.id] = row
    return {g.collective: attrs(g, cost) for g in taken}


def attrs(group: Group, cost: CostModel) -> Attrs:
    axis = cost.mesh.index(group.collective.attrs["axis"])
    return {"algorithm": PRODUCTS, "grid": (cost.mesh.sizes[axis],)}


def multiplies(cost: CostModel, group: Group) -> bool:
    """Whether the matrix unit makes all products of a group."""
    products = (product(cost, op, group.collective.attrs["dim"]) for op in group.products)
    return not any(on_vector_unit(cost.chip, p.op, p.parts) for p in products)
