"""Algorithms for collectives, made of permutes: what each sends, where it fits, what it costs.

Beside the standard ones, which XLA brings and ``collectives.py`` prices. What runs them is
``neocc.lower.collectives``; its tests hold what it sends against the rounds here.

- ``ring``: shards go round one ring of all devices, one way; ``ring2``: both ways at once, in half
  the steps. Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
  workstations", 2009.
- ``torus``: the data in as many parts as the axis has rings, each part over the rings in another
  order, so that all wires work all the time. Jain and Sabharwal, "Optimal bucket algorithms for
  large MPI collectives on torus interconnects", 2010.
- ``hierarchical``: over the fast inner network first, so that the slow one carries only what the
  inner devices do not share (``two_level`` for an all-to-all, whose messages over the slow network
  become fewer and larger).
- ``shifts``: each device sends each other its piece.
- ``int8``, ``float8_e4m3``, ``float8_e5m2``: blocks of values with one scale each; lossy, so only
  on request. EQuARX, arXiv 2506.17615, and ZeRO++, arXiv 2306.10209, do alike: a sum's terms are
  sent once, added in float32, and the sum is sent once.
- ``bucketed``: small sums that do not wait for each other as one, over ``ring2``.
- ``products``: the shards of ``ring2``, each way behind the products that read or make them
  (``cost.products``), where there are such.
- ``dma``: ``ring2`` in one kernel of a TPU's own, launched once. Plans for other chips do not have
  it; a TPU's plan that runs elsewhere does the same by permutes. No device has measured it: it runs
  where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neocc.cost.rounds import (
    Grid,
    Message,
    Round,
    cut,
    factors,
    one_ring,
    rings_of,
    rounds_seconds,
)
from neocc.cost.topology import AxisLink

STANDARD = "standard"  # XLA's own
PRODUCTS = "products"  # inside the matrix products beside it
BLOCK = 256  # values that share a scale
SCALE = 4  # bytes of a scale
KERNEL_RING = 64  # devices of a ring at most: each step of a kernel has semaphores of its own
KERNEL_DTYPES = ("f32", "bf16", "i32", "u32")
BUCKET = 1 << 20  # bytes on a device above which a sum gains nothing from company

Sizes = tuple[int, ...]
Rounds = Callable[[int, int, Sizes], tuple[Round, ...]]


@dataclass(frozen=True)
class Formula:
    """What one algorithm sends for one kind of collective.

    ``rounds(items, itemsize, sizes)``: what each device sends, of ``items`` elements of
    ``itemsize`` bytes that it holds before or after, whichever is larger, on a grid of
    ``sizes``. ``rings``: of the grid; a range, ``(1, 1)`` for one ring of all devices. ``lossy``:
    its result is not the standard one to the dtype's rounding. ``kernel``: the kind of chips on
    which it is one kernel, launched once and not in each round. ``inside``: it is no collective by
    itself, but part of products.
    """

    kind: str
    name: str
    rings: tuple[int, int]
    rounds: Rounds
    lossy: bool = False
    kernel: str = ""
    inside: bool = False

    def grid(self, link: AxisLink) -> Grid:
        """The rings that it runs on along an axis: those of the wires; where they are too few, the
        axis's one ring cut into factors, and where too many, the innermost ones as one."""
        rings = rings_of(link)
        least, most = self.rings
        if not rings:
            return ()
        if len(rings) < least:
            whole = one_ring(rings)
            return cut(whole, factors(whole.size, least))
        return (*rings[: most - 1], one_ring(rings[most - 1 :])) if len(rings) > most else rings

    def fits(self, link: AxisLink) -> bool:
        """Whether the wires of an axis have the form that it is made for."""
        rings = rings_of(link)
        if self.kernel or self.inside:
            return False  # known of a backend or a program, not of wires
        if self.name == "torus":
            return len(link.levels) == 1 and len(rings) in (2, 3)
        return len(rings) >= self.rings[0]

    def takes(self, dtype: str, reduction: str = "sum") -> bool:
        """Whether it works on a dtype and a reduction: the lossy ones on sums of floats."""
        if self.kernel:
            return dtype in KERNEL_DTYPES
        return not self.lossy or (reduction == "sum" and dtype in ("bf16", "f16", "f32", "f64"))

    def seconds(self, full_bytes: float, link: AxisLink, itemsize: int = 1) -> float:
        """Seconds along one axis; ``full_bytes`` as ``collective_time`` has it."""
        if link.size == 1:
            return 0.0
        grid = self.grid(link)
        items = ceil_div(int(full_bytes), itemsize)
        sizes = tuple(ring.size for ring in grid)
        shared = len(rings_of(link)) < len(grid)  # pieces of one ring
        rounds = self.rounds(items, itemsize, sizes)
        if self.kernel:
            return link.overhead + rounds_seconds(rounds, grid, 0.0, shared)
        return rounds_seconds(rounds, grid, link.overhead, shared)


