"""The command ``neocc explain``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neocc.cli.request import DEFAULT_TARGET, bytes_of, planned, request, told_errors
from neocc.cost.algorithms import STANDARD
from neocc.cost.choice import Collectives
from neocc.ir.errors import NeoccError
from neocc.passes.alternatives import closed, derived
from neocc.report import derivation, explain, explained, terminal
from neocc.runtime import compile_model


def explain_command(
    plan: Annotated[str, typer.Argument(help="A plan file, or a model file as for compile.")],
    op: Annotated[
        str | None, typer.Option(help="An op, by words of its name: 'forward einsum mlp.fc'.")
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="A parameter, state, input or result: h0.mlp.fc.")
    ] = None,
    figure: Annotated[
        str | None, typer.Option(help="step, compute, exposed, hidden, mfu, memory or flops.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="For solving alternatives again, in all.")
    ] = 30.0,
    mesh: Annotated[str | None, typer.Option(help="8x16, or data:8,model:16.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the model file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A GPT-Neo model config (JSON).")] = None,
    target: Annotated[
        str | None, typer.Option(help="The chip: v5e, v5p, ...", show_default=DEFAULT_TARGET)
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="A file that neocc calibrate wrote, in place of --target.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences in a step.")] = None,
    layout: Annotated[str | None, typer.Option(help="batch:x,heads:y, as for compile.")] = None,
    memory: Annotated[str | None, typer.Option(help="12GiB, as for compile.")] = None,
    collectives: Annotated[
        str | None, typer.Option(help="auto or standard, as for compile.", show_default="standard")
    ] = None,
    collective: Annotated[
        list[str] | None, typer.Option(metavar="KIND=ALGORITHM", help="As for compile.")
    ] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say why a plan does what it does: an op and its alternatives, a tensor and its moves, or how
    a figure comes about, down to the fields of the hardware table.

    Exit code 2: the input is not right.
    """
    with told_errors():
        if sum(x is not None for x in (op, tensor, figure)) > 1:
            raise NeoccError("explain one thing at a time: --op, --tensor or --figure")
        if plan.endswith(".json"):
            if collectives is not None or collective is not None:
                raise NeoccError("a plan says what runs its collectives: leave that out")
            asked = planned(Path(plan), None, preset, config, mesh, layout, batch, target, hardware)
        else:
            asked = request(plan, preset, config, mesh, layout, batch, target, hardware)
        made = compile_model(
            asked.model, asked.mesh, asked.target, asked.layout, bytes_of(memory), False, False,
            asked.notes, asked.given, asked.source, asked.parts(None), False,
            Collectives.asked(collectives or STANDARD, collective or ()),
        ).plan  # fmt: skip
        ties = made.solution.objective - made.timeline.step
        bound = 0.0 if made.given else made.solution.bound - ties
        made = closed(made)
        traced = derived(made)
        step, peak = made.timeline.step, made.memory.peak
        if op is not None:
            found = explain.explain_op(made, traced, op, seconds, bound)
            shown, used, kind = explained.op(found, step, peak), found.sources, "op"
        elif tensor is not None:
            found = explain.explain_tensor(made, traced, tensor, seconds, bound)
            shown, used, kind = explained.tensor(found, step, peak), found.sources, "tensor"
        else:
            kind = figure or "step"
            found = derivation.derivation(traced, kind)
            used = derivation.figure_sources(traced, kind)
            shown = explained.figure(found, used)
        if as_text:
            typer.echo(json.dumps(explained.as_json(kind, found, used), indent=1))
            return
        console = Console(width=None if sys.stdout.isatty() else terminal.WIDTH)
        for part in shown:
            console.print(part, highlight=False)
