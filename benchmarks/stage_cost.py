"""What one layer costs under a stated plan: the layout problem of its program, with the plan as
rules, priced by ``neocc.cost``.

The mesh of a stage has the axes data (FSDP only), context and tensor; the links of its axes are
those of the whole mesh, in which they lie among data and pipeline parallel ones. Flat shards of
weights divide by any number of devices, dims do not: the data axis stands in the program with at
most ``DATA`` devices, at the link of all of them, which changes no transfer's bytes.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

from benchmarks.dense_models import MATRICES, Dense, embedding, head, layer
from neocc.cost.hardware import Chip
from neocc.cost.model import CostModel, Parts, matmul_sizes
from neocc.cost.roofline import ITEM_BYTES, elementwise_time, matmul_time
from neocc.cost.topology import AxisLink, topology
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.ops import ATTENTION
from neocc.ir.ops.attention import PRODUCTS
from neocc.ir.program import Input, Op, Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import Strategy, Through
from neocc.passes.layout.build import build
from neocc.passes.layout.problem import Problem, Rules
from neocc.passes.layout.rules import cuttable
from neocc.passes.layout.solve import solve
from neocc.passes.simplify import simplify

DATA = 16
SMALL = 1 << 18  # bytes: gradients of norms and biases, and the loss, are reduced with others
FORBIDDEN = 1e6  # seconds
AXES = ("data", "context", "tensor")


@dataclass(frozen=True)
class Plan:
    """How a microbatch of a stage lies on devices, and how its layer is computed.

    ``data`` devices share each weight (FSDP; 1 for none), ``context`` the sequence, ``tensor`` the
    heads and the feed-forward; ``sequence``: the rest is cut along seq on the tensor axis.
    ``attention``: rate of the products in a fused attention kernel as a share of that of a large
    product; None where scores are stored. ``low``: dtype of the layer's products, if it is not that
    of the activations; ``cast``: bytes moved to bring one element of an activation into it, in all
    the forms that products want; ``cast_weights``: one of a weight, for one product.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    sequence: bool = False
    attention: float | None = 0.7
    dropout: bool = False
    low: str | None = None
    cast: float = 4.0
    cast_weights: float = 0.0
    dtype: str = "bf16"


@dataclass(frozen=True)
class Sent:
    """One transfer: seconds, how many of them are latency, whether it is of a weight or its
    gradient, and which product made what is sent, if one did."""

    kind: str
    axis: str
    seconds: float
    latency: float
    bytes: float
    weight: bool
    after: str


@dataclass
class Pass:
    """Seconds of the forward or the backward pass of a layer on one device.

    ``products`` by the weight that they multiply (gradients of weights as ``grad``), ``core``: the
    products of attention, ``traffic``: what is bound by memory, ``core_traffic``: that of scores;
    ``kernels``: how many there are.
    """

    products: dict[str, float] = field(default_factory=dict)
    core: float = 0.0
    traffic: float = 0.0
    core_traffic: float = 0.0
    kernels: int = 0
    sent: list[Sent] = field(default_factory=list)

    @property
    def product(self) -> float:
        return sum(self.products.values())


@dataclass(frozen=True)
class LayerCost:
    forward: Pass
    backward: Pass


def is_core(op: Op) -> bool:
    """Whether an op works on scores: something in it runs over both seq and memory."""
    names = {n for v in (*op.operands, *op.results) for n in v.type.names}
    return {"seq", "memory"} <= names


def of_weight(type: TensorType) -> bool:
    return not type.has("batch") and not type.has("seq")