def orders(count: int, parts: int) -> list[tuple[int, ...]]:
    """For each of ``parts`` parts of the data, the order in which it is reduced over ``count``
    rings: the innermost first, each part from another ring on."""
    inward = list(reversed(range(count)))
    return [tuple(inward[i:] + inward[:i]) for i in range(parts)]


def steps(size: int, ways: int) -> tuple[int, int]:
    """Steps round a ring forward and backward."""
    return (size // 2, (size - 1) // 2) if ways == 2 else (size - 1, 0)


def _along(ring: int, size: int, ways: int, bytes: int) -> list[Round]:
    """Rounds of one gather or scatter over a ring of shards of ``bytes``."""
    forward, backward = steps(size, ways)
    return [
        (Message(ring, 1, bytes), *([Message(ring, -1, bytes)] if t < backward else []))
        for t in range(forward)
    ]


def _together(parts: Sequence[Sequence[Round]]) -> list[Round]:
    """The rounds of parts that go on at once."""
    most = max(map(len, parts), default=0)
    return [tuple(m for part in parts if t < len(part) for m in part[t]) for t in range(most)]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def scatter_rounds(piece: int, itemsize: int, sizes: Sizes, parts: int, ways: int) -> list[Round]:
    """A reduce-scatter that leaves ``piece`` elements on each device."""
    share = ceil_div(piece, parts) * itemsize
    found: list[Round] = []
    left = [math.prod(sizes)] * parts
    for phase in range(len(sizes)):
        alike = []
        for part, order in enumerate(orders(len(sizes), parts)):
            ring = order[phase]
            left[part] //= sizes[ring]
            alike.append(_along(ring, sizes[ring], ways, share * left[part]))
        found += _together(alike)
    return found


def exchange_rounds(ring: int, size: int, bytes: int) -> list[Round]:
    """Each device sends each other ``bytes``; those as far ahead as behind at once."""
    found = []
    for by in range(1, size // 2 + 1):
        back = (Message(ring, -by, bytes),) if by != size - by else ()
        found.append((Message(ring, by, bytes), *back))
    return found


def packed_bytes(items: int) -> int:
    """Bytes of ``items`` values of a byte with the scales of their blocks."""
    block = max(1, min(BLOCK, items))
    return ceil_div(items, block) * (block + SCALE)


def _scatter(ways: int, torus: bool = False) -> Rounds:
    def rounds(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
        piece = ceil_div(items, math.prod(sizes))
        return tuple(scatter_rounds(piece, itemsize, sizes, len(sizes) if torus else 1, ways))

    return rounds


def _gather(ways: int, torus: bool = False) -> Rounds:
    scatter = _scatter(ways, torus)
    return lambda items, itemsize, sizes: scatter(items, itemsize, sizes)[::-1]


def _reduce(ways: int, torus: bool = False) -> Rounds:
    def rounds(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
        parts = len(sizes) if torus else 1
        piece = parts * ceil_div(items, math.prod(sizes) * parts)  # padded to whole pieces
        there = scatter_rounds(piece, itemsize, sizes, parts, ways)
        return (*there, *there[::-1])

    return rounds


def _shifts(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
    found: list[Round] = []
    for ring in reversed(range(len(sizes))):
        found += exchange_rounds(ring, sizes[ring], ceil_div(items, sizes[ring]) * itemsize)
    return tuple(found)


def _quantised_gather(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
    (n,) = sizes
    return tuple(_along(0, n, 2, packed_bytes(ceil_div(items, n))))


def _quantised_scatter(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
    (n,) = sizes
    return tuple(exchange_rounds(0, n, packed_bytes(ceil_div(items, n))))


def _quantised_reduce(items: int, itemsize: int, sizes: Sizes) -> tuple[Round, ...]:
    there = _quantised_scatter(items, itemsize, sizes)
    return (*there, *_quantised_gather(items, itemsize, sizes))


ONE, TWO, SOME, ANY = (1, 1), (2, 2), (2, 3), (2, 8)
FORMATS = ("int8", "float8_e4m3", "float8_e5m2")

FORMULAS: dict[tuple[str, str], Formula] = {
    (f.kind, f.name): f
    for f in (
        Formula("all_gather", "ring", ONE, _gather(1)),
        Formula("all_gather", "ring2", ONE, _gather(2)),
        Formula("all_gather", "dma", ONE, _gather(2), kernel="tpu"),
        Formula("all_gather", "torus", SOME, _gather(2, torus=True)),
        Formula("all_gather", "hierarchical", ANY, _gather(2)),
        *(Formula("all_gather", f, ONE, _quantised_gather, lossy=True) for f in FORMATS),
        Formula("all_gather", PRODUCTS, ONE, _gather(2), inside=True),
        Formula("reduce_scatter", "ring", ONE, _scatter(1)),
        Formula("reduce_scatter", "ring2", ONE, _scatter(2)),
        Formula("reduce_scatter", "dma", ONE, _scatter(2), kernel="tpu"),
        Formula("reduce_scatter", "torus", SOME, _scatter(2, torus=True)),
        Formula("reduce_scatter", "hierarchical", ANY, _scatter(2)),
        Formula("reduce_scatter", PRODUCTS, ONE, _scatter(2), inside=True),
        *(Formula("reduce_scatter", f, ONE, _quantised_scatter, lossy=True) for f in FORMATS),
        Formula("all_reduce", "ring", ONE, _reduce(1)),
        Formula("all_reduce", "ring2", ONE, _reduce(2)),
        Formula("all_reduce", "dma", ONE, _reduce(2), kernel="tpu"),
        Formula("all_reduce", "torus", SOME, _reduce(2, torus=True)),
        Formula("all_reduce", "hierarchical", ANY, _reduce(2)),
        Formula("all_reduce", "bucketed", ONE, _reduce(2)),
        *(Formula("all_reduce", f, ONE, _quantised_reduce, lossy=True) for f in FORMATS),
        Formula("all_to_all", "shifts", ONE, _shifts),
        Formula("all_to_all", "two_level", TWO, _shifts),
    )
}
"""Every algorithm but the standard ones, by kind and name."""


def formula(kind: str, name: str) -> Formula:
    """An algorithm by the kind of collective that it replaces and its name.

    Raises:
        ValueError: there is none, with those that there are.
    """
    if (kind, name) in FORMULAS:
        return FORMULAS[kind, name]
    kinds = dict.fromkeys(k for k, _ in FORMULAS)
    if kind not in kinds:
        raise ValueError(
            f"no collective {kind!r} has algorithms; those that do: {', '.join(kinds)}"
        )
    names = ", ".join((STANDARD, *(n for k, n in FORMULAS if k == kind)))
    raise ValueError(f"no algorithm {name!r} for {kind}; one of {names}")
