"""A compilation as files, each written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neocc.ir.errors import NeoccError
from neocc.ir.text import print_program
from neocc.report import as_json
from neocc.runtime import Compilation, plan_document

KINDS = ("ir", "plan", "stablehlo", "hlo")


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds, each once.

    Raises:
        NeoccError: one is not known.
    """
    found = tuple(dict.fromkeys(k.strip() for k in kinds if k.strip()))
    unknown = [k for k in found if k not in KINDS]
    if unknown or not found:
        what = f"unknown kind {unknown[0]!r}" if unknown else "nothing"
        raise NeoccError(f"--emit: {what} to write; one or more of {','.join(KINDS)}")
    return found


def contents(compilation: Compilation, kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    """File names and texts. ``ir``: the program before and after partitioning; ``plan``: JSON;
    ``stablehlo``, ``hlo``: for the target's devices, before and after its compiler.

    Raises:
        NeoccError: the target's compiler is not here, or refuses the program.
    """
    stages = compilation.stages
    for kind in kinds:
        if kind == "ir":
            for stage in ("simplify", "partition"):
                yield stage_file(stage), print_program(*stages[stage])
        elif kind == "plan":
            document = readable_plan(compilation)
            yield "plan.json", json.dumps(document, indent=1) + "\n"
        else:
            # JAX takes a second to import: only what needs it does.
            from neocc.backends.target import compile_for_target, lower_for_target

            if kind == "stablehlo":
                yield "step.stablehlo.mlir", lower_for_target(compilation.plan).stablehlo()
            else:
                yield "step.hlo.txt", compile_for_target(compilation.plan).hlo


def readable_plan(compilation: Compilation) -> dict[str, Any]:
    """A plan that can be read back, and what was said of it."""
    plan = compilation.plan
    return {**plan_document(plan, compilation.source), "report": as_json.plan_document(plan)}


def stage_file(stage: str) -> str:
    return {"simplify": "program.ir", "partition": "partitioned.ir"}.get(stage, f"{stage}.ir")


def stages(compilation: Compilation) -> Iterator[tuple[str, str]]:
    """Every stage of the compilation, numbered in order, as ``NEOCC_DUMP`` writes them."""
    for i, (stage, (program, mesh)) in enumerate(compilation.stages.items()):
        yield f"{i:02}-{stage}.ir", print_program(program, mesh)
    yield from contents(compilation, ["plan"])


def write(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes each file beside its place and moves it there: a reader never sees half of one.

    Raises:
        NeoccError: the folder cannot be made or written to.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, prefix=f".{name}.", delete=False, encoding="utf-8"
            ) as file:
                try:
                    file.write(text)
                    file.close()
                    os.chmod(file.name, 0o644)
                    os.replace(file.name, folder / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
            written.append(folder / name)
    except OSError as error:
        raise NeoccError(f"cannot write to {folder}: {error.strerror}") from None
    return written
