"""Two plans side by side: what each costs, and what makes the difference."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from neocc.passes.alternatives import closed
from neocc.passes.layout.notation import cuts_text, layout_text
from neocc.passes.names import program_names
from neocc.passes.plan import Plan
from neocc.report import facts
from neocc.report.certificate import verdict
from neocc.report.facts import bytes_text, seconds_text
from neocc.report.terminal import columns, titled

ROWS = 12  # differences of a kind that are shown
DIM = "dim"


@dataclass(frozen=True)
class Side:
    """One plan's figures: seconds of a step, bytes a device."""

    name: str
    mesh: str
    chip: str
    step: float
    compute: float
    exposed: float
    hidden: float
    mfu: float
    memory: Mapping[str, int]
    peak: int
    fits: bool
    verdict: str


@dataclass(frozen=True)
class Difference:
    """One thing in both plans: what it is and does in each (None: it is in one only), and seconds
    of a step (of a stored tensor: bytes a device)."""

    what: str
    a: str | None
    b: str | None
    cost_a: float
    cost_b: float

    @property
    def more(self) -> float:
        return self.cost_b - self.cost_a


@dataclass(frozen=True)
class Comparison:
    """``collectives``: by kind and axis. ``ops``: compute of each group whose strategy or time
    differs. ``moves``: transfers of each tensor. ``stored``: inputs that lie otherwise. Each with
    the largest difference first."""

    a: Side
    b: Side
    collectives: tuple[Difference, ...]
    ops: tuple[Difference, ...]
    moves: tuple[Difference, ...]
    stored: tuple[Difference, ...]


Found = dict[str, tuple[str, float]]  # what -> what it does, what that costs


def compare(name_a: str, a: Plan, name_b: str, b: Plan) -> Comparison:
    sides = side(name_a, a), side(name_b, b)
    a, b = (plan if plan.given else closed(plan) for plan in (a, b))
    return Comparison(
        *sides,
        differences(collectives(a), collectives(b)),
        differences(ops(a), ops(b)),
        differences(moves(a), moves(b)),
        differences(stored(a), stored(b)),
    )


def side(name: str, plan: Plan) -> Side:
    t = plan.timeline
    return Side(
        name,
        str(plan.mesh),
        plan.chip.name,
        t.step,
        t.compute,
        t.exposed,
        t.hidden,
        plan.mfu,
        dict(plan.memory.by_kind),
        plan.memory.peak,
        plan.fits,
        verdict(plan),
    )


def differences(a: Found, b: Found) -> tuple[Difference, ...]:
    """What is not the same in both, the largest difference first."""
    found = []
    for what in dict.fromkeys((*a, *b)):
        (in_a, cost_a), (in_b, cost_b) = a.get(what, (None, 0.0)), b.get(what, (None, 0.0))
        if (in_a, cost_a) != (in_b, cost_b):
            found.append(Difference(what, in_a, in_b, cost_a, cost_b))
    return tuple(sorted(found, key=lambda d: -abs(d.more)))


def collectives(plan: Plan) -> Found:
    seconds: dict[str, float] = defaultdict(float)
    runs: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for c in plan.collectives:
        if c.kind != "slice":
            what = f"{c.kind.replace('_', '-')} on {c.axis}"
            seconds[what] += c.seconds * c.count
            runs[what] += c.count
            moved[what] += max(c.bytes, c.result_bytes) * c.count
    return {
        w: (f"{runs[w]} runs of {bytes_text(moved[w] / runs[w])}", s) for w, s in seconds.items()
    }


def ops(plan: Plan) -> Found:
    """Each group's strategy and compute."""
    found: Found = {}
    picked = plan.solution.picked
    for names in program_names(plan.problem.program):
        choices = {op: c for c in picked if c.region is names.body.region for op in c.strategies}
        for name, group in names.groups.items():
            first = group.ops[0]
            choice = choices.get(first)
            strategy = plan.solution.assignment.strategies[first]
            follows = choice is None or next(iter(choice.strategies)) is not first
            seconds = 0.0 if follows or choice is None else choice.seconds[picked[choice]]
            found[f"{names.body.name}: {name}"] = (cuts_text(strategy.axes, plan.mesh), seconds)
    return found


