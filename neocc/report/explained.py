"""Explanations on the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from neocc.cost.algorithms import STANDARD
from neocc.report.derivation import Node, Source
from neocc.report.explain import Moved, OpFacts, Option, TensorAnswer, TensorFacts
from neocc.report.facts import bytes_text, count_text, seconds_text
from neocc.report.terminal import columns, titled

ROWS = 8  # parts of a figure that are shown; the others are summed
DEEP = 4  # levels of a figure that are shown
DIM = "dim"


def as_json(
    kind: str, found: OpFacts | TensorAnswer | Node, used: Sequence[Source]
) -> dict[str, Any]:
    """An explanation as plain dicts; seconds, bytes and FLOPs."""
    return {
        "explains": kind,
        **dataclasses.asdict(found),
        "hardware": [dataclasses.asdict(s) for s in used],
    }


def amount(n: Node) -> str:
    match n.unit:
        case "s":
            return seconds_text(n.value)
        case "bytes":
            return bytes_text(n.value)
        case "FLOPs":
            return f"{count_text(n.value)}FLOP"
    return f"{n.value:.4g}"


def figure(found: Node, used: Sequence[Source]) -> Iterable[RenderableType]:
    yield tree(found)
    yield from hardware(used)


def tree(found: Node) -> Tree:
    root = Tree(line(found), guide_style=DIM)
    grow(root, found, 1)
    return root


def grow(root: Tree, found: Node, depth: int) -> None:
    shown, rest = found.parts[:ROWS], found.parts[ROWS:]
    for part in shown:
        branch = root.add(line(part))
        if depth < DEEP:
            grow(branch, part, depth + 1)
    if rest:
        total = Node(f"{len(rest)} more", sum(p.value for p in rest), rest[0].unit)
        root.add(line(total))


def line(found: Node) -> Text:
    text = Text(f"{found.label} ")
    text.append(amount(found), "bold")
    if found.formula:
        text.append(f"  = {found.formula}", DIM)
    if found.numbers and found.numbers != found.formula:
        text.append(f"\n  = {found.numbers}", DIM)
    return text


def hardware(used: Sequence[Source]) -> Iterable[RenderableType]:
    if not used:
        return
    table = columns("left", "right", "wrap")
    for s in used:
        table.add_row(s.field, f"{s.value:.6g}", Text(s.source, DIM))
    yield titled("From the hardware table (figures of one device)", table)


def op(found: OpFacts, plan_step: float, plan_peak: int) -> Iterable[RenderableType]:
    head = Text()
    head.append(found.name, "bold")
    head.append(f" in {found.region}, {found.runs} times a step; {found.space}\n")
    head.append(f"cut as {quoted(found.strategy)}")
    if len(found.ops) > 1:
        head.append(f"; fused: {', '.join(found.ops)}", DIM)
    yield head
    yield tree(found.compute)
    yield titled("It reads", tensors(found.operands))
    yield titled("It makes", tensors(found.results))
    yield options(found.options, plan_step, plan_peak)
    yield from hardware(found.sources)


def quoted(layout: str) -> str:
    return layout or "nothing: whole on every device"


def tensors(found: Sequence[TensorFacts]) -> RenderableType:
    return Group(*(part for t in found for part in short_tensor(t)))


def short_tensor(t: TensorFacts) -> Iterable[RenderableType]:
    yield Text(f"  {t.name}: {t.type}, {quoted(t.layout)}, {bytes_text(t.bytes)} a device")
    yield from (moved(m) for m in t.moves)


def moved(m: Moved) -> Text:
    star = "*" if m.hideable else ""
    text = Text(f"    {m.kind.replace('_', '-')}{star} on {m.axis}: ")
    text.append(f"{quoted(m.before)} to {quoted(m.after)}; ")
    text.append(
        f"{bytes_text(m.bytes)} -> {bytes_text(m.result_bytes)}, {m.runs} times, over {m.link}: "
    )
    text.append(seconds_text(m.seconds.value), "bold")
    if m.algorithm != STANDARD:
        text.append(f" by {m.algorithm}; by XLA's own {seconds_text(m.standard)}")
    text.append(f"\n      = {m.seconds.formula}\n      = {m.seconds.numbers}", DIM)
    if m.waiting and m.working:
        text.append(
            f"\n      inside products: waits {seconds_text(m.waiting.value)}, the products take "
            f"{seconds_text(m.working.value)} more"
        )
    return text


def tensor(found: TensorAnswer, plan_step: float, plan_peak: int) -> Iterable[RenderableType]:
    for t in found.where:
        head = Text()
        head.append(t.name, "bold")
        head.append(f" in {t.region}: {t.type}\n")
        head.append(f"  lies {quoted(t.layout)}; {bytes_text(t.bytes)} a device\n")
        head.append(f"  from {t.made.name}{use_words(t.made.strategy)}")
        for use in t.read:
            head.append(f"\n  read by {use.name}{use_words(use.strategy)}, as {quoted(use.layout)}")
        yield head
        yield from (moved(m) for m in t.moves)
    if found.options:
        yield options(found.options, plan_step, plan_peak)
    yield from hardware(found.sources)


def use_words(strategy: str) -> str:
    return f" ({strategy})" if strategy else ""


def options(found: Sequence[Option], plan_step: float, plan_peak: int) -> RenderableType:
    """One row an option: its own compute and what all transfers take with it and all else as it
    was; the step so, and with the rest solved again (or the bound of that)."""
    table: Table = columns("left", "right", "right", "right", "right", "right", "wrap")
    heads = ("option", "compute", "transfers", "memory", "rest as it was", "rest solved", "")
    table.add_row(*(Text(h, style=DIM) for h in heads))
    for o in found:
        local = "" if o.local_step is None else seconds_text(o.local_step)
        solved = f">= {seconds_text(o.bound)}" if o.bound else ""
        if o.how == "solved again" and o.step is not None:
            solved = seconds_text(o.step)
        if o.step is None or o.memory is None:
            cells = ("", "", local, solved, Text("needs other changes too", DIM))
        else:
            against = "chosen" if o.chosen else f"{o.step / plan_step:.3f}x"
            if o.how not in ("chosen", "solved again"):
                against = f"at most {against}"
            if not o.fits:
                against += ", does not fit"
            moved = signed(o.moved, seconds_text) if o.local_step is not None else ""
            more = signed(o.memory - plan_peak, bytes_text)
            cells = (moved, more, local, "" if o.chosen else solved, Text(against, DIM))
        table.add_row(o.option or "whole", seconds_text(o.compute), *cells)
    return titled("What it could have been, and the whole step then", table)


def signed(n: float, words: Any) -> str:
    if n == 0:
        return "same"
    return f"{'+' if n > 0 else '-'}{words(abs(n))}"
