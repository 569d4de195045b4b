"""The rows of a report: like things together, in words that a person uses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from neocc.cost.algorithms import FORMULAS, STANDARD
from neocc.cost.model import product_flops, unskipped_flops
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import ATTENTION, COLLECTIVES
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.plan import Collective, Plan, bodies, model_flops

LAYER = re.compile(r"^h\d+\.")
# What a product is, by a dim that only it has; the first that fits.
PRODUCTS = {
    "memory": "attention scores",
    "vocab": "logits",
    "mlp": "mlp activations",
    "heads": "queries, keys, values",
    "expert_hidden": "expert activations",
    "slot": "tokens at their experts",
    "experts": "gates of experts",
    "embd": "block outputs",
}


@dataclass(frozen=True)
class Row:
    """Tensors of one shape that lie alike. ``type`` has its layout; bytes per device of one."""

    names: tuple[str, ...]
    type: TensorType
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """Collectives that are alike: bytes that a device puts in and gets out in one run, runs and
    seconds of all of them in a step; what runs them, and the seconds of XLA's own. waiting: of
    those inside products, what no product hides; working: what the products take more; within: of
    those of ring attention, what passes behind the op's products."""

    kind: str
    axis: str
    dim: str | None
    region: str
    tensors: tuple[str, ...]
    bytes: int
    result_bytes: int
    runs: int
    seconds: float
    hideable: bool
    algorithm: str
    lossy: bool
    standard: float
    waiting: float = 0.0
    working: float = 0.0
    within: float = 0.0


def layout_words(type: TensorType, mesh: Mesh) -> str:
    """``heads on y, embd on x``; ``whole on every device``; ``partial sums on y``."""
    layout = type.layout or Layout.replicated(len(mesh))
    parts = []
    for name in type.names:
        axes = [mesh.names[i] for i in layout.cuts(name)]
        if axes:
            parts.append(f"{name} on {' and '.join(axes)}")
    for op in dict.fromkeys(p.op for p in layout.axes if isinstance(p, Partial)):
        axes = [mesh.names[i] for i in layout.partial_axes if layout.axes[i] == Partial(op)]
        parts.append(f"partial {op}s on {' and '.join(axes)}")
    return ", ".join(parts) or "whole on every device"


def dims_words(type: TensorType) -> str:
    return " x ".join(type.names) or "scalar"


def short(name: str) -> str:
    """A parameter's name without its layer's number."""
    return LAYER.sub("", name)


def grouped(named: Iterable[tuple[str, TensorType]], mesh: Mesh) -> list[Row]:
    """One row for tensors of equal type, the largest first."""
    found: dict[TensorType, dict[str, None]] = defaultdict(dict)
    for name, type in named:
        found[type][name] = None
    rows = [Row(tuple(names), type, type.local_bytes(mesh)) for type, names in found.items()]
    return sorted(rows, key=lambda r: -r.type.size)


def weights(plan: Plan) -> list[Row]:
    """Parameters as they are stored; those of like layers under one name."""
    inputs = plan.partitioned.program.named_inputs
    return grouped(((short(i.name), v.type) for i, v in inputs if i.role == "parameter"), plan.mesh)


def stored_bytes(plan: Plan) -> int:
    """Bytes of parameters and state on a device."""
    inputs = plan.partitioned.program.named_inputs
    return sum(v.type.local_bytes(plan.mesh) for i, v in inputs if i.role != "data")


def unlike_states(plan: Plan) -> list[Row]:
    """State that does not lie as the parameter it belongs to (``w.m`` to ``w``), scalars aside."""
    program = plan.partitioned.program
    types = {i.name: v.type for i, v in program.named_inputs}
    found = []
    for info, value in program.named_inputs:
        owner = types.get(info.name.rpartition(".")[0])
        if info.role == "state" and value.type.dims and value.type != owner:
            found.append((short(info.name), value.type))
    return grouped(found, plan.mesh)


