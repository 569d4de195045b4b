"""The command ``neocc evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from neocc.backends import chip
from neocc.cli.generate import (
    CutDims,
    ModelFile,
    NeoConfig,
    PlannedChip,
    SizedMesh,
    TokenizerName,
    Weights,
    lines_of,
)
from neocc.cli.request import RunsOn, told_errors
from neocc.frontends.weights.load import end_tokens, loaded
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh


def evaluate_command(
    checkpoint: Weights,
    mesh: SizedMesh,
    lambada: Annotated[
        Path | None, typer.Option(help="LAMBADA's passages: JSON lines with a text.")
    ] = None,
    wikitext: Annotated[
        Path | None, typer.Option(help="Wikitext: JSON lines with a page, or one raw text.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text, or JSON lines with texts; several.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many passages or documents of each.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pieces at a time.")] = 8,
    tokenizer: TokenizerName = None,
    layout: CutDims = "",
    target: PlannedChip = "v5e",
    devices: RunsOn = "simulated",
    config: NeoConfig = None,
    model: ModelFile = "gpt.py",
    as_text: Annotated[bool, typer.Option("--json", help="Print what is found as JSON.")] = False,
) -> None:
    """Measure a checkpoint's model: the last word of LAMBADA's passages, the word perplexity of
    Wikitext, loss and bits per byte of any text.

    Exit code 2: the input is not right.
    """
    with told_errors():
        from neocc.backends.here import here
        from neocc.data.tokenizer import read_tokenizer
        from neocc.runtime import measures
        from neocc.runtime.evaluate import Scorer

        if lambada is None and wikitext is None and not text:
            raise NeoccError("say what to evaluate on: --lambada, --wikitext or --text FILE")
        passages = documents([lambada], "text", limit, whole=False) if lambada else []
        pages = documents([wikitext], "page", limit) if wikitext else []
        texts = documents(text or [], "text", limit)
        grid = Mesh.parse(mesh)
        own = here(devices, chip(target), grid.size)
        found: dict[str, Any] = {}
        with loaded(checkpoint, config, model) as (chosen, saved):
            words = read_tokenizer(tokenizer, checkpoint, getattr(chosen.config, "vocab", None))
            before = min(end_tokens(checkpoint), default=None)
            scorer = Scorer(chosen, saved, grid, chip(target), batch, layout, own)
            with Progress(console=Console(stderr=True), transient=True) as bar:
                jobs = [(name, bar.add_task(name, visible=False)) for name in MEASURES]
                tasks = dict(jobs)

                def seen(name: str) -> Any:
                    def show(done: int, of: int) -> None:
                        visible = sys.stderr.isatty()
                        bar.update(tasks[name], completed=done, total=of, visible=visible)

                    return show

                if lambada:
                    found["lambada"] = measures.lambada(
                        scorer, passages, words.encode, seen("lambada")
                    )
                if wikitext:
                    found["wikitext"] = measures.corpus(
                        scorer, pages, words.encode, before, seen("wikitext"), measures.wikitext
                    )
                if text:
                    found["text"] = measures.corpus(
                        scorer, texts, words.encode, before, seen("text")
                    )
        figures = {name: dataclasses.asdict(m) for name, m in found.items()}
        if as_text:
            typer.echo(json.dumps(figures, indent=1))
            return
        for name, own in figures.items():
            typer.echo(f"{name}: {', '.join(worded(key, own[key]) for key in own)}")
        if before is None and (wikitext or text):
            typer.echo("note: the first token of a document is not scored: no end token is known")


MEASURES = ("lambada", "wikitext", "text")


def worded(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,} {key}"
    if key == "accuracy":
        return f"accuracy {100 * value:.2f} %"
    return f"{key.replace('_', ' ')} {value:.4f}"


def documents(paths: list[Path], field: str, limit: int | None, whole: bool = True) -> list[str]:
    """Of ``.jsonl`` files the field of each line; of others the text, ``whole``, or its lines."""
    found: list[str] = []
    for path in paths:
        if path.suffix == ".jsonl" or not whole:
            found += lines_of(path, field)
            continue
        try:
            found.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise NeoccError(f"cannot read {path}: {error}") from None
    return found[:limit]
