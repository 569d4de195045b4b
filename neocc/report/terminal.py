"""A compilation on one screen."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from neocc.cost.algorithms import PRODUCTS, STANDARD
from neocc.ir.ops import HOST_MOVES
from neocc.lower.audit import Audit, summary
from neocc.passes.plan import Plan, attention_in_kernels
from neocc.passes.remat import KEEP
from neocc.report import facts
from neocc.report.certificate import MODEL, SPACE, gap_text, outer, verdict
from neocc.report.facts import bytes_text, count_text, seconds_text
from neocc.runtime import Compared, Compilation, Remedy, Timing

WIDTH = 100
ROWS = 10  # of collectives; the others are summed
HEAD = "bold cyan"


def print_report(console: Console, compilation: Compilation) -> None:
    """The whole report."""
    for part in report(compilation):
        console.print(part, highlight=False, soft_wrap=False)


def report(c: Compilation) -> Iterable[RenderableType]:
    yield headline(c)
    yield layouts(c)
    yield memory(c)
    yield collectives(c.plan)
    yield times(c)
    if c.rivals:
        yield rivals(c)
    if not c.plan.fits:
        yield misfit(c)
    if c.audit:
        yield audit(c.audit)
    for note in c.notes:
        yield Text(f"note: {note}", style="dim")


def titled(title: str, body: RenderableType) -> Group:
    return Group(Text(title, style=HEAD), body)


def columns(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    for how in justify:
        wraps = how == "wrap"
        table.add_column(
            justify="right" if how == "right" else "left",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    return table


def headline(c: Compilation) -> Text:
    plan = c.plan
    text = Text()
    text.append(c.model.name, style="bold")
    text.append(f": {count_text(c.program.parameter_count)} parameters")
    if c.tokens:
        text.append(f", {c.tokens:,} tokens a step")
    text.append(f"; mesh {plan.mesh} = {plan.mesh.size} x {plan.chip.title}")
    text.append(f" ({bytes_text(plan.chip.hbm_bytes)} each)")
    text.append(f", {plan.chip.calibration}\n" if plan.chip.calibration else "\n")
    if plan.ready.microbatches > 1:
        text.append(f"{plan.ready.microbatches} microbatches; ")
    if plan.fits:
        text.append(f"step {seconds_text(plan.timeline.step)}", style="bold green")
        if c.tokens:
            text.append(f", {count_text(c.tokens / plan.timeline.step)} tokens/s")
        text.append(f", MFU {100 * plan.mfu:.1f} %, {verdict(plan)}")
    else:
        over = plan.memory.peak - plan.memory_limit
        text.append(f"does not fit: {bytes_text(over)} a device too much", style="bold red")
    return text


def layouts(c: Compilation) -> Group:
    plan = c.plan
    table = columns("left", "left", "left", "right")
    rows = [("", r) for r in facts.weights(plan)]
    rows += [("state ", r) for r in facts.unlike_states(plan)]
    for prefix, row in rows:
        add_layout(table, plan, prefix + names_text(row.names, 3), row)
    table.add_row(Text("as computed", style="dim"))
    for row in facts.activations(plan):
        add_layout(table, plan, row.names[0], row)
    trains = c.model.builds == "train_step" and not facts.unlike_states(plan)
    moments = "; optimizer state lies as its weight" if trains else ""
    return titled(f"Layout (weights as stored, bytes a device{moments})", table)


def add_layout(table: Table, plan: Plan, name: str, row: facts.Row) -> None:
    words = facts.layout_words(row.type, plan.mesh)
    count = f"{len(row.names)} x " if len(row.names) > 1 else ""
    dims = facts.dims_words(row.type)
    if match := re.match(r"(layers\w*) x ", dims):
        dims = f"{row.type.dim(match[1]).size} x ({dims[match.end() :]})"
    table.add_row(Text(name), Text(dims), Text(words), f"{count}{bytes_text(row.bytes)}")


def names_text(names: tuple[str, ...], most: int = 4) -> str:
    """``attn.q, k, v``: a prefix once; the first few; ``grads of attn.q, k``."""
    if all(name.endswith(" grad") for name in names) and len(names) > 1:
        return f"grads of {names_text(tuple(n.removesuffix(' grad') for n in names), most)}"
    shown: list[str] = []
    before = ""
    for name in names[:most]:
        prefix, dot, last = name.rpartition(".")
        shown.append(last if dot and prefix == before else name)
        before = prefix
    more = f", +{len(names) - most}" if len(names) > most else ""
    return ", ".join(shown) + more


def memory(c: Compilation) -> Group:
    held = c.plan.memory
    limit = c.plan.memory_limit
    cache = {} if c.model.builds == "train_step" else {"optimizer state": "keys and values"}
    kinds = {cache.get(kind, kind): n for kind, n in held.by_kind.items() if n > limit * 1e-4}
    parts = [f"{kind} {bytes_text(n)}" for kind, n in kinds.items()]
    whole = f"{bytes_text(held.peak)} of {bytes_text(limit)} usable"
    title = f"Memory of a device: {whole} ({100 * held.peak / limit:.0f} %), at {held.point}"
    if hosted := facts.hosted_bytes(c.plan):
        parts.append(f"and on its host {bytes_text(hosted)}")
    return titled(title, Text(f"  {', '.join(parts)}"))


def collectives(plan: Plan) -> Group:
    rows = facts.traffic(plan)
    table = columns("left", "wrap", "right", "right", "right", "wrap")
    heads = ("collective", "of", "bytes in -> out", "runs", "time", "where")
    table.add_row(*(Text(h, style="dim") for h in heads))
    shown, rest = facts.cut_after(rows, ROWS)
    for r in shown:
        kind = r.kind.replace("_", "-")
        over = kind if r.kind in HOST_MOVES else f"{kind} on {r.axis}"
        region = r.region + ("*" if r.hideable else "")
        moved = f"{bytes_text(r.bytes)} -> {bytes_text(r.result_bytes)}"
        table.add_row(
            over,
            names_text(r.tensors, 3),
            moved,
            f"{r.runs}",
            seconds_text(r.seconds),
            Text(region + by_words(r)),
        )
    if rest:
        table.add_row(rest.kind, "", "", f"{rest.runs}", seconds_text(rest.seconds), "")
    if not rows:
        return titled("Collectives", Text("  none"))
    return titled("Collectives of a step (* can hide behind compute; --json has each one)", table)


def by_words(r: facts.Traffic) -> str:
    """What runs a row of collectives, where it is not XLA's own."""
    if r.algorithm == STANDARD:
        return ""
    if r.kind == "permute":  # of ring attention
        behind = f", {seconds_text(r.within)} behind its products" if r.within else ""
        return f"; by {r.algorithm}{behind}; gathered instead: {seconds_text(r.standard)}"
    lossy = ", lossy" if r.lossy else ""
    own = f"XLA's own: {seconds_text(r.standard)}"
    if r.algorithm == PRODUCTS:
        more = f"waits {seconds_text(r.waiting)}, products take {seconds_text(r.working)} more"
        return f"; inside products: {more}; {own}"
    return f"; by {r.algorithm}{lossy}; {own}"


