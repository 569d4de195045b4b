"""Seconds of a training step under a stated plan: layers priced by the layout problem, put
together by ``neocc.cost.schedule``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks.dense_models import Dense
from benchmarks.stage_cost import LayerCost, Pass, Plan, Sent, cost_of
from benchmarks.training_systems import System
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import Chip
from neocc.cost.roofline import elementwise_time
from neocc.cost.schedule import Stage, pipeline_time, reduction_time, step_time
from neocc.cost.topology import AxisLink, default_slice, topology

# What the backward pass computes again, by policy: products named by their weight, the products
# over scores, and everything else.
RECOMPUTED = {
    "none": ((), False),
    "selective": ((), True),
    "full": (("q", "k", "v", "o", "gate", "up", "down"), True),
    "all but qkv": (("o", "gate", "up"), True),
    "all but qkv and out": (("gate", "up"), True),
}


# Bytes moved to cast one element of a bf16 activation for a product and for the gradient of its
# weight (recipes of Transformer Engine and torchao).
CASTS = {
    "delayed": 2 + 2,  # read once, written by rows and by columns; the scale is an earlier step's
    "current": 2 + 2,  # what makes the activation finds its maximum
    "block": 2 + 2,  # MXFP8: a scale of 32 elements is found on the way
    "rowwise": 2 * (2 + 2 + 1),  # rows and columns each read for their own scales, and again
    "nvfp4": 2 + 2 * (2 + 0.5),  # read for a scale of the tensor, then by rows, then rotated
}


@dataclass(frozen=True)
class Run:
    """A training run as it is stated. ``devices`` = data x context x tensor x stages; ``fsdp``: the
    weights are cut over ``data`` devices of each slice; ``slices``: replicas over the data-centre
    network. ``batch``: sequences of one microbatch on one data shard."""

    model: Dense
    chip: Chip
    system: System
    data: int
    batch: int
    microbatches: int
    tensor: int = 1
    context: int = 1
    stages: int = 1
    chunks: int = 1
    fsdp: bool = False
    slices: int = 1
    recompute: str = "none"
    low: str | None = None
    cast: float = 4.0
    dtype: str = "bf16"

    @property
    def devices(self) -> int:
        return self.slices * self.stages * self.data * self.context * self.tensor


@dataclass(frozen=True)
class Links:
    slices: AxisLink
    stages: AxisLink
    data: AxisLink
    context: AxisLink
    tensor: AxisLink
    replicas: AxisLink  # data and context together: those that hold the same weights


def links(run: Run) -> Links:
    """Tensor innermost, then context, data and stages, as Megatron ranks them; slices outermost."""
    sizes = (run.slices, run.stages, run.data, run.context, run.tensor)
    shape = None
    if run.chip.torus is not None:
        chips = math.prod(sizes[1:]) // run.chip.devices_per_chip
        shape = default_slice(run.chip.torus, chips)
    slices, stages, data, context, tensor = topology(run.chip, sizes, shape).links()
    merged = (run.slices, run.stages, run.data * run.context, run.tensor)
    replicas = topology(run.chip, merged, shape).links()[2]
    return Links(slices, stages, data, context, tensor, replicas)


def compute_seconds(p: Pass, efficiency: float) -> float:
    return (p.product + p.core) / efficiency + p.traffic + p.core_traffic


def launches(*passes: Pass) -> int:
    """Kernels and collectives that the host launches."""
    return sum(p.kernels + len(p.sent) for p in passes)


def bucket(sent: list[Sent]) -> float:
    """Transfers of one kind as one: all bytes, one latency."""
    by_kind: dict[str, list[Sent]] = {}
    for s in sent:
        by_kind.setdefault(s.kind, []).append(s)
    return sum(
        sum(s.seconds - s.latency for s in group) + max(s.latency for s in group)
        for group in by_kind.values()
    )


def waited(
    p: Pass,
    compute: float,
    system: System,
    chip: Chip,
    extra: float = 0.0,
    again: bool = False,
    narrow: bool = False,
) -> float:
    """Communication of a pass that does not run behind its compute.

    Tensor parallel transfers hide behind products only in part (``tensor_overlap``), gathers of
    keys and values behind attention, weights' behind all compute. Gradients of weights that are
    partial over the context or tensor axis wait for the end of the step. ``extra``: seconds of
    transfers that recomputation repeats; ``again``: weights are gathered for it too, if the system
    does that; ``narrow``: gathers may be in the products' dtype.
    """
    gathers = 0.5 if narrow and system.narrow_gathers else 1.0
    tensor = extra + sum(
        s.seconds * (gathers if s.kind == "all_gather" else 1.0)
        for s in p.sent
        if s.axis == "tensor" and not s.weight
    )
    context = sum(s.seconds for s in p.sent if s.axis == "context" and not s.weight)
    weights = [s for s in p.sent if s.axis == "data"]
    data = bucket(weights) if system.bucketed else sum(s.seconds for s in weights)
    if again and system.regather:
        data += sum(s.seconds for s in weights if s.kind == "all_gather")
    data += elementwise_time(chip, system.copies * sum(s.bytes for s in weights))
    hidden = min(system.tensor_overlap * tensor, compute)
    hidden += min(0.9 * context, p.core)
    hidden += min(system.weight_overlap * data, compute)
    return tensor + context + data - min(hidden, compute)


def layer_times(run: Run, cost: LayerCost, efficiency: float) -> tuple[float, float]:
    """Seconds of the forward and the backward pass of one layer on one device: compute and what is
    waited for, or the time that the host takes to launch it all."""
    system = run.system
    narrow = run.low is not None and run.cast < CASTS["rowwise"]
    forward = compute_seconds(cost.forward, efficiency)
    ahead = forward + waited(cost.forward, forward, system, run.chip, narrow=narrow)
    names, core = RECOMPUTED[run.recompute]
    products = sum(t for n, t in cost.forward.products.items() if n in names)
    sent = [s for s in cost.forward.sent if s.axis == "tensor" and not s.weight]
    extra = 0.0
    launched = launches(cost.backward)
    if run.recompute == "full" and system.rerun:
        recomputed = forward
        extra = sum(s.seconds for s in sent)
        launched += launches(cost.forward)
    else:
        if run.recompute != "none" and "down" in names:
            products -= cost.forward.products["down"]
            # What is gathered again for the forward products serves their gradients as well.
            extra = sum(s.seconds for s in sent if s.after not in ("", "down"))
        recomputed = products / efficiency
        if core:
            recomputed += cost.forward.core / efficiency + cost.forward.core_traffic
    backward = compute_seconds(cost.backward, efficiency) + recomputed
    backward += elementwise_time(run.chip, added_bytes(run))
    again = run.recompute == "full"
    back = backward + waited(cost.backward, backward, system, run.chip, extra, again, narrow)
    return max(ahead, launches(cost.forward) * system.host), max(back, launched * system.host)


def added_bytes(run: Run) -> float:
    """Bytes moved to add one layer's weight gradients to those of earlier microbatches."""
    return run.system.accumulate * run.model.layer_weights / run.tensor


