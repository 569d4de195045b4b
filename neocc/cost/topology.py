"""Where the axes of a mesh lie on the wires.

A device reaches the others over *levels*, fastest first: the other device of its chip, the torus
of its slice and the data-centre network on TPU; the NVLink domain and the NICs on GPU. A mesh axis
takes a factor of each level; within a torus it takes whole physical axes where it can.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from neocc.cost.hardware import Chip, HardwareError, Link, Torus

Sizes = tuple[int, ...]
Cuts = tuple[Sizes, ...]  # per axis of a torus, the factor that each mesh axis takes of it


@dataclass(frozen=True, slots=True)
class Ring:
    """Devices in a line over one kind of wire, as one mesh axis uses it.

    ``bandwidth`` is bytes/s per device in one direction, ``latency`` seconds a step, ``wraps``
    whether the ends are joined (then both directions are of use), ``switched`` whether each device
    reaches each other directly, ``nodes`` whether it joins the nodes of a GPU cluster.
    """

    size: int
    bandwidth: float
    latency: float
    wraps: bool = False
    switched: bool = False
    nodes: bool = False

    @property
    def directions(self) -> int:
        """Directions in which the device at the worst place can take data in."""
        return 2 if self.wraps else 1

    @property
    def steps(self) -> int:
        """Steps until data from the farthest device has come round the ring."""
        return self.size // 2 if self.wraps else self.size - 1


@dataclass(frozen=True)
class Level:
    """One or more rings used at a time: a plane of a torus is two.

    ``cut``: some are pieces of torus axes. Then the TPU compiler runs one ring through all the
    devices (``python -m benchmarks.axis_mappings``), which closes wherever their number is even: a
    grid has such a way round.
    """

    rings: tuple[Ring, ...]
    cut: bool = False

    @property
    def one(self) -> bool:
        """Whether a single ring runs through devices that lie along several."""
        return self.cut and len(self.rings) > 1

    @cached_property
    def size(self) -> int:
        return math.prod(ring.size for ring in self.rings)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s that a device takes in over all its rings and directions."""
        if self.one:
            return (2 if self.wraps else 1) * min(ring.bandwidth for ring in self.rings)
        return sum(ring.directions * ring.bandwidth for ring in self.rings)

    @property
    def wraps(self) -> bool:
        return self.size % 2 == 0 if self.one else all(ring.wraps for ring in self.rings)

    @cached_property
    def latency(self) -> float:
        """Seconds until data from the farthest device has come round."""
        if self.one:
            steps = self.size // 2 if self.wraps else self.size - 1
            return steps * max(ring.latency for ring in self.rings)
        return sum(ring.steps * ring.latency for ring in self.rings)


@dataclass(frozen=True)
class AxisLink:
    """What a mesh axis is made of: its levels, fastest and innermost first, and the seconds that
    it costs to launch a collective on it. An axis of size 1 has no level."""

    levels: tuple[Level, ...]
    overhead: float = 0.0

    @cached_property
    def size(self) -> int:
        """Devices along the axis."""
        return math.prod(level.size for level in self.levels)

    @property
    def hierarchical(self) -> bool:
        """Whether its collectives go over a fast network and then a slower one."""
        return len(self.levels) > 1

    def __str__(self) -> str:
        """``4x4 rings, 74 GB/s a direction``, for reports; nominal rate times efficiency."""
        parts = []
        for level in self.levels:
            shape = "x".join(str(ring.size) for ring in level.rings)
            first = level.rings[0]
            form = "switched" if first.switched else "rings" if level.wraps else "lines"
            form = "as one ring" if level.one else form
            slowest = min(ring.bandwidth for ring in level.rings)
            parts.append(f"{shape} {form}, {slowest / 1e9:.3g} GB/s a direction")
        return "; then ".join(parts) or "one device"