def times(c: Compilation) -> Group:
    plan, t, s = c.plan, c.plan.timeline, c.plan.solution
    done = facts.work(plan)
    body = Text(
        f"  compute {seconds_text(t.compute)} + exposed communication {seconds_text(t.exposed)}"
        f" = {seconds_text(t.step)}; hidden communication {seconds_text(t.hidden)}\n"
        f"  MFU {100 * plan.mfu:.1f} %; FLOP/s {100 * facts.utilisation(plan):.1f} % of peak, with "
        f"{100 * done.recomputed:.1f} % recomputed, {100 * done.padding:.2g} % padding, "
        f"{100 * done.repeated:.2g} % repeated"
    )
    if done.skipped:
        body.append(f", {100 * done.skipped:.2g} % of masked scores skipped")
    body.append("\n")
    if c.model.builds == "decode_step":
        read = facts.stored_bytes(plan)
        bound = read / plan.chip.hbm_bandwidth
        body.append(
            f"  to read weights and cache once, {bytes_text(read)} a device, takes "
            f"{seconds_text(bound)} at the full bandwidth of its memory; the step is "
            f"{t.step / bound:.2f} times that\n"
        )
    if own := attention_in_kernels(plan):
        body.append(
            f"  attention by {own.name}: {own.ops} of {own.of} ops, {seconds_text(own.seconds)}, "
            f"computed from parts and not measured; as loops {seconds_text(own.loop)}\n"
        )
    for p in plan.paddings:
        body.append(f"  padded {p}\n")
    for decision in dict.fromkeys(plan.saved.values()):
        names = [n for n, d in plan.saved.items() if d == decision and "#" not in n]
        words = "kept for the backward pass" if decision == KEEP else "computed again going back"
        body.append(f"  {words}: {', '.join(names)}\n")
    if plan.given:
        body.append(f"  {verdict(plan)}{against(c)}\n  cost model: {MODEL}", "dim")
        return titled("Time of a step", body)
    if not plan.fits:
        body.append(f"  {verdict(plan)}; shown is one that holds little")
        return titled("Time of a step", body)
    body.append(
        f"  {verdict(plan)}: bound {seconds_text(s.bound)}, gap {gap_text(s.gap)}, "
        f"{s.left.columns:,} of {s.whole.columns:,} columns (the others are proved to cost more), "
        f"{s.seconds:.1f} s to solve\n"
    )
    if c.searched is not None:
        body.append(f"  outer choices: {outer(c.searched)}\n")
    body.append(f"  cost model: {MODEL}\n  search space: {SPACE}", "dim")
    return titled("Time of a step", body)


