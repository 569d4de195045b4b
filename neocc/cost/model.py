"""What an op and a move cost on one chip of a mesh, in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from neocc.cost.algorithms import FORMULAS, STANDARD, Formula
from neocc.cost.attention import (
    PORTABLE,
    UNFUSED,
    AttentionForm,
    attention_flops,
    attention_seconds,
    unfused_flops,
)
from neocc.cost.attention_kernels import KERNELS, AttentionKernels
from neocc.cost.choice import STANDARD_ONLY, Collectives, Way, runs, way_of
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import Chip, HardwareError
from neocc.cost.ring_attention import RingTime, ring_time
from neocc.cost.roofline import (
    elementwise_time,
    matmul_time,
    product_time,
    product_traffic_time,
)
from neocc.cost.tiling import LANES, copied_seconds, lane_dim
from neocc.cost.topology import AxisLink, Topology
from neocc.cost.topology import topology as default_topology
from neocc.cost.vector import single_row_time, vector_time
from neocc.ir.mesh import Layout, Mesh, Partial, Strategy
from neocc.ir.ops import ATTENTION, ELEMENTWISE
from neocc.ir.ops.attention import PRODUCTS, circle_of, ring_axis, ring_sends
from neocc.ir.program import Op, Value
from neocc.ir.types import Dim, TensorType

VECTOR = ELEMENTWISE | {"reduce"}
Parts = Callable[[str], int]  # iteration dim -> number of blocks it is cut into


def local(dims: Iterable[Dim], parts: Parts) -> int:
    return math.prod(d.size // parts(d.name) for d in dims)


@dataclass(frozen=True)
class CostModel:
    """Prices of compute and communication on a mesh of one kind of chip, laid on its devices as
    ``topology`` says; with ``others``, each collective as the fastest of all of them runs it.
    ``offload``: what loops keep for later ones may lie in the hosts' memory. ``collectives``: what
    may run them."""

    chip: Chip
    mesh: Mesh
    topology: Topology
    overlap: float = 0.9  # share of a hideable transfer that can run behind compute; assumed
    attention: AttentionForm = PORTABLE
    others: tuple[Topology, ...] = ()
    offload: bool = False
    collectives: Collectives = STANDARD_ONLY

    @staticmethod
    def of(
        chip: Chip,
        mesh: Mesh,
        topology: Topology | None = None,
        offload: bool = False,
        collectives: Collectives = STANDARD_ONLY,
    ) -> CostModel:
        """Under one of ``neocc.cost.mappings.mappings``; without, under the default one.

        Raises:
            HardwareError: the topology is of another chip or mesh; no slice of the chip has as
                many devices; or the way to the host, for ``offload``, is not known.
            LayoutError: a collective is to run by what cannot run on the mesh.
        """
        collectives.check(mesh, chip)
        if offload and chip.host is None:
            raise HardwareError(f"the table has no bandwidth from {chip.name} to its host")
        laid = topology or default_topology(chip, mesh.sizes)
        if laid.chip != chip or laid.mesh_sizes != mesh.sizes:
            sizes = "x".join(map(str, laid.mesh_sizes))
            raise HardwareError(
                f"a mapping of {sizes} on {laid.chip.name} is none of mesh {mesh} on {chip.name}"
            )
        return CostModel(chip, mesh, laid, offload=offload, collectives=collectives)

    @staticmethod
    def floor(
        chip: Chip,
        mesh: Mesh,
        topologies: Sequence[Topology],
        offload: bool = False,
        collectives: Collectives = STANDARD_ONLY,
    ) -> CostModel:
        """A bound on all of these mappings at once: under none of them does any plan cost less
        than here, where each collective takes the time of the mapping that is fastest for it. So
        one solve tells whether any of them can beat a plan that is known.

        Raises:
            HardwareError: as ``of``; or there is no mapping.
        """
        if not topologies:
            raise HardwareError(f"no mapping of mesh {mesh} to bound")
        models = [CostModel.of(chip, mesh, t, offload, collectives) for t in topologies]
        return replace(models[0], others=tuple(topologies[1:]))

    @cached_property
    def links(self) -> tuple[tuple[AxisLink, ...], ...]:
        """The links that each mesh axis may have, without repeats; one, but for a ``floor``."""
        laid = [t.links() for t in (self.topology, *self.others)]
        return tuple(tuple(dict.fromkeys(axis)) for axis in zip(*laid, strict=True))

    def op_seconds(
        self, op: Op, parts: Parts, unmoved: Container[Value] = (), again: int = 0
    ) -> float:
        """Time of one run of one op on one device, its iteration dims cut into ``parts``.

        ``unmoved``: operands and results that do not pass through memory, because what makes or
        reads them is fused with the op. ``again``: how often more than once it is run, where
        products make it themselves.
        """
        if op.kind == "einsum":
            batch, m, n, k = matmul_sizes(op, parts)
            seconds = matmul_time(self.chip, batch, m, n, k, op.operands[0].type.dtype)
            if self.chip.vector_clock is not None:
                moved = (v for v in (*op.operands, op.result) if v not in unmoved)
                dtype = op.operands[0].type.dtype
                if on_vector_unit(self.chip, op, parts):
                    product = single_row_time(self.chip, batch * m * n * k)
                else:
                    product = product_time(self.chip, batch, m, n, k, dtype)
                size = sum(self.local_bytes(v, parts) for v in moved)
                seconds = max(product, product_traffic_time(self.chip, m, n, size))
            return seconds + self.chip.kernel_overhead
        if op.kind in ATTENTION and (kernels := self.kernels_of(op, parts)):
            moved = sum(self.local_bytes(v, parts) for v in (*op.operands, *op.results))
            return kernels.seconds(self.chip, op, parts, moved)
        if op.kind in ATTENTION:
            return attention_seconds(self.chip, op, parts, self.attention)
        if op.kind in ("constant", "iota", "rename", "split", "broadcast"):
            return 0.0  # fused into what reads them
        if op.kind == "gather":
            moved = 2 * self.local_bytes(op.result, parts)  # rows, not the whole table
        elif op.kind == "update":
            return self.update_seconds(op, parts) + self.chip.kernel_overhead
        elif op.kind == "scatter_add":
            moved = self.local_bytes(op.operands[0], parts) + self.local_bytes(op.result, parts)
        else:
            every = (*op.operands, *op.results)
            moved = sum(self.local_bytes(v, parts) for v in every if v not in unmoved)
        vector = self.vector_seconds([op], parts) * (1 + again)
        return max(elementwise_time(self.chip, moved), vector) + self.chip.kernel_overhead

    def kernels_of(self, op: Op, parts: Parts) -> AttentionKernels | None:
        """The kernels that an op of fused attention runs as, cut like this, if it does."""
        asked = self.collectives.attention
        return asked if asked and asked.takes(op, parts) else None

    def ring(self, op: Op, strategy: Strategy) -> RingTime | None:
        """One run of an op whose blocks go round an axis, if they do: of fused attention."""
        axis = ring_axis(op, strategy)
        if axis is None:
            return None
        key = (op, strategy)
        if key not in self.rings:
            blocks, devices = strategy.blocks(self.mesh), self.mesh.sizes[axis]

            def parts(dim: str) -> int:
                return blocks.get(dim, 1)

            compute = self.op_seconds(op, parts)
            computed = circle_of(op, devices).computed
            sends = ring_sends(op, devices, parts)
            beside = self.chip.permutes_beside
            times = (ring_time(compute, computed, sends, link, beside) for link in self.links[axis])
            self.rings[key] = min(times, key=lambda t: t.exposed)
        return self.rings[key]

    @cached_property
    def rings(self) -> dict[tuple[Op, Strategy], RingTime]:
        """Of every ring that was asked for."""
        return {}

    def update_seconds(self, op: Op, parts: Parts) -> float:
        """Time to write a row into an array: it is read, then written. A TPU lays rows that are no
        whole number of lanes long across them: it turns a tile for each."""
        row = self.local_bytes(op.operands[1], parts)
        minor = op.operands[1].type.dims[-1:]
        if self.chip.kind == "tpu" and any(d.size // parts(d.name) % LANES for d in minor):
            return copied_seconds(self.chip, LANES * row)
        return elementwise_time(self.chip, 3 * row)

    def traffic_seconds(self, values: Iterable[Value], parts: Parts) -> float:
        """Time to read or write each value once: what a fused cluster costs in memory."""
        moved = sum(self.local_bytes(v, parts) for v in values)
        return elementwise_time(self.chip, moved) + self.chip.kernel_overhead

    def vector_seconds(self, ops: Iterable[Op], parts: Parts) -> float:
        def size(op: Op) -> int:
            return max(local(v.type.dims, parts) for v in (*op.operands, *op.results))

        return vector_time(self.chip, ((op, size(op)) for op in ops if op.kind in VECTOR))

    def local_bytes(self, value: Value, parts: Parts) -> int:
        return local(value.type.dims, parts) * value.type.itemsize

    def move_seconds(
        self, kind: str, axis: int | None, full_bytes: int, target_bytes: int
    ) -> float:
        """Time of one reshard along a mesh axis, or, without, to the host or back.
        ``full_bytes``: the larger of what a device holds before and after it; ``target_bytes``:
        what it holds after. Infinite to a host whose bandwidth is not known."""
        if axis is None and self.chip.host is None:
            return math.inf
        if axis is None:
            assert self.chip.host is not None
            return self.chip.host.latency + full_bytes / self.chip.host.rate
        if kind == "slice":
            return elementwise_time(self.chip, 2 * target_bytes)
        return min(collective_time(kind, full_bytes, link) for link in self.links[axis])

    def way(
        self,
        kind: str,
        axis: int | None,
        type: TensorType,
        ends: tuple[Layout, Layout],
        algorithm: str | None = None,
    ) -> Way:
        """How one reshard of a tensor runs, from one layout to another along a mesh axis or, with
        none, between memories: as ``collectives`` has it, or by ``algorithm``. What cannot run by
        the algorithm asked for (``runnable``) runs by XLA's own."""
        before, after = (type.local_bytes(self.mesh, end) for end in ends)
        place = ends[0].axes[axis] if axis is not None else None
        reduction = place.op if isinstance(place, Partial) else "sum"
        key = (kind, axis, before, after, type.dtype, reduction, algorithm)
        found = self.ways.get(key)
        if found is None:
            asked = algorithm or self.collectives.of(kind)
            found = self.ways[key] = self._way(
                kind, axis, (max(before, after), after), type, reduction, asked
            )
        return found

    def _way(
        self,
        kind: str,
        axis: int | None,
        sizes: tuple[int, int],
        type: TensorType,
        reduction: str,
        asked: str | None,
    ) -> Way:
        seconds = self.move_seconds(kind, axis, *sizes)
        best = Way(STANDARD, (), seconds, seconds)
        if axis is None or asked == STANDARD or not sizes[0]:
            return best
        if asked is not None:
            f = self.runnable(kind, axis, asked, type.dtype, reduction)
            every = [(f, link) for link in self.links[axis]] if f else []
        else:
            every = self.candidates(kind, axis)
        ways = [way_of(f, sizes[0], type.itemsize, link, self.chip, seconds) for f, link in every]
        if asked is None:
            ways.insert(0, best)  # of equals XLA's own
        return min(ways, key=lambda way: way.seconds, default=best)

    def runnable(
        self, kind: str, axis: int, name: str, dtype: str, reduction: str = "sum"
    ) -> Formula | None:
        """The algorithm of a name, if a collective of this kind can run by it on the axis."""
        f = FORMULAS.get((kind, name))
        known = (
            f is not None
            and not f.inside
            and f.kernel in ("", self.chip.kind)
            and runs(f, self.mesh.sizes[axis])
            and f.takes(dtype, reduction)
        )
        return f if known else None

    @cached_property
    def ways(self) -> dict[tuple[object, ...], Way]:
        """Of every reshard that was asked for, by all that its price depends on."""
        return {}

    def candidates(self, kind: str, axis: int) -> list[tuple[Formula, AxisLink]]:
        """The algorithms that may be better than XLA's own, each on the wires that it is for."""
        found = self.algorithms.get((kind, axis))
        if found is None:
            found = self.algorithms[kind, axis] = [
                (f, link)
                for link in self.links[axis]
                for f in self.collectives.candidates(kind, link)
            ]
        return found

    @cached_property
    def algorithms(self) -> dict[tuple[str, int], list[tuple[Formula, AxisLink]]]:
        """``candidates`` that were asked for."""
        return {}

    def copy_seconds(
        self,
        kind: str,
        moved: Iterable[str | None],
        type: TensorType,
        ends: Sequence[Layout | None],
    ) -> float:
        """Time in which a device itself copies what a reshard moves (``cost.tiling``), beside
        ``move_seconds``. ``moved``: the dims that it gathers or cuts; ``ends``: the layouts before
        and after."""
        if kind == "slice" or len(type.dims) < 2:
            return 0.0
        lanes = lane_dim(type.dims)
        if lanes.name not in moved or lanes.size % LANES:
            return 0.0
        shapes = [type.local_shape(self.mesh, layout) for layout in ends]
        if min(shape[type.dims.index(lanes)] for shape in shapes) % LANES == 0:
            return 0.0
        return copied_seconds(self.chip, max(map(math.prod, shapes)) * type.itemsize)


