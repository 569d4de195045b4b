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
from functools import cache

import numpy as np

from neocc.cost.hardware import Chip, HardwareError, Link, Torus


@dataclass(frozen=True, slots=True)
class Ring:
    """Devices in a line over one kind of wire, as one mesh axis uses it.

    ``bandwidth`` is bytes/s per device in one direction, ``latency`` seconds a step, ``wraps``
    whether the ends are joined (then both directions are of use), ``switched`` whether each device
    reaches each other directly.
    """

    size: int
    bandwidth: float
    latency: float
    wraps: bool = False
    switched: bool = False

    @property
    def directions(self) -> int:
        """Directions in which the device at the worst place can take data in."""
        return 2 if self.wraps else 1

    @property
    def steps(self) -> int:
        """Steps until data from the farthest device has come round the ring."""
        return self.size // 2 if self.wraps else self.size - 1


@dataclass(frozen=True, slots=True)
class Level:
    """One or more rings used at a time: a plane of a torus is two."""

    rings: tuple[Ring, ...]

    @property
    def size(self) -> int:
        return math.prod(ring.size for ring in self.rings)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a device takes in over all its rings and directions."""
        return sum(ring.directions * ring.bandwidth for ring in self.rings)

    @property
    def wraps(self) -> bool:
        return all(ring.wraps for ring in self.rings)


@dataclass(frozen=True, slots=True)
class AxisLink:
    """What a mesh axis is made of: its levels, fastest and innermost first, and the seconds that
    it costs to launch a collective on it. An axis of size 1 has no level."""

    levels: tuple[Level, ...]
    overhead: float = 0.0

    @property
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
        mesh = [math.prod(part.size for part in parts) for parts in self.parts]
        return where.reshape(*mesh, len(self.shape))

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
            levels.append(Level(tuple(ring for ring in rings if ring.size > 1)))
        outer = [p.size for p in parts if p.axis == 0]
        levels.append(_switched(math.prod(outer), chip.network))
        return AxisLink(tuple(lv for lv in levels if lv.size > 1), chip.collective_overhead)


def _switched(size: int, link: Link) -> Level:
    return Level((Ring(size, link.rate, link.latency, switched=True),) if size > 1 else ())


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
    ``slice_shape(chip, n)``).

    Raises:
        HardwareError: a size below 1, or a slice shape that does not hold the mesh.
    """
    if any(size < 1 for size in mesh_sizes):
        raise HardwareError(f"mesh sizes {mesh_sizes} must be at least 1")
    rest = mesh_sizes
    inner = (1,) * len(rest)
    if chip.switch is not None:
        inner, rest = _fill(rest, chip.switch.size)
    if chip.torus is None:
        shape = (math.prod(rest), math.prod(inner))
        return Topology(chip, shape, _join(_pieces(0, rest), _pieces(1, inner)))
    shape = slice_shape
    if shape is None:
        middle, rest = _fill(rest, math.prod(chip.torus.max_shape))
        shape = default_slice(chip.torus, math.prod(middle))
    else:
        middle, rest = _fill(rest, math.prod(shape))
        if math.prod(middle) != math.prod(shape):
            raise HardwareError(
                f"a slice of {'x'.join(map(str, shape))} chips does not hold a mesh of "
                f"{'x'.join(map(str, mesh_sizes))} devices; choose a shape whose size divides it"
            )
    core = len(shape) + 1
    whole = (math.prod(rest), *shape, math.prod(inner))
    laid = _lay(chip.torus, shape, middle)
    parts = _join(_join(_pieces(0, rest), laid), _pieces(core, inner))
    return Topology(chip, whole, parts)


def default_slice(torus: Torus, chips: int) -> tuple[int, ...]:
    """The shape of a slice of ``chips`` chips: the one nearest to a cube or square, of those
    whose axes all wrap if there is one (128 on v5p is 4x4x8; 128 on v5e is 8x16).

    Raises:
        HardwareError: no box of that many chips fits into a pod.
    """
    rank = len(torus.max_shape)
    shapes = [
        s
        for s in _factorings(chips, rank)
        if list(s) == sorted(s) and all(a <= b for a, b in zip(s, torus.max_shape, strict=True))
    ]
    if not shapes:
        raise HardwareError(
            f"no slice of {chips} chips: no {rank}-D box of that many fits into a pod of "
            f"{'x'.join(map(str, torus.max_shape))}; choose another mesh size"
        )
    best = min(shapes, key=lambda s: (not all(torus.wraps(s)), sum(s)))
    # Google writes slices thinner than a cube with their ones last: 2x2x1.
    return tuple(s for s in best if s > 1) + (1,) * best.count(1) if rank > 2 else best


def _fill(sizes: tuple[int, ...], room: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits each mesh axis into (inside, outside) a level of ``room`` devices, last axis first."""
    inside = []
    for size in reversed(sizes):
        inside.append(max(d for d in range(1, min(size, room) + 1) if size % d == 0))
        room //= inside[-1]
    inside.reverse()
    return tuple(inside), tuple(s // i for s, i in zip(sizes, inside, strict=True))


def _factorings(n: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write ``n`` as a product of ``count`` factors."""
    if count == 1:
        yield (n,)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        for others in _factorings(n // first, count - 1):
            yield (first, *others)


def _join(
    major: tuple[tuple[Part, ...], ...], minor: tuple[tuple[Part, ...], ...]
) -> tuple[tuple[Part, ...], ...]:
    return tuple((*a, *b) for a, b in zip(major, minor, strict=True))


def _pieces(axis: int, factors: tuple[int, ...]) -> tuple[tuple[Part, ...], ...]:
    """Cuts one physical axis among the mesh axes, later ones closer together."""
    pieces = []
    stride = 1
    for size in reversed(factors):
        pieces.append((Part(axis, size, stride),) if size > 1 else ())
        stride *= size
    return tuple(reversed(pieces))


def _lay(
    torus: Torus, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[Part, ...], ...]:
    """Gives each mesh axis its part of a torus: fewest cut physical axes, then least time for
    every axis to gather one byte."""
    wraps = torus.wraps(shape)
    best: tuple[tuple[float, ...], tuple[tuple[Part, ...], ...]] | None = None
    for cuts in itertools.product(*(_factorings(size, len(sizes)) for size in shape)):
        if any(
            math.prod(f) != size for f, size in zip(zip(*cuts, strict=True), sizes, strict=True)
        ):
            continue
        parts: tuple[tuple[Part, ...], ...] = ((),) * len(sizes)
        for axis, factors in enumerate(cuts, start=1):
            parts = _join(parts, _pieces(axis, factors))
        split = sum(sum(f > 1 for f in factors) > 1 for factors in cuts)
        seconds = 0.0
        for pieces in parts:
            rings = (_ring(p, shape[p.axis - 1], wraps[p.axis - 1], torus.link) for p in pieces)
            if pieces:
                seconds += 1 / Level(tuple(rings)).bandwidth
        if best is None or (split, seconds) < best[0]:
            best = ((split, seconds), parts)
    if best is None:
        raise HardwareError(f"a mesh of {sizes} does not lie on a slice of {shape} chips")
    return best[1]
