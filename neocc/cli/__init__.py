"""The command line: parses, calls one function, prints a report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

import neocc
from neocc.backends import chip
from neocc.cli.calibrate import calibrate_command
from neocc.cli.compare import compare_command
from neocc.cli.convert import convert_command
from neocc.cli.evaluate import evaluate_command
from neocc.cli.explain import explain_command
from neocc.cli.generate import generate_command
from neocc.cli.request import (
    DEFAULT_TARGET,
    RunsOn,
    bytes_of,
    config_parts,
    planned,
    request,
    told_errors,
)
from neocc.cli.sweep import sweep_command
from neocc.cost.algorithms import STANDARD
from neocc.cost.choice import Collectives
from neocc.frontends import model_file
from neocc.frontends.weights.convert import saved_model
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.text import print_program
from neocc.report import as_json, emit, terminal
from neocc.runtime import Checkpoint, ModelOf, compile_model, read_checkpoint

app = typer.Typer(
    help="A compiler for large GPT models: plans, proves and lowers their training step.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"neocc {neocc.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version)
    ] = False,
) -> None:
    """Plan, prove and lower the training step of a large GPT model."""


@app.command("compile")
def compile_command(
    model: Annotated[
        str | None, typer.Argument(help="A model file, or the name of a shipped one.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="8x16, or data:8,model:16.")] = None,
    chips: Annotated[
        int | None, typer.Option(min=1, help="The best mesh of so many devices, on any wires.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the model file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A GPT-Neo model config (JSON).")] = None,
    program: Annotated[
        str | None,
        typer.Option(help="What to plan: train, prefill or decode.", show_default="train"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The chip: v5e, v5p, v6e, h100, ...", show_default=DEFAULT_TARGET),
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="A file that neocc calibrate wrote: its chip and figures.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences in a step.")] = None,
    microbatches: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Parts that the batch is run in, or auto.",
            show_default="1; auto with --chips",
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Dims that mesh axes cut: batch:x,heads:y; in full or part.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What a plan may hold on a device: 12GiB, 14e9.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Cost the plan in this file in place of making one.")
    ] = None,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="What is kept for the backward pass may go to the hosts."),
    ] = False,
    collectives: Annotated[
        str | None,
        typer.Option(
            help="What runs them: auto, the best exact algorithm, or standard, XLA's own.",
            show_default="standard",
        ),
    ] = None,
    collective: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=ALGORITHM", help="What runs one kind: all_gather=ring2."),
    ] = None,
    compare: Annotated[bool, typer.Option(help="Plan what experts would try as well.")] = True,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compile for the target, hold the plan against it.")
    ] = False,
    emit_files: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--emit",
            metavar="KINDS DIR",
            help="Write ir, plan, stablehlo, hlo (comma list) into a folder.",
        ),
    ] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    print_after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="Print the program after build, simplify, pad, ..."),
    ] = None,
    time_passes: Annotated[
        bool, typer.Option("--time-passes", help="Print how long each stage took.")
    ] = False,
) -> None:
    """Plan a model's training step on a mesh, and say what it costs and why.

    Exit code 1: the plan does not fit, or the audit fails. 2: the input is not right.
    """
    with told_errors():
        kinds = emit.check_kinds(emit_files[0].split(",")) if emit_files else ()
        if print_after and print_after not in PASSES:
            raise NeoccError(f"no pass {print_after!r}; one of {', '.join(PASSES)}")
        if plan is None:
            asked = request(
                model,
                preset,
                config,
                mesh,
                layout,
                batch,
                target,
                hardware,
                chips,
                program or "train",
            )
        else:
            decided = (chips, microbatches, program, collectives, collective)
            if any(x is not None for x in decided) or offload:
                raise NeoccError(
                    "--plan decides program, mesh, microbatches, what is offloaded and what runs "
                    "collectives: leave them out"
                )
            asked = planned(plan, model, preset, config, mesh, layout, batch, target, hardware)
        compilation = compile_model(
            asked.model,
            asked.mesh,
            asked.target,
            asked.layout,
            bytes_of(memory),
            compare,
            audit,
            asked.notes,
            asked.given,
            asked.source,
            asked.parts(microbatches),
            offload,
            Collectives.asked(collectives or STANDARD, collective or ()),
        )
        console = Console(width=None if sys.stdout.isatty() else terminal.WIDTH)
        if dump := os.environ.get("NEOCC_DUMP"):
            emit.write(Path(dump), dict(emit.stages(compilation)))
        if emit_files:
            emit.write(emit_files[1], dict(emit.contents(compilation, kinds)))
        if as_text:
            typer.echo(json.dumps(as_json.report(compilation), indent=1))
        elif print_after:
            typer.echo(print_program(*compilation.stages[print_after]), nl=False)
        else:
            terminal.print_report(console, compilation)
            if emit_files:
                console.print(f"wrote {', '.join(kinds)} to {emit_files[1]}", highlight=False)
            if time_passes:
                console.print(terminal.timings(compilation.timings))
        if not compilation.ok:
            raise typer.Exit(1)


@app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(help="A model file, or the name of a shipped one.")],
    text: Annotated[Path, typer.Option(help="The text file to train on.")],
    mesh: Annotated[str, typer.Option(help="2x4, or data:2,model:4.")],
    preset: Annotated[str | None, typer.Option(help="A preset of the model file.")] = None,
    config: Annotated[Path | None, typer.Option(help="A GPT-Neo model config (JSON).")] = None,
    tokens: Annotated[str, typer.Option(help="bytes, or bpe learnt from the text.")] = "bytes",
    vocab: Annotated[
        int | None,
        typer.Option(min=1, help="Of the model; by default 256 for bytes, its own for bpe."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train, and of its schedule.")] = 200,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences in a step.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Peak learning rate.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of matrix products: f32, bf16; f64 for everything.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of the model's config."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Dims that mesh axes cut: batch:x,heads:y; in full or part.")
    ] = "",
    target: Annotated[str, typer.Option(help="The chip that the plan is made for.")] = "v5e",
    devices: RunsOn = "simulated",
    collectives: Annotated[str, typer.Option(help="auto, or standard: as for compile.")] = STANDARD,
    collective: Annotated[
        list[str] | None, typer.Option(metavar="KIND=ALGORITHM", help="As for compile.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial values and of the batches.")] = 0,
    log: Annotated[Path | None, typer.Option(help="A file for one line of JSON a step.")] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="A checkpoint of neocc's, for the initial parameters.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A checkpoint of --save, to train on from its step.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="The folder of a checkpoint to write at the end.")
    ] = None,
) -> None:
    """Train a model on a text, on a mesh of devices.

    Exit code 1: the loss is no longer finite. 2: the input is not right.
    """
    with told_errors():
        # Here, not above: JAX takes a second to import, which the other commands need not wait for.
        import jax

        from neocc.backends.here import here
        from neocc.data import BYTES, read_text
        from neocc.runtime import progress
        from neocc.runtime import text as training
        from neocc.runtime.settings import parse_settings
        from neocc.runtime.train import Diverged

        grid = Mesh.parse(mesh)
        saved = start(init_from, resume, steps)
        if saved is not None and preset is None and config is None:
            chosen = saved_model(replace(saved.model, file=model), saved.path)
        else:
            chosen = model_file.load(model, preset, config)
        if vocab is None and tokens == "bytes":
            vocab = BYTES
        given = {"vocab": vocab, "batch": batch, "seq": seq, "lr": lr, "dtype": dtype}
        if dtype == "f64":
            given["param_dtype"] = dtype
            jax.config.update("jax_enable_x64", True)
        fields = {name: value for name, value in given.items() if value is not None}
        fields |= parse_settings(chosen.config, settings or ())
        ready = training.configure(chosen, steps, fields)
        learnt = read_text(text, tokens, getattr(ready.config, "vocab", None))
        own = here(devices, chip(target), grid.size)
        console = Console(width=None if sys.stdout.isatty() else terminal.WIDTH)
        sized = replace(chosen, config=ready.config)
        parts = config_parts(sized, grid, layout) or 1
        run = training.prepare(
            ready,
            grid,
            chip(target),
            learnt,
            layout,
            seed,
            own,
            parts,
            Collectives.asked(collectives, collective or ()),
        )
        for line in (*chosen.notes, *training.describe(run)):
            console.print(line, highlight=False)
        first = 0
        if saved is not None:
            run.run.restore(saved, parameters_only=resume is None)
            first = 0 if resume is None else saved.step
            console.print(started(saved, first), highlight=False)
        if save is not None and save.exists():
            raise NeoccError(f"{save} is there already: give another --save, or remove it")
        records = run.run.train(run.batches, steps - first, first)
        try:
            with contextlib.nullcontext() if log is None else opened(log) as file:
                seen = progress.show(records, steps - first, console, file)
        except Diverged as error:
            typer.echo(f"neocc: {error}", err=True)
            raise typer.Exit(1) from None
        console.print(progress.summary(seen), highlight=False)
        if save is not None:
            fields = dataclasses.asdict(ready.config)
            run.run.save(save, ModelOf(model, ready.name, fields), steps)
            console.print(f"saved step {steps} to {save}", highlight=False)


app.command("calibrate")(calibrate_command)
app.command("sweep")(sweep_command)
app.command("explain")(explain_command)
app.command("compare")(compare_command)
app.command("convert")(convert_command)
app.command("generate")(generate_command)
app.command("evaluate")(evaluate_command)


def start(init_from: Path | None, resume: Path | None, steps: int) -> Checkpoint | None:
    """The checkpoint that training begins with, read through; or none."""
    if init_from is not None and resume is not None:
        raise NeoccError("give --init-from or --resume, not both")
    path = init_from or resume
    if path is None:
        return None
    saved = read_checkpoint(path)
    if resume is not None and saved.step >= steps:
        raise NeoccError(f"{path} is of step {saved.step}: give more --steps than that, in all")
    saved.verify()
    return saved


def started(saved: Checkpoint, first: int) -> str:
    what = f"resumed at step {first}" if first else "initial parameters"
    return f"{what}: {saved.path} ({saved.model.name})"


def opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise NeoccError(f"cannot write {path}: {error.strerror}") from None


PASSES = ("build", "simplify", "pad", "partition")


def main() -> None:
    """The entry point of the ``neocc`` command."""
    app()