def product_flops(op: Op, parts: Parts) -> int:
    """FLOPs of the matrix products of one run of an op on one device, 2 a multiply-add; an op
    that has none has 0."""
    if op.kind == "einsum":
        return einsum_flops(op, parts)
    if "kernel" in op.attrs:
        return KERNELS[op.attrs["kernel"]].flops(op, parts)
    return attention_flops(op, parts) if op.kind in ATTENTION else 0


def on_vector_unit(chip: Chip, op: Op, parts: Parts) -> bool:
    """Whether a TPU's compiler makes an einsum a sum on the vector unit: where one operand has no
    rows, or one, to multiply the other by."""
    if chip.kind != "tpu" or op.kind != "einsum":
        return False
    _, m, n, _ = matmul_sizes(op, parts)
    return m == 1 or n == 1


def unskipped_flops(op: Op) -> int:
    """FLOPs of a whole op that leaves no score out: fused attention without masks."""
    if op.kind in ATTENTION:
        return unfused_flops(op) // UNFUSED[op.kind] * PRODUCTS[op.kind]
    return product_flops(op, lambda dim: 1)


def formula_flops(op: Op) -> int:
    """FLOPs of a whole op as a model's formula has them: of fused attention those of the form that
    is not fused (``cost.attention.unfused_flops``)."""
    return unfused_flops(op) if op.kind in ATTENTION else product_flops(op, lambda dim: 1)


def matmul_sizes(op: Op, parts: Parts) -> tuple[int, int, int, int]:
    """Local (batch, m, n, k) of an einsum: dims of both operands and the result; of the first
    and the result; of the second and the result; the rest, which are summed."""
    a, b = (set(v.type.names) for v in op.operands)
    out = set(op.result.type.names)
    dims = {d.name: d for v in op.operands for d in v.type.dims}
    sizes = {n: d.size // parts(n) for n, d in dims.items()}

    def product(names: Iterable[str]) -> int:
        return math.prod(sizes[n] for n in names)

    return (
        product(a & b & out),
        product((a & out) - b),
        product((b & out) - a),
        product(n for n in sizes if n not in out),
    )


def einsum_flops(op: Op, parts: Parts) -> int:
    """FLOPs of one run on one device, 2 a multiply-add."""
    batch, m, n, k = matmul_sizes(op, parts)
    return 2 * batch * m * n * k
