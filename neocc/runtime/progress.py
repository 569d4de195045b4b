"""What a person sees of a run while it goes on: a bar, the loss now and then, the speed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neocc.runtime.train import Record

P = TypeVar("P")
LINES = 10  # that a run prints of its loss


def show(
    records: Iterable[Record], steps: int, console: Console, log: IO[str] | None = None
) -> list[Record]:
    """Prints the records as they come; each is a line of JSON in ``log``. All of them."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    seen: list[Record] = []
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        task = progress.add_task("", total=steps, loss="-", speed="-")
        for record in records:
            seen.append(record)
            if log is not None:
                log.write(json.dumps(record.as_json()) + "\n")
                log.flush()
            speed = f"{tokens_per_second(seen[-LINES:]):,.0f}"
            progress.update(task, completed=len(seen), loss=f"{record.loss:.4f}", speed=speed)
            if len(seen) == 1 or len(seen) % max(1, steps // LINES) == 0:
                others = "  ".join(f"{n} {x:.3g}" for n, x in record.metrics.items() if n != "loss")
                line = f"step {record.step:>6}  loss {record.loss:.4f}  {others}  {speed} tokens/s"
                progress.console.print(line, highlight=False)
    return seen


def tokens_per_second(records: Iterable[Record]) -> float:
    records = list(records)
    return sum(r.tokens for r in records) / max(sum(r.seconds for r in records), 1e-9)


def summary(records: list[Record]) -> str:
    """The last line: how the loss went, and the speed without the first step."""
    first, last = records[0].loss, records[-1].loss
    speed = tokens_per_second(records[1:] or records)
    steps = f"{len(records)} step{'s' if len(records) > 1 else ''}"
    return f"{steps}: loss {first:.4f} -> {last:.4f}, {speed:,.0f} tokens/s"


def measured(points: Iterable[tuple[int, int, P]], console: Console) -> list[P]:
    """All points of a calibration, behind a bar while they are measured."""
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        TimeRemainingColumn(),
    )
    found: list[P] = []
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        task = progress.add_task("", total=None, last="")
        for done, total, point in points:
            found.append(point)
            progress.update(task, completed=done, total=total, last=type(point).__name__.lower())
    return found