@dataclass(frozen=True)
class Pricing(CostModel):
    """The cost model, told what runs fused or in a narrow dtype, and ``axes``: the links that a
    stage's mesh axes have in the mesh of the whole run."""

    model: Dense | None = None
    plan: Plan = Plan()
    axes: tuple[AxisLink, ...] = ()

    @cached_property
    def links(self) -> tuple[tuple[AxisLink, ...], ...]:
        return tuple((link,) for link in self.axes)

    def op_seconds(
        self, op: Op, parts: Parts, unmoved: Container[Value] = (), again: int = 0
    ) -> float:
        if op.kind in ATTENTION:
            return self.kernel_seconds(op, parts)
        if is_core(op) and op.kind != "einsum":
            return 0.0  # kernels over scores are counted one by one
        narrow = self.plan.low and not any(v.type.has("vocab") for v in op.operands)
        if op.kind == "einsum" and narrow and self.plan.low and not is_core(op):
            sizes = matmul_sizes(op, parts)
            return matmul_time(self.chip, *sizes, self.plan.low) + self.chip.kernel_overhead
        return super().op_seconds(op, parts, unmoved, again)

    def kernel_seconds(self, op: Op, parts: Parts) -> float:
        """A fused attention kernel: its products over the scores that the mask leaves, at the
        system's share of a large product's rate; and an exponential a score, which the tensor cores
        wait for (arXiv 2407.08608 section 3.2 overlaps a part). Sequences that are cut are cut so
        that devices have alike much to do."""
        q, k = (v.type for v in op.operands[:2])
        assert self.model is not None and self.plan.attention is not None
        rows = self.local_bytes(op.operands[0], parts) // q.itemsize // self.model.head_dim
        scores = rows * k.dim("memory").size * self.model.attended
        flops = PRODUCTS[op.kind] * 2.0 * scores * self.model.head_dim
        rate = self.chip.flops(q.dtype) * self.chip.matmul_efficiency * self.plan.attention
        waits = scores / self.chip.sm.exponentials if self.chip.sm else 0.0
        return flops / rate + waits + self.chip.kernel_overhead

    def move_seconds(self, kind: str, axis: int, full_bytes: int, target_bytes: int) -> float:
        if kind == "all_reduce" and axis == self.mesh.index("data"):
            # FSDP scatters gradients; an all-reduce and a slice would be the same in two.
            halves = ("reduce_scatter", "all_gather")
            return sum(super(Pricing, self).move_seconds(h, axis, full_bytes, 0) for h in halves)
        return super().move_seconds(kind, axis, full_bytes, target_bytes)

    def traffic_seconds(self, values, parts: Parts) -> float:
        values = list(values)
        if any({"seq", "memory"} <= set(v.type.names) for v in values):
            return 0.0
        return super().traffic_seconds(values, parts)


def rules(model: Dense, mesh: Mesh, plan: Plan) -> Rules:
    """A stated plan as constraints: what each axis cuts of every op and of everything stored."""
    heads = "kv_heads" if model.kv_heads % plan.tensor == 0 else "groups"
    tensor = (heads, "mlp", "vocab", *(("seq",) if plan.sequence else ()))
    wanted = {"data": ("batch",), "context": ("seq",), "tensor": tensor}
    axes = {i: wanted[name] for i, name in enumerate(mesh.names) if mesh.sizes[i] > 1}

    def strategy(op: Op, s: Strategy) -> bool:
        dims = cuttable(op)
        for axis, names in axes.items():
            want = next((n for n in names if n in dims), None)
            if want is not None and s.axes[axis] != want and not isinstance(s.axes[axis], Through):
                return False
            if want is None and mesh.names[axis] == "tensor" and isinstance(s.axes[axis], str):
                return False
        return True

    def stored(info: Input, type: TensorType, layout: Layout) -> bool:
        for axis, names in axes.items():
            at = layout.axes[axis]
            if mesh.names[axis] == "data" and info.role == "parameter":
                if at is None and type.size >= 1 << 16:
                    return False
            elif at != next((n for n in names if type.has(n)), None):
                return False
        return True

    return Rules(strategy, stored)


def price(program: Program, mesh: Mesh, cost: Pricing, allowed: Rules) -> LayerCost:
    """The best layout that the rules leave, split into the forward and the backward pass. Where a
    program has no repeats, all of it is forward."""
    program = simplify(program)
    problem = build(program, mesh, cost, allowed)
    keep_sharded(problem)
    found = solve(problem)
    backward = next((o.regions[0] for o in program.body.ops if is_backward(o)), None)
    forward = next(
        (o.regions[0] for o in program.body.ops if o.regions and not is_backward(o)), None
    )
    passes = {forward or program.body: Pass(), backward: Pass()}
    for choice, i in found.picked.items():
        into = passes.get(choice.region)
        if into is None:
            continue
        seconds = choice.seconds[i]
        ops = list(choice.strategies)
        products = [op for op in ops if op.kind == "einsum"]
        into.kernels += seconds > 0
        if any(op.kind in ATTENTION or (op.kind == "einsum" and is_core(op)) for op in ops):
            into.core += seconds
        elif products:
            name = weight_of(products[0])
            into.products[name] = into.products.get(name, 0.0) + seconds
        else:
            into.traffic += seconds
    for region, into in passes.items():
        if region is not None:
            add_scores(problem, region, into, cost, region is backward)
            add_casts(problem, region, found.assignment.strategies, into, cost)
            into.sent += transfers(problem, region, found.assignment.moves or {}, cost)
    return LayerCost(passes[forward or program.body], passes[backward])


def keep_sharded(problem: Problem) -> None:
    """FSDP gathers a layer's weights inside the loop and reduces their gradients there: what goes
    in and out of the loop lies cut over the data axis. (The program's loop has one layer, where
    the solver would as soon gather before it.)"""
    axis = problem.mesh.index("data")
    if problem.mesh.sizes[axis] == 1:
        return
    for args, outputs in problem.boundaries.values():
        for end in (*args, *outputs):
            type_dims = {d.name for d in end.choice.dims}
            small = all(d.size <= 1 << 16 for d in end.choice.dims) and len(type_dims) < 2
            if small or type_dims & {"batch", "seq"} or "layers" in type_dims:
                continue
            for i, option in enumerate(end.choice.options):
                if option is not None and not isinstance(option.axes[axis], str):
                    end.choice.seconds[i] += FORBIDDEN


