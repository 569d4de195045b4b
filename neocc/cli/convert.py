"""The command ``neocc convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neocc.cli.request import bytes_of, told_errors
from neocc.frontends.weights.convert import convert


def convert_command(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any of the kinds.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, which is not there yet.")],
    to: Annotated[str, typer.Option(help="neocc, hf, or mtf: GPT-Neo's own.")] = "neocc",
    config: Annotated[
        Path | None, typer.Option(help="The GPT-Neo config of a checkpoint of GPT-Neo's own.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model file that has such models.")] = "gpt.py",
    shard: Annotated[str, typer.Option(help="Bytes of a file, at most: 4GB, 500MiB.")] = "4GB",
) -> None:
    """Convert weights between Hugging Face's, GPT-Neo's and neocc's checkpoints.

    Exit code 2: the input is not right, and nothing is written.
    """
    with told_errors():
        done = convert(source, target, to, config, model, bytes_of(shard, "--shard") or 0)
        model_name, step = done.source.model.name, done.source.step
        trained = f", step {step:,}" if step else ""
        typer.echo(
            f"{model_name} ({done.source.kind}{trained}) -> {done.path} ({done.kind}): "
            f"{done.tensors} tensors, {done.bytes:,} bytes"
        )
        for note in done.notes:
            typer.echo(f"note: {note}")
