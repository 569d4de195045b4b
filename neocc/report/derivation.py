"""Where a predicted figure comes from, down to the fields of ``hardware.json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from neocc.cost.model import product_flops
from neocc.cost.trace import Field, Traced, chip_fields, formula
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Layout
from neocc.ir.types import TensorType
from neocc.passes.layout.memory import held_by_copies, measure, peak, points
from neocc.passes.layout.notation import layout_text
from neocc.passes.layout.problem import Choice
from neocc.passes.names import program_names
from neocc.passes.plan import Collective, Plan, bodies
from neocc.report import facts

FIGURES = ("step", "compute", "exposed", "hidden", "mfu", "memory", "flops")


@dataclass(frozen=True)
class Node:
    """One figure and the figures that it is made of. ``unit``: s, bytes, FLOPs, or none.

    formula: how it is made, with the names of the chip's fields; numbers: the same with numbers.
    """

    label: str
    value: float
    unit: str = "s"
    formula: str = ""
    numbers: str = ""
    parts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Source:
    """A field of the hardware table that a figure used, and what is behind it."""

    field: str
    value: float
    source: str


def node(label: str, value: float, times: int = 1, unit: str = "s") -> Node:
    """A figure with its own formula, ``times`` a step."""
    if not isinstance(value, Traced):
        return Node(label, float(value * times), unit)
    often = f"{times} x " if times > 1 else ""
    opened, closed = ("(", ")") if often and " + " in formula(value) else ("", "")
    return Node(
        label,
        float(value) * times,
        unit,
        f"{often}{opened}{formula(value)}{closed}",
        f"{often}{opened}{formula(value, names=False)}{closed}",
    )


def derivation(plan: Plan, figure: str) -> Node:
    """The tree of one of ``FIGURES``, of a plan whose figures are traced (``derived``).

    Raises:
        NeoccError: there is no such figure.
    """
    t = plan.timeline
    match figure:
        case "step":
            parts = (derivation(plan, "compute"), derivation(plan, "exposed"))
            return Node("step", float(t.step), formula="compute + exposed", parts=parts)
        case "compute":
            return Node("compute", float(t.compute), parts=compute_parts(plan))
        case "exposed":
            return exposed(plan)
        case "hidden":
            return Node(
                "hidden",
                float(t.hidden),
                formula="of each loop, the smaller of overlap x transfers that can hide and of its "
                "compute",
                parts=tuple(p for p in (hidden(plan, r) for r in region_names(plan)) if p.value),
            )
        case "mfu":
            peak_flops = plan.chip.peak_flops["bf16"]
            return Node(
                "mfu",
                float(plan.mfu),
                "",
                "model FLOPs / (step x devices x peak_flops.bf16)",
                f"{plan.model_flops:.6g} / ({float(t.step):.6g} x {plan.mesh.size} x "
                f"{float(peak_flops):.6g})",
                (Node("model FLOPs", plan.model_flops, "FLOPs"), derivation(plan, "step")),
            )
        case "memory":
            return memory(plan)
        case "flops":
            return flops(plan)
    raise NeoccError(f"there is no figure {figure!r}; one of {', '.join(FIGURES)}")


def region_names(plan: Plan) -> list[str]:
    return [body.name for body in bodies(plan.problem.program.body)]


def compute_parts(plan: Plan) -> tuple[Node, ...]:
    """Per region, each group's time in a step, the longest first, and what products take more that
    collectives run inside of."""
    regions, tensors = [], facts.tensor_names(plan)
    for names in program_names(plan.problem.program):
        labels = {op: name for name, op in names.ops.items()}
        groups = []
        for choice, i in plan.solution.picked.items():
            first = next((op for op in choice.strategies if op in labels), None)
            if choice.region is names.body.region and first is not None and choice.seconds[i]:
                waits = names.body.trips * waiting(plan, choice, i)
                groups.append(node(labels[first], choice.seconds[i] - waits))
        for c in transfers(plan, names.body.name):
            if c.inside is not None:
                label = f"in blocks, beside the {collective_words(c, tensors[c.id])}"
                groups.append(node(label, c.inside.working, c.count))
        groups.sort(key=lambda g: -g.value)
        if groups:
            total = sum(g.value for g in groups)
            regions.append(Node(f"compute {names.body.name}", total, parts=tuple(groups)))
    return tuple(sorted(regions, key=lambda r: -r.value))


def waiting(plan: Plan, choice: Choice, i: int) -> float:
    """Seconds in which one run of a group waits for what it sends within itself."""
    cost = plan.problem.cost
    rings = (cost.ring(op, s) for op, made in choice.strategies.items() if (s := made[i]))
    return sum(ring.exposed for ring in rings if ring is not None)


def transfers(plan: Plan, region: str) -> list[Collective]:
    return [c for c in plan.collectives if c.region == region]


def collective_node(c: Collective, tensor: str) -> Node:
    star = "*" if c.hideable and c.inside is None else ""
    return node(f"{collective_words(c, tensor)}{star}", c.seconds, c.count)


def collective_words(c: Collective, tensor: str) -> str:
    return f"{c.kind.replace('_', '-')} on {c.axis} of {tensor}"


def exposed(plan: Plan) -> Node:
    """Per region all transfers, less what of them hides."""
    tensors = facts.tensor_names(plan)
    regions = []
    for region in region_names(plan):
        here = transfers(plan, region)
        total = sum(float(c.seconds) * c.count for c in here)
        if not total:
            continue
        behind = hidden(plan, region)
        moved = sorted(
            (collective_node(c, tensors.get(c.id, c.tensor)) for c in here), key=lambda n: -n.value
        )
        all_of_it = Node(f"transfers {region}", total, parts=tuple(moved))
        parts = (all_of_it, replace(behind, value=-behind.value)) if behind.value else (all_of_it,)
        regions.append(
            Node(
                f"exposed {region}", total - behind.value, formula="transfers - hidden", parts=parts
            )
        )
    return Node("exposed", float(plan.timeline.exposed), parts=tuple(regions))


def hidden(plan: Plan, region: str) -> Node:
    """What of a region's transfers runs behind its compute."""
    overlap = float(plan.problem.cost.overlap)
    here = transfers(plan, region)
    behind = sum(float(c.behind) for c in here if c.inside is None)
    own = sum(float(c.behind) for c in here if c.inside is not None)
    inside = next(b.region for b in bodies(plan.problem.program.body) if b.name == region)
    picked = plan.solution.picked.items()
    compute = sum(float(c.seconds[i]) for c, i in picked if c.region is inside)
    within = sum(float(c.within) * c.count for c in here)
    rings = (" + permutes behind their own op", f" + {within:.6g}") if within else ("", "")
    if own:
        left = max(0.0, compute - own)
        return Node(
            f"hidden {region}",
            min(overlap * behind, left) + own + within,
            formula="min(overlap x transfers that can hide, compute - those inside products) + "
            f"those inside products{rings[0]}",
            numbers=f"min({overlap:g} x {behind:.6g}, {compute:.6g} - {own:.6g}) + {own:.6g}"
            f"{rings[1]}",
        )
    return Node(
        f"hidden {region}",
        min(overlap * behind, compute) + within,
        formula=f"min(overlap x transfers that can hide, compute){rings[0]}",
        numbers=f"min({overlap:g} x {behind:.6g}, {compute:.6g}){rings[1]}",
    )