def against(c: Compilation) -> str:
    """How far a plan that was given is from the one that neocc makes."""
    if c.best is None:
        return ""
    given, best = c.plan.timeline.step, c.best.timeline.step
    if not c.best.fits:
        return "; neocc finds none that fits"
    more = 100 * (given - best) / best
    words = f"{more:.2g} % slower than" if more > 0 else f"{-more:.2g} % faster than"
    words = "as fast as" if abs(more) < 1e-4 else words
    return f"; {words} neocc's own plan ({seconds_text(best)}, {verdict(c.best)})"


def rivals(c: Compilation) -> Group:
    table = columns("left", "right", "right", "right", "right", "wrap")
    heads = ("", "step", "against", "MFU", "memory", "")
    table.add_row(*(Text(h, style="dim") for h in heads))
    own = [Compared("as given" if c.plan.given else "neocc", c.plan, c.plan.fits)]
    if c.best:
        own.append(Compared("neocc", c.best, c.best.fits))
    for r in (*own, *c.rivals):
        table.add_row(*rival(r, c.plan))
    return titled("What an expert would try", table)


def rival(r: Compared, against: Plan) -> tuple[str, ...]:
    if r.plan is None:
        return r.name, "", "", "", "", f"no such plan: {r.reason}"
    plan = r.plan
    return (
        r.name,
        seconds_text(plan.timeline.step),
        f"{plan.timeline.step / against.timeline.step:.2f}x",
        f"{100 * plan.mfu:.1f} %",
        bytes_text(plan.memory.peak),
        "fits" if r.fits else f"does not fit in {bytes_text(plan.memory_limit)}",
    )


def misfit(c: Compilation) -> Group:
    plan = c.plan
    text = Text("  largest at the fullest point:\n")
    for name, size in plan.memory.largest[:5]:
        text.append(f"    {bytes_text(size):>10}  {facts.short(name)}\n")
    if plan.given:
        text.append("  the layout was given; without --plan one that fits is sought")
    elif c.remedies:
        text.append("  it fits with:")
        for r in c.remedies:
            text.append(f"\n    {remedy(r)}")
    else:
        text.append("  no smaller batch, larger mesh or larger chip that was tried is enough")
    return titled("Does not fit", text)


def remedy(r: Remedy) -> str:
    asked = f" ({r.arguments})" if r.arguments else ""
    return f"{r.change}{asked}: {bytes_text(r.peak)}, step {seconds_text(r.step)}"


def audit(found: Audit) -> Group:
    text = Text()
    good = "agree" if found.collectives_ok else "DIFFER"
    text.append(f"  collectives {good}: ")
    text.append("; ".join(f"{n} {verdict}" for verdict, n in summary(found.findings).items()))
    for f in found.findings:
        if not f.ok:
            what = f.planned.tensor or f.planned.kind if f.planned else ""
            name = f.compiled.instruction if f.compiled else what
            text.append(f"\n    {f.verdict}: {name}", style="red")
    for loop in found.unknown_loops:
        text.append(f"\n    trips of {loop} are not known", style="red")
    same = "equal" if found.flops_equal else "DIFFER"
    text.append(
        f"\n  FLOPs of matrix products a device {same}: plan {found.planned_flops:,}, "
        f"compiled {found.compiled_flops:,}"
        f"\n  peak memory: plan {bytes_text(found.planned_peak)}, compiled "
        f"{bytes_text(found.compiled_peak)} ({100 * found.memory_error:+.1f} %), "
        f"reserved {bytes_text(found.reserved)}"
    )
    for kind, h in found.hiding.items():
        may, do = seconds_text(h.planned), seconds_text(h.beside)
        text.append(f"\n  {kind.replace('_', '-')}: {may} may hide behind compute, ")
        text.append(f"{do} of it run beside matrix products")
    words = "the compiled program is what was planned" if found.ok else "the audit FAILS"
    text.append(f"\n  {words}", style="bold green" if found.ok else "bold red")
    return titled("Audit against the target's compiler", text)


def timings(found: Iterable[Timing]) -> Group:
    """How long each stage took."""
    table = columns("left", "right")
    for t in found:
        table.add_row(t.stage, f"{t.seconds:.3f} s")
    return titled("Time of each stage", table)