@dataclass(frozen=True, slots=True)
class Part:
    """The piece of a physical axis that a mesh axis takes: ``size`` devices, ``stride`` apart."""

    axis: int  # index into Topology.shape
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The devices that a mesh is laid on.

    ``shape`` is (slices, torus axes..., devices of a chip) on TPU and (nodes, GPUs of a node) on
    GPU. ``parts[a]`` are the pieces that mesh axis ``a`` takes, major first.
    """

    chip: Chip
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]

    @property
    def torus_shape(self) -> tuple[int, ...]:
        """Chips along each axis of one TPU slice; empty on GPU."""
        return self.shape[1:-1]

    @property
    def mesh_sizes(self) -> Sizes:
        """Devices along each axis of the mesh."""
        return tuple(math.prod(part.size for part in parts) for parts in self.parts)

    @property
    def name(self) -> str:
        """As JAX's topologies name it: ``v5p:4x4x8`` for a slice, ``1x16x8`` for GPUs (slices x
        hosts x GPUs a host)."""
        if self.chip.torus is None:
            return f"1x{self.shape[0]}x{self.shape[1]}"
        return f"{self.chip.name}:{'x'.join(map(str, self.torus_shape))}"

    def coordinates(self) -> np.ndarray:
        """Physical coordinates of each mesh position: int [*mesh sizes, len(shape)].

        On TPU columns 1 to -1 are a JAX device's ``coords`` and the last its ``core_on_chip``.
        """
        sizes = [part.size for parts in self.parts for part in parts]
        index = np.indices(sizes or [1]).reshape(len(sizes) or 1, -1)
        where = np.zeros((index.shape[1], len(self.shape)), dtype=np.int64)
        for row, part in zip(index, itertools.chain(*self.parts), strict=False):
            where[:, part.axis] += row * part.stride
        return where.reshape(*self.mesh_sizes, len(self.shape))

    def links(self) -> tuple[AxisLink, ...]:
        """The link of each mesh axis."""
        return tuple(self._link(parts) for parts in self.parts)

    def _link(self, parts: tuple[Part, ...]) -> AxisLink:
        chip, last = self.chip, len(self.shape) - 1
        levels = []
        if chip.switch is not None:
            sizes = [p.size for p in parts if p.axis == last]
            levels.append(_switched(math.prod(sizes), chip.switch.link))
        if chip.torus is not None:
            wraps = chip.torus.wraps(self.torus_shape)
            rings = (
                _ring(p, self.shape[p.axis], wraps[p.axis - 1], chip.torus.link)
                for p in parts
                if 0 < p.axis < last
            )
            cut = any(p.size < self.shape[p.axis] for p in parts if 0 < p.axis < last)
            levels.append(Level(tuple(ring for ring in rings if ring.size > 1), cut))
        outer = [p.size for p in parts if p.axis == 0]
        levels.append(_switched(math.prod(outer), chip.network, nodes=chip.torus is None))
        return AxisLink(tuple(lv for lv in levels if lv.size > 1), chip.collective_overhead)


def _switched(size: int, link: Link, nodes: bool = False) -> Level:
    ring = Ring(size, link.rate, link.latency, switched=True, nodes=nodes)
    return Level((ring,) if size > 1 else ())


def _ring(part: Part, size: int, wraps: bool, link: Link) -> Ring:
    # Parts that lie `stride` apart interleave with `stride - 1` others on the same wires.
    closed = wraps and part.size * part.stride == size
    return Ring(part.size, link.rate / part.stride, link.latency * part.stride, closed)


def axis_links(
    chip: Chip, mesh_sizes: tuple[int, ...], slice_shape: tuple[int, ...] | None = None
) -> tuple[AxisLink, ...]:
    """The link of each axis of a mesh of ``mesh_sizes``, under the default mapping.

    Raises:
        HardwareError: as ``topology``.
    """
    return topology(chip, tuple(mesh_sizes), slice_shape).links()


@cache
def topology(
    chip: Chip, mesh_sizes: tuple[int, ...], slice_shape: tuple[int, ...] | None = None
) -> Topology:
    """The default mapping of a mesh onto devices.

    The last mesh axes fill the fastest level first: 8x16 on GPUs with 8 to a node puts 8 of ``y``
    in a node, and the other 2 and ``x`` across nodes. In a torus a mesh axis takes whole physical
    axes where the sizes allow (8x16 on v5p's 4x4x8: ``x`` the 8, ``y`` the 4x4 plane), and
    pieces of them where not. ``slice_shape`` overrides the chips of a slice (default:
    ``default_slice``). ``neocc.cost.mappings`` has the other mappings.

    Raises:
        HardwareError: a size below 1, or a slice shape that does not hold the mesh.
    """
    if any(size < 1 for size in mesh_sizes):
        raise HardwareError(f"mesh sizes {mesh_sizes} must be at least 1")
    if slice_shape is not None and chip.torus is None:
        raise HardwareError(f"{chip.name} has no slices: leave the slice shape out")
    rest = mesh_sizes
    inner = (1,) * len(rest)
    if chip.switch is not None:
        inner, rest = fillings(rest, chip.switch.size)[0]
    if chip.torus is None:
        return laid_on_nodes(chip, inner, rest)
    torus = chip.torus
    middle, outer = slice_fillings(torus, rest, slice_shape)[0]
    shape = slice_shape or default_slice(torus, math.prod(middle))
    cuts = min(torus_cuts(shape, middle), key=lambda cuts: preference(torus, shape, cuts))
    return laid_on_slices(chip, shape, inner, cuts, outer)


def default_slice(torus: Torus, chips: int) -> tuple[int, ...]:
    """The shape of a slice of ``chips`` chips: the one nearest to a cube or square, of those
    whose axes all wrap if there is one (128 on v5p is 4x4x8; 128 on v5e is 8x16).

    Raises:
        HardwareError: no box of that many chips fits into a pod.
    """
    rank = len(torus.max_shape)
    shapes = slice_shapes(torus, chips)
    if not shapes:
        raise HardwareError(
            f"no slice of {chips} chips: no {rank}-D box of that many fits into a pod of "
            f"{'x'.join(map(str, torus.max_shape))}; choose another mesh size"
        )
    return shapes[0]


def slice_shapes(torus: Torus, chips: int) -> list[tuple[int, ...]]:
    """Every shape of a slice of ``chips`` chips, those whose axes all wrap first, then those
    nearest to a cube; none where no box of that many chips fits into a pod."""
    rank = len(torus.max_shape)
    found = [
        s
        for s in _factorings(chips, rank)
        if list(s) == sorted(s) and all(a <= b for a, b in zip(s, torus.max_shape, strict=True))
    ]
    found.sort(key=lambda s: (not all(torus.wraps(s)), sum(s)))
    if rank == 2:
        return found
    # Google writes slices thinner than a cube with their ones last: 2x2x1.
    return [tuple(n for n in s if n > 1) + (1,) * s.count(1) for s in found]


def fillings(sizes: Sizes, room: int) -> list[tuple[Sizes, Sizes]]:
    """Every way to split each mesh axis into (inside, outside) a level of ``room`` devices that
    fills it as far as the sizes allow; first the one that gives most to the last axes."""
    divisors = [[d for d in range(1, min(size, room) + 1) if size % d == 0] for size in sizes]
    found = [f for f in itertools.product(*divisors) if math.prod(f) <= room]
    most = max(map(math.prod, found))
    full = sorted((f for f in found if math.prod(f) == most), key=lambda f: f[::-1], reverse=True)
    return [(f, tuple(s // i for s, i in zip(sizes, f, strict=True))) for f in full]


def slice_fillings(
    torus: Torus, sizes: Sizes, slice_shape: Sizes | None
) -> list[tuple[Sizes, Sizes]]:
    """``fillings`` of one slice: of ``slice_shape``, or as large as a pod.

    Raises:
        HardwareError: a slice of that shape does not hold the mesh, or is none.
    """
    if slice_shape is None:
        return fillings(sizes, math.prod(torus.max_shape))
    rank = len(torus.max_shape)
    if len(slice_shape) != rank:
        raise HardwareError(f"a slice has {rank} axes, not {len(slice_shape)}: {slice_shape}")
    found = fillings(sizes, math.prod(slice_shape))
    if math.prod(found[0][0]) != math.prod(slice_shape):
        raise HardwareError(
            f"a slice of {'x'.join(map(str, slice_shape))} chips does not hold a mesh of "
            f"{'x'.join(map(str, sizes))} chips; choose a shape whose size divides it"
        )
    return found


def torus_cuts(shape: Sizes, sizes: Sizes) -> Iterator[Cuts]:
    """Every way to give mesh axes of ``sizes`` one factor of each axis of a torus."""
    if not shape:
        if all(size == 1 for size in sizes):
            yield ()
        return
    for factors in _factorings(shape[0], len(sizes)):
        if all(size % f == 0 for size, f in zip(sizes, factors, strict=True)):
            left = tuple(size // f for size, f in zip(sizes, factors, strict=True))
            for others in torus_cuts(shape[1:], left):
                yield (factors, *others)


def preference(torus: Torus, shape: Sizes, cuts: Cuts) -> tuple[int, float]:
    """The least is the default: fewest cut torus axes, then least time for every mesh axis to
    gather one byte."""
    wraps = torus.wraps(shape)
    split = sum(sum(f > 1 for f in factors) > 1 for factors in cuts)
    pieces = [_pieces(axis, factors) for axis, factors in enumerate(cuts)]
    seconds = 0.0
    for taken in zip(*pieces, strict=True):
        rings = [
            _ring(p, shape[p.axis], wraps[p.axis], torus.link) for p in itertools.chain(*taken)
        ]
        if rings:
            seconds += 1 / Level(tuple(rings)).bandwidth
    return split, seconds


def laid_on_nodes(chip: Chip, inner: Sizes, outer: Sizes) -> Topology:
    """A mesh on GPUs: the factor of each axis within a node, and over nodes."""
    shape = (math.prod(outer), math.prod(inner))
    return Topology(chip, shape, _join([_pieces(0, outer), _pieces(1, inner)]))


def laid_on_slices(
    chip: Chip,
    shape: Sizes,
    inner: Sizes,
    cuts: Cuts,
    outer: Sizes,
    orders: tuple[Sizes, ...] | None = None,
) -> Topology:
    """A mesh on TPU slices of ``shape``: the factor of each axis within a chip, of each axis of
    the torus, and over slices.

    ``orders``: per axis of the torus, the mesh axes in the order in which their pieces lie on it,
    neighbours last; by default theirs in the mesh.
    """
    orders = orders or (tuple(range(len(inner))),) * len(shape)
    laid = [
        _pieces(axis, factors, order)
        for axis, (factors, order) in enumerate(zip(cuts, orders, strict=True), start=1)
    ]
    core = len(shape) + 1
    whole = (math.prod(outer), *shape, math.prod(inner))
    return Topology(chip, whole, _join([_pieces(0, outer), *laid, _pieces(core, inner)]))


def _factorings(n: int, count: int) -> Iterator[Sizes]:
    """Every ordered way to write ``n`` as a product of ``count`` factors."""
    if count == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for others in _factorings(n // first, count - 1):
            yield (first, *others)


def _join(levels: list[list[tuple[Part, ...]]]) -> tuple[tuple[Part, ...], ...]:
    """Per mesh axis, its pieces of all levels, major first."""
    return tuple(tuple(itertools.chain(*taken)) for taken in zip(*levels, strict=True))


def _pieces(axis: int, factors: Sizes, order: Sizes | None = None) -> list[tuple[Part, ...]]:
    """Cuts one physical axis among the mesh axes, those later in ``order`` closer together."""
    pieces: list[tuple[Part, ...]] = [()] * len(factors)
    stride = 1
    for mesh_axis in reversed(order or range(len(factors))):
        if factors[mesh_axis] > 1:
            pieces[mesh_axis] = (Part(axis, factors[mesh_axis], stride),)
            stride *= factors[mesh_axis]
    return pieces