def memory(plan: Plan) -> Node:
    """What is live at the fullest point, by kind and tensor."""
    held, op = peak(plan.problem, plan.solution)
    point = next(p for p in points(plan.problem, plan.solution.picked) if p.op is op)
    size = measure(plan.problem, plan.solution)
    labels = {v: name for n in program_names(plan.problem.program) for name, v in n.values.items()}
    moves = plan.solution.assignment.moves or {}
    kinds: dict[str, list[Node]] = defaultdict(list)
    for live in point.live:
        if not size(live):
            continue
        type, label = live.value.type, labels.get(live.value) or str(live.value.type)
        if live.copies is None:
            held_as = {live.source.layouts[plan.solution.picked[live.source.choice]]: size(live)}
        else:
            copies = held_by_copies(plan.problem, live)
            made = sorted({target for _, target in moves.get(live.value, ())}, key=str)
            held_as = {target: copies.get(target, 0) for target in made}
            label += ", resharded"
        lies = {lay: n for lay, n in held_as.items() if lay is not None and n}
        words = " and ".join(layout_text(lay, plan.mesh) or "whole" for lay in lies)
        blocks = " + ".join(block(plan, type, lay, n) for lay, n in lies.items())
        kinds[live.kind].append(Node(f"{label} [{words}]", size(live), "bytes", "", blocks))
    parts = tuple(
        Node(kind, sum(n.value for n in nodes), "bytes", parts=largest(nodes))
        for kind, nodes in kinds.items()
    )
    return Node(f"memory at {held.point}", held.peak, "bytes", parts=largest(parts))


def largest(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=lambda n: -n.value))


def block(plan: Plan, type: TensorType, layout: Layout, held: int) -> str:
    """``2 B x 512/8 x 2048``: the bytes of one device's block; those that are held where that is
    more, in whole tiles of the chip's memory."""
    sizes = []
    for dim in type.dims:
        parts = layout.parts(dim.name, plan.mesh)
        sizes.append(f"{dim.size}/{parts}" if parts > 1 else f"{dim.size}")
    words = " x ".join([f"{type.itemsize} B", *sizes])
    if held == type.local_bytes(plan.mesh, layout):
        return words
    return f"{held} B ({words}, in whole tiles)"


def flops(plan: Plan) -> Node:
    """Matrix products of one device, by op."""
    parts = []
    for names in program_names(plan.problem.program):
        for name, op in names.ops.items():
            s = plan.solution.assignment.strategies[op]
            once = product_flops(op, lambda dim, s=s: s.parts(dim, plan.mesh))
            trips = names.body.trips
            if once:
                parts.append(
                    Node(
                        f"{names.body.name}: {name}",
                        once * trips,
                        "FLOPs",
                        "runs x 2 x multiply-adds of a device",
                        f"{trips} x {once:,}",
                    )
                )
    return Node("FLOPs of matrix products a device and step", plan.flops, "FLOPs",
                parts=largest(parts))  # fmt: skip


def sources(*values: float) -> tuple[Source, ...]:
    """Every field of the hardware table that went into some figures."""
    found: dict[Field, float] = {}
    for value in values:
        found |= chip_fields(value)
    return tuple(Source(f.path, value, f.source) for f, value in found.items())


def figure_sources(plan: Plan, figure: str) -> tuple[Source, ...]:
    t = plan.timeline
    values: dict[str, tuple[float, ...]] = {
        "step": (t.compute, t.exposed, t.hidden),
        "compute": (t.compute,),
        "exposed": (t.exposed,),
        "hidden": (t.hidden,),
        "mfu": (t.compute, t.exposed, plan.chip.peak_flops["bf16"]),
    }
    return sources(*values.get(figure, ()))
