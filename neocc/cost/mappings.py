"""The outer choices of a plan: the shape of its mesh, and the wires that each mesh axis lies on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, lru_cache

from neocc.cost.algorithms import FORMULAS, PRODUCTS, STANDARD
from neocc.cost.choice import STANDARD_ONLY, Collectives, faster, lines, standard_line
from neocc.cost.collectives import KINDS
from neocc.cost.hardware import Chip, HardwareError
from neocc.cost.topology import (
    AxisLink,
    Cuts,
    Ring,
    Sizes,
    Topology,
    default_slice,
    fillings,
    laid_on_nodes,
    laid_on_slices,
    preference,
    slice_fillings,
    slice_shapes,
    topology,
    torus_cuts,
)

DIGITS = 11  # of a time that count: less is rounding, not a difference


@cache
def mappings(
    chip: Chip,
    mesh_sizes: Sizes,
    slice_shape: Sizes | None = None,
    *,
    every_slice: bool = False,
    collectives: Collectives = STANDARD_ONLY,
) -> tuple[Topology, ...]:
    """Every mapping of a mesh onto devices that can be the best one for some program.

    The space: each level (devices of a chip, NVLink domain, slice) is filled as far as the mesh
    sizes allow, by any factors of the mesh axes; within a torus each mesh axis takes at most one
    piece of each torus axis, and the pieces of one torus axis lie in any order. ``slice_shape``:
    chips of a TPU slice (default: that of ``topology``). With ``every_slice``, and where no shape
    is given, all shapes of a slice with that many chips.

    Of mappings whose collectives all take equally long one is kept, and none is kept that is
    *dominated*: for each mesh axis and each kind of collective another one has neither more fixed
    seconds nor more seconds a byte, and less somewhere; so too for each algorithm that may run it
    (``collectives``). A collective's time is a line in its bytes, so under the other mapping no
    collective of any plan takes longer, and no plan is lost.

    The first is ``topology``'s; the others follow by ``preference``. Where that default is itself
    dominated, it is not among them: by another slice shape (256 chips of v3: 8x32 has rings,
    16x16 none), by pairing the two devices of a chip on another axis, and rarely else (16x2 on v5e:
    it makes x a 2x8 piece of the torus, and 4x4 is as fast with fewer hops).

    Raises:
        HardwareError: as ``topology``.
    """
    default = topology(chip, mesh_sizes, slice_shape)
    # Equal costs meet under one key; the first found stays.
    found: dict[tuple[float, ...], Topology] = {costs(default, collectives): default}
    for candidate in candidates(chip, mesh_sizes, slice_shape, every_slice):
        found.setdefault(costs(candidate, collectives), candidate)
    kept = set(skyline(found))
    return tuple(laid for cost, laid in found.items() if cost in kept)


def mesh_shapes(chips: int, axes: int = 3, *, ordered: bool = False) -> tuple[Sizes, ...]:
    """Sizes of every mesh of ``chips`` devices with up to ``axes`` axes, none of size 1 (one
    device is a mesh of one): fewest axes first, then the most even ones.

    Sizes ascend. With all its mappings tried, a mesh whose axes are permuted offers the same
    plans but in one point: a dim that several axes cut is cut in mesh order, which decides the
    one that is gathered last, and whole. With ``ordered`` the other orders come too, each after its
    sorted one.

    Raises:
        HardwareError: less than one device or axis.
    """
    if chips < 1 or axes < 1:
        raise HardwareError(f"a mesh of {chips} devices with up to {axes} axes: both at least 1")
    if chips == 1:
        return ((1,),)
    found = []
    for count in range(1, axes + 1):
        shapes = ascending(chips, count, 2)
        found += sorted(shapes, key=lambda s: (sum(s), s[::-1]))
    if ordered:
        found = [p for shape in found for p in sorted(set(itertools.permutations(shape)))]
    return tuple(found)


def ascending(n: int, count: int, least: int) -> Iterator[Sizes]:
    """Ways to write ``n`` as a product of ``count`` factors of at least ``least``, ascending."""
    if count == 1:
        if n >= least:
            yield (n,)
        return
    for first in range(least, int(n ** (1 / count) + 1e-9) + 1):
        if n % first == 0:
            yield from ((first, *others) for others in ascending(n // first, count - 1, first))


def candidates(
    chip: Chip, sizes: Sizes, slice_shape: Sizes | None, every_slice: bool
) -> Iterator[Topology]:
    """Every mapping of the space, preferred ones first; many of them cost the same."""
    inside = [((1,) * len(sizes), sizes)]
    if chip.switch is not None:
        inside = fillings(sizes, chip.switch.size)
    if chip.torus is None:
        yield from (laid_on_nodes(chip, inner, outer) for inner, outer in inside)
        return
    torus = chip.torus
    laid: list[tuple[tuple[int, float, int], Topology]] = []
    for inner, rest in inside:
        for middle, outer in slice_fillings(torus, rest, slice_shape):
            chips = math.prod(middle)
            shapes = [slice_shape] if slice_shape else [default_slice(torus, chips)]
            if every_slice and slice_shape is None:
                shapes = slice_shapes(torus, chips)
            for shape in shapes:
                for cuts in torus_cuts(shape, middle):
                    rank = preference(torus, shape, cuts)
                    for n, orders in enumerate(piece_orders(cuts)):
                        made = laid_on_slices(chip, shape, inner, cuts, outer, orders)
                        laid.append(((*rank, n), made))
    laid.sort(key=lambda pair: pair[0])  # stable: equal ranks stay as found
    yield from (made for _, made in laid)


def piece_orders(cuts: Cuts) -> Iterator[tuple[Sizes, ...]]:
    """Per torus axis an order of the mesh axes, for every order of those that take of it."""

    def orders(factors: Sizes) -> Iterator[Sizes]:
        whole = tuple(axis for axis, f in enumerate(factors) if f == 1)
        takers = [axis for axis, f in enumerate(factors) if f > 1]
        yield from ((*whole, *order) for order in itertools.permutations(takers))

    return itertools.product(*map(orders, cuts))


def costs(laid: Topology, collectives: Collectives = STANDARD_ONLY) -> tuple[float, ...]:
    """Fixed seconds and seconds a byte of each kind of collective on each mesh axis, by each
    algorithm that may run it, rounded so that sums taken in another order compare equal."""
    return tuple(itertools.chain(*(lines_of(link, collectives) for link in laid.links())))


def canonical(link: AxisLink) -> AxisLink:
    """Rings of a level in one order: which torus axis is which makes no difference."""
    levels = (
        replace(level, rings=tuple(sorted(level.rings, key=ring_order))) for level in link.levels
    )
    return AxisLink(tuple(levels), link.overhead)


def ring_order(r: Ring) -> tuple[float, ...]:
    return (r.size, r.bandwidth, r.latency, r.wraps)


@lru_cache(maxsize=4096)
def lines_of(link: AxisLink, collectives: Collectives) -> tuple[float, ...]:
    numbers: list[float] = []
    alike = canonical(link)  # which torus axis is which makes a difference to a grid's order only
    for kind in KINDS:
        standard = standard_line(kind, alike)
        asked = collectives.of(kind)
        if asked in (None, STANDARD, PRODUCTS):
            numbers += standard
        for f in FORMULAS.values():
            apart = f.lossy or f.kernel  # only where asked for
            if f.kind != kind or f.inside or (apart and f.name != asked):
                continue
            if f.name == asked:
                numbers += (*lines(f, link), *standard)  # what it does not take runs by XLA's own
            elif asked is None:
                # One that cannot be chosen here adds nothing to what XLA's own offers.
                numbers += lines(f, link) if f.fits(link) and faster(f, link) else standard
    return tuple(float(f"{x:.{DIGITS}g}") for x in numbers)


def skyline(points: Iterable[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The points that no other one is at most as large as in every coordinate."""
    kept: list[tuple[float, ...]] = []
    # What dominates a point comes before it in lexicographic order.
    for point in sorted(points):
        if not any(all(a <= b for a, b in zip(k, point, strict=True)) for k in kept):
            kept.append(point)
    return kept