def layers_of_stages(layers: int, stages: int) -> list[int]:
    """Layers of each stage; where they do not divide, the ends, which hold the embedding and the
    loss too, have fewer."""
    most = -(-layers // stages)
    held = [most] * stages
    missing = most * stages - layers
    for i in range(missing):
        held[(0, -1)[i % 2] if i < 2 else i // 2] -= 1
    return held


def predict(run: Run, efficiency: float = 1.0) -> float:
    """Seconds of a step. ``efficiency`` multiplies the rate of all matrix products."""
    m, system, chip = run.model, run.system, run.chip
    at = links(run)
    plan = Plan(
        data=run.data if run.fsdp else 1,
        context=run.context,
        tensor=run.tensor,
        sequence=system.sequence and run.tensor > 1 and m.seq % run.tensor == 0,
        attention=system.attention,
        dropout=system.dropout,
        low=run.low,
        cast=run.cast,
        cast_weights=system.cast_weights,
        dtype=run.dtype,
    )
    inner = (at.data if run.fsdp else AxisLink(()), at.context, at.tensor)
    padded = replace(m, vocab=-(-m.vocab // (128 * run.tensor)) * 128 * run.tensor, layers=0)
    ahead, back = layer_times(
        run, cost_of("layer", padded, run.batch, chip, plan, inner), efficiency
    )
    ends = []
    for cost in (
        cost_of("embedding", padded, run.batch, chip, replace(plan, low=None), inner),
        cost_of("head", padded, run.batch, chip, replace(plan, low=None), inner),
    ):
        busy = compute_seconds(cost.forward, efficiency)
        ends.append(busy + waited(cost.forward, busy, system, chip))
    logits = run.batch * m.seq * padded.vocab / (run.tensor * run.context)
    ends[1] += elementwise_time(chip, logits * system.loss)
    held = layers_of_stages(m.layers, run.stages)
    stages = [Stage(n * ahead, n * back) for n in held]
    stages[0] = Stage(stages[0].forward + ends[0] / 2, stages[0].backward + ends[0] / 2)
    stages[-1] = Stage(stages[-1].forward + ends[1] / 3, stages[-1].backward + ends[1] * 2 / 3)
    send = 0.0
    if run.stages > 1:
        cut = run.tensor if system.sends_cut else 1
        size = 2 * run.batch * m.seq * m.embd / (run.context * cut)
        send = collective_time("permute", size, at.stages)
    pipeline = pipeline_time(stages, run.microbatches, run.chunks, send, system.send_overlap)
    return step_time(pipeline, *update(run, at, max(held), stages))


def update(run: Run, at: Links, held: int, stages: list[Stage]) -> tuple[float, float, float]:
    """Exposed gradient reduction, optimizer, exposed gathering of updated weights."""
    m, system = run.model, run.system
    table = m.vocab * m.embd / run.tensor
    local = held * m.layer_weights / run.tensor + table
    shared = local / run.data if run.fsdp else local
    last = max(s.backward for s in stages)
    reduction = gather = 0.0
    size = shared * system.grad_bytes
    if not run.fsdp:
        if system.sharded:
            reduction += collective_time("reduce_scatter", size, at.replicas)
            gather += collective_time("all_gather", shared * 2, at.replicas)
        else:
            reduction += collective_time("all_reduce", size, at.replicas)
    reduction += collective_time("all_reduce", size, at.slices)
    exposed = reduction_time(reduction, last, system.reduce_overlap)
    gather = reduction_time(gather, max(s.forward for s in stages), system.reduce_overlap)
    if run.stages > 1 and m.tied:  # the table's gradients of the first and the last stage
        exposed += collective_time("permute", 2 * table * system.grad_bytes, at.stages)
    owned = shared / at.replicas.size if system.sharded and not run.fsdp else shared
    return exposed, elementwise_time(run.chip, owned * system.update), gather