def activations(plan: Plan) -> list[Row]:
    """What the forward pass computes per example: what its loops carry, and each product."""
    program = plan.partitioned.program
    data = [v.type.names for i, v in program.named_inputs if i.role == "data" and v.type.dims]
    if not data:
        return []
    example = data[0][0]
    found: dict[tuple[str, ...], Row] = {}

    def add(label: str, type: TensorType) -> None:
        if example in type.names and type.names not in found:
            found[type.names] = Row((label,), type, type.local_bytes(plan.mesh))

    forward = [b for b in bodies(program.body) if not b.name.endswith("backward")]
    for body in forward:
        for value in body.region.args[: body.carries or 0]:
            add("residual stream" if value.type.names[1:] else "carried sums", value.type)
    for body in sorted(forward, key=lambda b: b.carries is None):
        for op in body.region.ops:
            if op.kind == "einsum" or op.kind in ATTENTION:
                made = op.results[0].type
                known = (label for dim, label in PRODUCTS.items() if made.has(dim))
                add(next(known, f"product at {op.loc}" if op.loc else "product"), made)
    return list(found.values())


def traffic(plan: Plan) -> list[Traffic]:
    """The plan's collectives, like ones together, the longest first; local slices are none."""
    names = tensor_names(plan)
    found: dict[tuple[object, ...], list[Collective]] = defaultdict(list)
    for c in plan.collectives:
        if c.kind != "slice":
            key = (c.kind, c.axis, c.region, c.bytes, c.result_bytes, c.hideable, c.algorithm)
            found[key].append(c)
    rows = []
    for alike in found.values():
        first = alike[0]
        rows.append(
            Traffic(
                first.kind,
                first.axis,
                first.dim if len({c.dim for c in alike}) == 1 else None,
                first.region,
                tuple(dict.fromkeys(names.get(c.id, c.tensor) for c in alike)),
                first.bytes,
                first.result_bytes,
                sum(c.count for c in alike),
                sum(c.count * c.seconds for c in alike),
                first.hideable,
                algorithm_words(first.algorithm, first.grid),
                is_lossy(first.kind, first.algorithm),
                sum(c.count * c.standard for c in alike),
                sum(c.count * c.inside.waiting for c in alike if c.inside),
                sum(c.count * c.inside.working for c in alike if c.inside),
                sum(c.count * c.within for c in alike),
            )
        )
    return sorted(rows, key=lambda r: -r.seconds)


def algorithm_words(name: str, grid: tuple[int, ...]) -> str:
    """``hierarchical 2x8``; of one ring, or XLA's own, the name alone."""
    return f"{name} {'x'.join(map(str, grid))}" if len(grid) > 1 else name


def is_lossy(kind: str, algorithm: str) -> bool:
    return (kind, algorithm) in FORMULAS and FORMULAS[kind, algorithm].lossy


def tensor_names(plan: Plan) -> dict[int, str]:
    """What each collective moves, by its id: a parameter, its gradient, or a line's result."""
    program = plan.partitioned.program
    gradients = gradient_names(program)
    sources = relabelled(program.body)
    return {
        op.attrs["id"]: origin(op, sources, gradients)
        for op in program.body.walk()
        if op.kind in COLLECTIVES
    }


def hosted_bytes(plan: Plan) -> int:
    """What the host of a device holds for it until the backward pass."""
    return sum(c.count * c.bytes for c in plan.collectives if c.kind == "to_host")


def relabelled(region: Region) -> dict[Value, Value]:
    """From the result of each op of one operand to that operand, and from an argument of a repeat
    to what the repeat is given: the way back to where a value comes from."""
    found: dict[Value, Value] = {}
    for op in region.ops:
        if op.kind == "repeat":
            body = op.regions[0]
            start = op.attrs["carries"]
            found.update(zip(body.args[start:], op.operands[start:], strict=True))
            found.update(relabelled(body))
        elif len(op.operands) == 1 and op.kind != "reduce":
            found[op.result] = op.operands[0]
    return found


def origin(op: Op, sources: Mapping[Value, Value], gradients: Mapping[Value, str]) -> str:
    """The name of what a collective moves: its operand, through what only relabels it."""
    value = op.operands[0]
    while True:
        if value in gradients:
            return f"{gradients[value]} grad"
        if value.name:
            return short(value.name)
        if value not in sources:
            break
        value = sources[value]
    if op.loc:
        return f"{PurePath(op.loc.file).stem}:{op.loc.line}"
    return dims_words(op.operands[0].type)