def is_backward(op: Op) -> bool:
    return op.kind == "repeat" and op.attrs["reverse"]


def weight_of(op: Op) -> str:
    names = (v.name for v in op.operands)
    return next((n for n in names if n in (*MATRICES, "table")), "grad")


def add_scores(problem: Problem, region: Region, into: Pass, cost: Pricing, backward: bool) -> None:
    """What attention with stored scores takes beside its products: a softmax reads and writes them,
    its gradient reads two and writes one; dropout is a kernel of its own each way, with a mask of a
    byte (Megatron, arXiv 2205.05198 section 4.1)."""
    score = next(
        (v for op in region.ops for v in op.results if is_score(v)),
        next((v for v in region.args if is_score(v)), None),
    )
    if score is None:
        return
    size = score.type.size / problem.mesh.size
    item = ITEM_BYTES[cost.plan.dtype]
    touched = 3 * item if backward else 2 * item
    if cost.plan.dropout:
        touched += 2 * item + 1
    into.core_traffic += elementwise_time(cost.chip, size * touched)
    into.kernels += 2 if cost.plan.dropout else 1


def is_score(v: Value) -> bool:
    return {"seq", "memory", "batch"} <= set(v.type.names)


def add_casts(
    problem: Problem, region: Region, chosen: dict[Op, Strategy], into: Pass, cost: Pricing
) -> None:
    """Casts to the narrow dtype of each activation that meets a weight: by rows for this product,
    by columns for the weight's gradient, and of the weight."""
    if cost.plan.low is None:
        return
    done: set[Value] = set()
    for op in region.ops:
        if op.kind != "einsum" or is_core(op) or weight_of(op) not in MATRICES:
            continue
        weight, value = sorted(op.operands, key=lambda v: v.name not in MATRICES)
        strategy = chosen[op]

        def elements(v: Value, s: Strategy = strategy) -> float:
            return cost.local_bytes(v, lambda d: s.parts(d, problem.mesh)) / v.type.itemsize

        into.traffic += elementwise_time(cost.chip, elements(weight) * cost.plan.cast_weights)
        if value in done:
            continue
        done.add(value)
        into.traffic += elementwise_time(cost.chip, elements(value) * cost.plan.cast)
        into.traffic += cost.chip.kernel_overhead


def transfers(
    problem: Problem,
    region: Region,
    used: dict[Value, frozenset[tuple[Layout, Layout]]],
    cost: Pricing,
) -> list[Sent]:
    made = {r: op for op in region.ops for r in op.results}
    found = []
    for flow in problem.flows:
        if flow.region is not region:
            continue
        type = flow.value.type
        if type.dtype == "bool":
            continue  # masks are made where they are used
        for source, target in used.get(flow.value, ()):
            move = next(m for m in problem.moves_from(source, type) if m.target == target)
            if move.kind == "slice":
                continue
            seconds = problem.move_seconds(move, type)
            full = max(type.local_bytes(problem.mesh, lay) for lay in (source, target))
            if full < SMALL and of_weight(type):
                continue
            op = made.get(flow.value)
            after = weight_of(op) if op is not None and op.kind == "einsum" else ""
            latency = cost.move_seconds(move.kind, move.axis, 0, 0)
            found.append(
                Sent(
                    move.kind,
                    problem.mesh.names[move.axis],
                    seconds,
                    latency,
                    full,
                    of_weight(type),
                    after,
                )
            )
    return found


Part = Literal["layer", "head", "embedding"]


def program_of(part: Part, m: Dense, batch: int, plan: Plan) -> Program:
    match part:
        case "layer":
            return layer(m, batch, m.seq, plan.dtype, plan.attention is not None)
        case "head":
            return head(m, batch, m.seq, plan.dtype)
        case "embedding":
            return embedding(m, batch, m.seq, plan.dtype)


@cache
def cost_of(
    part: Part, m: Dense, batch: int, chip: Chip, plan: Plan, links: tuple[AxisLink, ...]
) -> LayerCost:
    """What a part of a model costs. ``batch``: sequences of one data shard. ``links``: of the data,
    context and tensor axes."""
    data = min(plan.data, DATA)
    mesh = Mesh(tuple(zip(AXES, (data, plan.context, plan.tensor), strict=True)))
    alone = topology(chip, (1,) * len(AXES))
    cost = Pricing(chip, mesh, alone, model=m, plan=plan, axes=links)
    return price(program_of(part, m, batch * data, plan), mesh, cost, rules(m, mesh, plan))
