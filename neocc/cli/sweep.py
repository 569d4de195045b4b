"""The command ``neocc sweep``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from neocc.cli.request import DEFAULT_TARGET, bytes_of, target_chip, told_errors
from neocc.cost.algorithms import STANDARD
from neocc.cost.choice import Collectives
from neocc.frontends import model_file
from neocc.ir.errors import NeoccError
from neocc.report import sweep as report
from neocc.report import terminal
from neocc.runtime.sweep import Row, sweep


def sweep_command(
    model: Annotated[
        str, typer.Argument(help="A model file, or the name of a shipped one.")
    ] = "gpt.py",
    chips: Annotated[str, typer.Option(help="Numbers of devices: 256, or 64,128,256.")] = "128",
    batch: Annotated[
        str | None, typer.Option(help="Sequences in a step: 512, or 256,512; else the config's.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the model file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A GPT-Neo model config (JSON).")] = None,
    target: Annotated[
        str | None, typer.Option(help="The chip: v5e, v5p, ...", show_default=DEFAULT_TARGET)
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="A file that neocc calibrate wrote, in place of --target.")
    ] = None,
    layout: Annotated[str, typer.Option(help="batch:x,heads:y, as for compile.")] = "",
    memory: Annotated[str | None, typer.Option(help="12GiB, as for compile.")] = None,
    collectives: Annotated[str, typer.Option(help="auto or standard, as for compile.")] = STANDARD,
    collective: Annotated[
        list[str] | None, typer.Option(metavar="KIND=ALGORITHM", help="As for compile.")
    ] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Plan a model on every mesh of one or more chip counts: time, memory, and what is best.

    Exit code 1: no plan fits. 2: the input is not right.
    """
    with told_errors():
        chosen = model_file.load(model, preset, config)
        counts = numbers(chips, "--chips")
        batches = [None] if batch is None else numbers(batch, "--batch")
        device = target_chip(target, hardware, DEFAULT_TARGET)
        rows: list[Row] = []
        columns = (TextColumn("planning"), BarColumn(), TextColumn("{task.completed:.0f} of "
                   "{task.total:.0f} meshes"), TimeElapsedColumn())  # fmt: skip
        bar = Console(stderr=True)
        with Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal) as shown:
            task = shown.add_task("", total=1)

            def watch(done: int, of: int) -> None:
                shown.update(task, completed=done, total=of)

            asked = Collectives.asked(collectives, collective or ())
            limit = bytes_of(memory)
            rows += sweep(chosen, device, counts, batches, layout, limit, watch, asked)
        if as_text:
            typer.echo(json.dumps(report.as_json(rows), indent=1))
        else:
            console = Console(width=None if sys.stdout.isatty() else terminal.WIDTH)
            console.print(report.table(rows), highlight=False)
            console.print(report.plot(rows, console.width), highlight=False, markup=False)
        if all(row.plan is None for row in rows):
            raise typer.Exit(1)


def numbers(text: str, option: str) -> list[int]:
    """``64,128`` as numbers above 0.

    Raises:
        NeoccError: another form.
    """
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise NeoccError(f"{option} {text!r} is no list of numbers above 0, like 64,128")
    return [int(p) for p in dict.fromkeys(parts)]