def gradient_names(program: Program) -> dict[Value, str]:
    """Values that are on their way to be a parameter's gradient, to that parameter's name.

    Followed back from where the update of state ``w.m`` mixes it with something of its type.
    """
    made = {r: op for op in program.body.ops for r in op.results}
    roles = {v: i for i, v in program.named_inputs}
    found: dict[Value, str] = {}

    def back(value: Value, producers: Mapping[Value, Op], name: str) -> None:
        while value in producers and value not in found:
            found[value] = name
            op = producers[value]
            if op.kind == "repeat":
                region = op.regions[0]
                inner = {r: o for o in region.ops for r in o.results}
                back(region.outputs[op.results.index(value)], inner, name)
                return
            if op.kind in ("einsum", "reduce", "scatter_add", "gather") or not op.operands:
                return
            # Sums and scalings: on with the operand that has the value's dims.
            same = [v for v in op.operands if set(v.type.names) == set(value.type.names)]
            if not same or same[0] in roles:
                return
            value = same[0]

    def gradient_in(value: Value, moment: Value) -> Value | None:
        """The operand of ``b m + (1 - b) g`` that is no ``m``."""
        op = made.get(value)
        if op is None:
            return None
        rest = [v for v in op.operands if v.type.dims and not leads_to(v, moment, made)]
        return rest[0] if len(rest) == 1 else None

    for info, value in program.named_inputs:
        owner = info.name.removesuffix(".m")
        if info.role == "state" and owner != info.name and info.name in program.outputs:
            gradient = gradient_in(program.output_value(info.name), value)
            if gradient is not None:
                back(gradient, made, short(owner))
    return found


def leads_to(value: Value, source: Value, made: Mapping[Value, Op], depth: int = 4) -> bool:
    """Whether ``value`` is made from ``source`` by a few ops."""
    if value is source:
        return True
    op = made.get(value)
    return (
        depth > 0
        and op is not None
        and any(leads_to(v, source, made, depth - 1) for v in op.operands if v.type.dims)
    )


def region_flops(region: Region, flops: Callable[[Op], int]) -> int:
    """FLOPs of every matrix product of a region, run once: recomputation included."""
    total = 0
    for op in region.ops:
        if op.kind == "repeat":
            total += op.attrs["dim"].size * region_flops(op.regions[0], flops)
        else:
            total += flops(op)
    return total


@dataclass(frozen=True)
class Work:
    """Matrix products of a step, as shares of the model's own FLOPs: ``recomputed`` in the
    backward pass, ``padding``, ``repeated`` on devices that do the same; and ``skipped``, the
    scores that attention's masks hide and that the whole op does not compute."""

    recomputed: float
    padding: float
    repeated: float
    skipped: float


def work(plan: Plan) -> Work:
    """Where the FLOPs of a plan go beyond the model's own."""
    model = plan.model_flops
    if not model:
        return Work(0.0, 0.0, 0.0, 0.0)
    body = plan.program.body
    padded = model_flops(body)
    every = region_flops(body, unskipped_flops)
    whole = region_flops(body, lambda op: product_flops(op, lambda dim: 1))
    done = plan.flops * plan.mesh.size
    return Work(
        (every - padded) / model,
        (padded - model) / model,
        (done - whole) / model,
        (every - whole) / model,
    )


def utilisation(plan: Plan) -> float:
    """FLOP/s that the devices run, recomputation included, over their bf16 peak."""
    return plan.flops / (plan.timeline.step * plan.chip.peak_flops["bf16"])


def cut_after(rows: list[Traffic], most: int) -> tuple[list[Traffic], Traffic | None]:
    """The first ``most`` rows, and the sum of the others, if there are any."""
    shown, rest = rows[:most], rows[most:]
    if not rest:
        return shown, None
    total = replace(
        rest[0],
        kind=f"{len(rest)} more rows",
        axis="",
        dim=None,
        region="",
        tensors=(),
        runs=sum(r.runs for r in rest),
        seconds=sum(r.seconds for r in rest),
        algorithm=STANDARD,
    )
    return shown, total


def bytes_text(n: float) -> str:
    """``3.52 GiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}" if n / size < 1000 else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def seconds_text(s: float) -> str:
    """``85.8 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(s) >= size:
            return f"{s / size:.3g} {unit}" if s / size < 1000 else f"{s / size:,.0f} {unit}"
    return "0 s" if s == 0 else f"{s * 1e9:.3g} ns"


def count_text(n: float) -> str:
    """``1.32 B``, ``512 M``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}" if n / size < 1000 else f"{n / size:.0f} {unit}"
    return f"{n:.3g}"
