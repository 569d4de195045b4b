"""The command ``neocc compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neocc.cli.request import planned, told_errors
from neocc.ir.errors import NeoccError
from neocc.passes.plan import Plan
from neocc.report import compare, terminal
from neocc.runtime import compile_model, rival_plan


def compare_command(
    a: Annotated[str, typer.Argument(help="A plan file.")],
    b: Annotated[
        str, typer.Argument(help="A plan file; or neocc, 'data parallel', FSDP, Megatron, GShard.")
    ],
    as_text: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Set two plans side by side, or a plan beside what neocc or an expert would do in its place.

    Exit code 2: the input is not right.
    """
    with told_errors():
        if not is_file(a):
            raise NeoccError(f"there is no plan file {a!r}: neocc compile --emit plan writes one")
        first = read(a)
        second = read(b) if is_file(b) else rival_plan(first, b)
        found = compare.compare(a, first, b, second)
        if as_text:
            typer.echo(json.dumps(compare.as_json(found), indent=1))
            return
        console = Console(width=None if sys.stdout.isatty() else terminal.WIDTH)
        for part in compare.report(found):
            console.print(part, highlight=False)


def is_file(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def read(name: str) -> Plan:
    """The plan of a file, checked and costed."""
    asked = planned(Path(name), None, None, None, None, None, None, None)
    return compile_model(
        asked.model, asked.mesh, asked.target, asked.layout, None, False, False,
        asked.notes, asked.given, asked.source,
    ).plan  # fmt: skip
