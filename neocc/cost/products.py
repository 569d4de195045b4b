"""Collective matrix products: what they take, and what of their transfers is waited for.

A product whose operand is gathered, or whose sum is scattered, in steps round a ring
(``neocc.lower.collectives.products``): while the shards of one step are multiplied, those of the
next are under way, in both directions at once. A step takes the longer of the two; the first one
hides behind the device's own shard. Wang and others, "Overlap communication with dependent
computation via decomposition in large deep learning models", ASPLOS 2023.

Blocks also take longer than their share of the product: one of few rows reads the other operand
again, and what comes out of it is cut in two, put into place, or added to what came. The constants
are read off the TPU compiler's estimated cycles, of gpt3-175b's products on v5p over 8 devices in
shards of 256 to 1024 rows; ``benchmarks.collective_matmul`` holds whole steps against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neocc.cost.algorithms import steps
from neocc.cost.model import CostModel, Parts, matmul_sizes
from neocc.cost.roofline import elementwise_time, product_time, product_traffic_time
from neocc.cost.rounds import permute_seconds
from neocc.ir.program import Op

PLACED = 2  # times that a gathered product's result is read or written beside the product
JOINED = 2  # times that what is gathered is, to put it together for others
ADDED = 7  # times that a block of a scattered one is, each time that it is sent
SLOWER = 0.03  # share by which a block takes longer than of the whole product


@dataclass(frozen=True)
class Overlapped:
    """Seconds of one run. ``wires``: of its transfers; ``waiting``: those of them that no product
    hides; ``working``: what its products and copies take more than the plain products."""

    wires: float
    waiting: float
    working: float


@dataclass(frozen=True)
class Product:
    """An einsum on one device, its iteration dims cut into ``parts`` while ``dim`` is whole."""

    op: Op
    parts: Parts
    dim: str

    def seconds(self, cost: CostModel, count: int, of: int) -> float:
        """Time of ``count`` of ``of`` blocks along the dim, as one product."""
        (batch, m, n, k), rows = self.sizes(count, of)
        first = self.op.operands[0]
        moved = first.type.itemsize * batch * k * (m + n)
        moved += self.op.result.type.itemsize * batch * m * n
        product = product_time(cost.chip, batch, m, n, k, first.type.dtype)
        if count < of:
            product *= 1 + SLOWER + (cost.chip.matmul_tile[1] / rows) ** 1.5
        traffic = product_traffic_time(cost.chip, m, n, moved)
        return max(product, traffic) + cost.chip.kernel_overhead

    def sizes(self, count: int, of: int) -> tuple[tuple[int, int, int, int], int]:
        """Batch, m, n and k of so many blocks, and which of them the dim is part of."""
        sizes = list(matmul_sizes(self.op, lambda d: self.parts(d) * (of if d == self.dim else 1)))
        a, b = (v.type.has(self.dim) for v in self.op.operands)
        place = 0 if a and b else 1 if a else 2
        sizes[place] *= count
        return (sizes[0], sizes[1], sizes[2], sizes[3]), sizes[place]

    def results(self) -> int:
        """Elements of the whole result on a device."""
        batch, m, n, _ = matmul_sizes(self.op, self.parts)
        return batch * m * n


def gathered(
    cost: CostModel, axis: int, shard: int, products: Sequence[Product], whole: bool = False
) -> Overlapped:
    """Products that share an operand gathered along a mesh axis, ``shard`` bytes of it on each
    device. ``whole``: others read it too."""
    of = cost.mesh.sizes[axis]
    ahead, back = steps(of, 2)
    single, pair, plain = (total(cost, products, count, of) for count in (1, 2, of))
    computes = [single, *[pair] * back, *[single] * (ahead - back)]
    copied = sum(PLACED * p.op.result.type.itemsize * p.results() for p in products)
    copied += JOINED * of * shard if whole else 0
    working = sum(computes) + elementwise_time(cost.chip, copied) - plain
    return overlapped(cost, axis, shard, computes, working)


def scattered(cost: CostModel, axis: int, block: int, products: Sequence[Product]) -> Overlapped:
    """Products whose sum is scattered along a mesh axis into blocks of so many bytes."""
    of = cost.mesh.sizes[axis]
    ahead, back = steps(of, 2)
    single, pair, whole = (total(cost, products, count, of) for count in (1, 2, of))
    # The farthest block is on its way while the next ones are computed; the last is the own one.
    counts = [*[2] * back, 1] if ahead > back else [*[2] * (back - 1), 1]
    first = single if ahead > back else pair
    copies = elementwise_time(cost.chip, ADDED * (of - 1) * block)
    working = copies + first + sum(pair if count == 2 else single for count in counts)
    # Of several products the compiler puts one at least between a block's start and its end.
    hides = [min(p.seconds(cost, count, of) for p in products) for count in counts]
    return overlapped(cost, axis, block, hides, working - whole)


def total(cost: CostModel, products: Sequence[Product], count: int, of: int) -> float:
    return sum(p.seconds(cost, count, of) for p in products)


def overlapped(
    cost: CostModel,
    axis: int,
    bytes: int,
    hides: Sequence[float],
    working: float,
) -> Overlapped:
    """``hides``: what each step computes, in order; ``bytes`` go each way behind as many of the
    first as there are steps round the ring."""
    of = cost.mesh.sizes[axis]
    ahead, back = steps(of, 2)
    sends = [step_seconds(cost, axis, bytes, both=t < back) for t in range(ahead)]
    if not cost.chip.permutes_beside:
        return Overlapped(sum(sends), sum(sends), working)
    waiting = sum(max(0.0, sent - at) for sent, at in zip(sends, hides, strict=False))
    return Overlapped(sum(sends), waiting, working)


def step_seconds(cost: CostModel, axis: int, bytes: int, both: bool) -> float:
    """A block to the next device round an axis as one ring, or to both neighbours."""
    of = cost.mesh.sizes[axis]
    pairs = [(i, (i + way) % of) for way in ((1, -1) if both else (1,)) for i in range(of)]
    return min(permute_seconds(tuple(pairs), bytes, link) for link in cost.links[axis])