def moves(plan: Plan) -> Found:
    """The transfers of each tensor in each region."""
    names = facts.tensor_names(plan)
    seconds: dict[str, float] = defaultdict(float)
    kinds: dict[str, dict[str, None]] = defaultdict(dict)
    for c in plan.collectives:
        if c.kind != "slice":
            what = f"{c.region}: {names.get(c.id, c.tensor)}"
            seconds[what] += c.seconds * c.count
            kinds[what][f"{c.kind.replace('_', '-')} on {c.axis}"] = None
    return {what: (", ".join(kinds[what]), s) for what, s in seconds.items()}


def stored(plan: Plan) -> Found:
    found: Found = {}
    for info, value in plan.partitioned.program.named_inputs:
        layout = value.type.layout
        words = layout_text(layout, plan.mesh) if layout else ""
        found[info.name] = (words, value.type.local_bytes(plan.mesh))
    return found


def as_json(found: Comparison) -> dict[str, Any]:
    return dataclasses.asdict(found)


def report(found: Comparison) -> Iterable[RenderableType]:
    yield headline(found)
    yield figures(found)
    tables = (
        ("Collectives", found.collectives, seconds_text),
        ("Transfers of tensors", found.moves, seconds_text),
        ("Compute of ops", tuple(d for d in found.ops if d.more), seconds_text),
        ("Ops cut otherwise at equal compute", tuple(d for d in found.ops if not d.more), None),
        ("Tensors stored otherwise, bytes a device", found.stored, bytes_text),
    )
    for title, rows, words in tables:
        if rows:
            yield titled(title, table(found, rows, words))


def headline(found: Comparison) -> Text:
    a, b = found.a, found.b
    ratio = b.step / a.step if a.step else 1.0
    text = Text()
    if abs(ratio - 1) < 1e-6:
        text.append(f"{b.name} is as fast as {a.name}", "bold")
    else:
        slower = ratio > 1
        words = "slower" if slower else "faster"
        text.append(
            f"{b.name} is {ratio if slower else 1 / ratio:.3f}x {words} than {a.name}", "bold"
        )
        parts = (("compute", b.compute - a.compute), ("exposed transfers", b.exposed - a.exposed))
        text.append(": " + ", ".join(f"{signed(more)} of {what}" for what, more in parts if more))
    return text


def signed(seconds: float) -> str:
    return f"{'+' if seconds > 0 else '-'}{seconds_text(abs(seconds))}"


def figures(found: Comparison) -> RenderableType:
    shown = columns("left", "right", "right")
    a, b = found.a, found.b
    shown.add_row("", Text(a.name, DIM), Text(b.name, DIM))
    if (a.mesh, a.chip) != (b.mesh, b.chip):
        shown.add_row("mesh", f"{a.mesh} {a.chip}", f"{b.mesh} {b.chip}")
    for what in ("step", "compute", "exposed", "hidden"):
        shown.add_row(what, *(seconds_text(getattr(s, what)) for s in (a, b)))
    shown.add_row("MFU", *(f"{100 * s.mfu:.1f} %" for s in (a, b)))
    shown.add_row(
        "memory", *(bytes_text(s.peak) + ("" if s.fits else ", does not fit") for s in (a, b))
    )
    for kind in dict.fromkeys((*a.memory, *b.memory)):
        held = [s.memory.get(kind, 0) for s in (a, b)]
        if any(held):
            shown.add_row(f"  {kind}", *map(bytes_text, held))
    shown.add_row("proof", a.verdict, b.verdict)
    return shown


def table(found: Comparison, rows: Sequence[Difference], words: Any) -> RenderableType:
    shown = columns("left", "wrap", "right", "wrap", "right")
    heads = ("", found.a.name, "", found.b.name, "")
    shown.add_row(*(Text(h, DIM) for h in heads))
    for d in rows[:ROWS]:
        costs = [words(c) if words and did is not None else "" for did, c in
                 ((d.a, d.cost_a), (d.b, d.cost_b))]  # fmt: skip
        did = [("-" if did is None else did or "whole") for did in (d.a, d.b)]
        shown.add_row(d.what, did[0], costs[0], did[1], costs[1])
    if len(rows) > ROWS:
        rest = rows[ROWS:]
        sums = [words(sum(costs)) if words else "" for costs in
                ([d.cost_a for d in rest], [d.cost_b for d in rest])]  # fmt: skip
        shown.add_row(Text(f"{len(rest)} more", DIM), "", sums[0], "", sums[1])
    return shown
