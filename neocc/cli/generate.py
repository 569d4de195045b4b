"""The command ``neocc generate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from neocc.backends import chip
from neocc.cli.request import RunsOn, told_errors
from neocc.frontends.weights.load import end_tokens, loaded
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh

NEW = 64  # tokens of a prompt, if not asked for
UNFINISHED = "\ufffd"  # what a part of a character decodes to

# What evaluate takes too.
Weights = Annotated[Path, typer.Argument(help="Weights of any kind that convert reads.")]
SizedMesh = Annotated[str, typer.Option(help="2x4, or data:2,model:4.")]
TokenizerName = Annotated[
    str | None,
    typer.Option(help="A file, a folder, or bytes.", show_default="beside the weights"),
]
CutDims = Annotated[str, typer.Option(help="Dims that mesh axes cut: heads:y,mlp:y.")]
PlannedChip = Annotated[str, typer.Option(help="The chip that the plans are made for.")]
NeoConfig = Annotated[
    Path | None, typer.Option(help="The GPT-Neo config of a checkpoint of GPT-Neo's own.")
]
ModelFile = Annotated[str, typer.Option(help="The model file that has such models.")]


def generate_command(
    checkpoint: Weights,
    mesh: SizedMesh,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; several.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file: a prompt a line, or JSON lines with a prompt.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of each prompt.", show_default="64, as far as the context goes"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 for the likeliest token each time.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest that have p of the probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="A token, by text or number, that ends a text; several; none for no such.",
            show_default="the checkpoint's own",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts at a time.", show_default="all, to 32")
    ] = None,
    tokenizer: TokenizerName = None,
    layout: CutDims = "",
    target: PlannedChip = "v5e",
    devices: RunsOn = "simulated",
    config: NeoConfig = None,
    model: ModelFile = "gpt.py",
    as_text: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each prompt.")
    ] = False,
) -> None:
    """Continue texts with a checkpoint's model, on a mesh of devices.

    Exit code 2: the input is not right.
    """
    with told_errors():
        from neocc.backends.here import here
        from neocc.data.tokenizer import read_tokenizer
        from neocc.runtime.choose import Choice
        from neocc.runtime.generate import Sampler

        given = prompts_of(prompt, prompts)
        choice = Choice(temperature, top_k, top_p, seed)
        grid = Mesh.parse(mesh)
        own = here(devices, chip(target), grid.size)
        with loaded(checkpoint, config, model) as (found, saved):
            words = read_tokenizer(tokenizer, checkpoint, getattr(found.config, "vocab", None))
            ends = stop_tokens(stop, checkpoint, words.token)
            tokens = [words.encode(text) for text in given]
            if empty := [i for i, t in enumerate(tokens) if not t]:
                raise NeoccError(f"prompt {empty[0]} has no token: give one of a letter or more")
            size = min(batch or 32, len(tokens))
            longest = max(map(len, tokens))
            room = max(1, getattr(found.config, "seq", longest + NEW) - longest)
            new = min(NEW, room) if max_new_tokens is None else max_new_tokens
            made = Sampler(found, saved, grid, chip(target), size, longest, new, layout, own)
        for first in range(0, len(tokens), size):
            some = range(first, min(first + size, len(tokens)))
            texts = {i: Text(given[i], words.decode) for i in some}
            alone = len(tokens) == 1 and not as_text
            if alone:
                typer.echo(given[0], nl=False)
            for token in made.generate([tokens[i] for i in some], choice, ends, first):
                more = texts[token.sequence].add(token.token, token.last)
                if alone:
                    typer.echo(more, nl=token.last is not None)
            for i in some if not alone else ():
                text = texts[i]
                if as_text:
                    typer.echo(json.dumps(text.as_json(i), ensure_ascii=False))
                else:
                    typer.echo(f"[{i}] {text.prompt}{text.shown}")


@dataclass
class Text:
    """A prompt and what was generated after it. A character whose bytes are not all there yet is
    not shown."""

    prompt: str
    decode: Callable[[Sequence[int]], str]
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    last: str | None = None

    def add(self, token: int, last: str | None) -> str:
        """Takes a token; what is shown more. A stop token is not."""
        self.last = last
        if last != "stop":
            self.tokens.append(token)
        text = self.decode(self.tokens)
        if last is None:
            text = text.rstrip(UNFINISHED)
        more = text[len(self.shown) :]
        self.shown = text if len(text) > len(self.shown) else self.shown
        return more

    def as_json(self, number: int) -> dict[str, Any]:
        own = {"number": number, "prompt": self.prompt, "text": self.shown}
        return own | {"tokens": self.tokens, "end": self.last}


def prompts_of(given: Sequence[str] | None, path: Path | None) -> list[str]:
    """Those of --prompt, or of --prompts: a line each, or JSON lines with ``prompt``."""
    if (given is None) == (path is None):
        raise NeoccError("give --prompt, once or more often, or --prompts FILE")
    found = list(given) if given is not None else list(lines_of(path, "prompt")) if path else []
    if not found:
        raise NeoccError(f"{path} has no prompt")
    return found


def lines_of(path: Path, field: str) -> Iterator[str]:
    """The lines of a text, or of JSON lines the field of each."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NeoccError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if path.suffix != ".jsonl":
            if line:
                yield line
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, TypeError, KeyError, IndexError):
            value = None
        if not isinstance(value, str):
            raise NeoccError(f"{path}:{number}: no JSON object with a text {field!r}")
        yield value


def stop_tokens(
    given: Sequence[str] | None, checkpoint: Path, token: Callable[[str], int | None]
) -> frozenset[int]:
    """Those of --stop, or what the checkpoint's generation_config.json or config.json says."""
    if given is not None:
        return frozenset() if list(given) == ["none"] else frozenset(map(numbered(token), given))
    return end_tokens(checkpoint)


def numbered(token: Callable[[str], int | None]) -> Callable[[str], int]:
    def number(text: str) -> int:
        found = token(text)
        if found is None and text.isdecimal():
            found = int(text)
        if found is None:
            raise NeoccError(f"--stop {text!r} is no token of the tokenizer")
        return found

    return number
