"""What the arguments of a command ask for; how its errors are told."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from neocc.backends import chip
from neocc.cost.calibration import chip_of_file
from neocc.cost.hardware import Chip, HardwareError
from neocc.frontends import gptneo, model_file
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.passes.layout.solve import Infeasible
from neocc.runtime import ModelSource, PlanFile, read_plan

DEFAULT_TARGET = "v5e"
RunsOn = Annotated[
    str,
    typer.Option(
        help="simulated, by this machine's processor, or target: the target's own, here or in the"
        " cluster that has started this process."
    ),
]
PROGRAMS = {"train": "train_step", "prefill": "prefill", "decode": "decode_step"}


@dataclass(frozen=True)
class Request:
    """What the arguments and the config file ask for together."""

    model: model_file.Model
    source: ModelSource
    mesh: Mesh | int
    target: Chip
    layout: str
    notes: tuple[str, ...]
    given: PlanFile | None = None
    microbatches: int | None = None  # what the config comes to, if it asks for any

    def parts(self, asked: str | None) -> int | None:
        """Microbatches to plan: those of ``--microbatches``, of the config, the best ones for a
        number of chips (None), or 1. Raises as ``parts_asked``."""
        if asked is None and self.microbatches is not None:
            return self.microbatches
        return parts_asked(asked, auto=isinstance(self.mesh, int))


def request(
    name: str | None,
    preset: str | None,
    config: Path | None,
    mesh: str | None,
    layout: str | None,
    batch: int | None,
    target: str | None,
    hardware: Path | None = None,
    chips: int | None = None,
    program: str = "train",
) -> Request:
    """Loads the model. A config file's own mesh and layout count where neither --mesh nor --chips
    is given."""
    if name is None:
        raise NeoccError("say which MODEL: neocc compile models/gpt.py --mesh 8x16")
    if chips is not None and mesh is not None:
        raise NeoccError("--chips asks for the best mesh: give --chips or --mesh, not both")
    given = Mesh.parse(mesh) if mesh else None
    model = model_file.load(name, preset, config)
    if batch is not None:
        model = model.with_fields(batch=batch)
    if program not in PROGRAMS:
        raise NeoccError(f"--program {program!r}; one of {', '.join(PROGRAMS)}")
    model = replace(model, builds=PROGRAMS[program])
    source = source_of(name, model, config, {} if batch is None else {"batch": batch})
    device = target_chip(target, hardware, DEFAULT_TARGET)
    notes = list(model.notes)
    if chips is not None:
        if model.mesh or model.layout:
            notes.append(f"the config's mesh and layout are not used: the best of {chips} devices")
        return Request(model, source, chips, device, layout or "", tuple(notes))
    if given is None and model.mesh is None:
        raise NeoccError("say which mesh: --mesh 8x16, or --chips 128 for the best one")
    chosen = given or Mesh.parse(model.mesh or "")
    if layout is None and model.layout and given is None:
        notes.append(f"mesh and layout are the config's: {chosen}; {model.layout}")
        layout = model.layout
    elif model.mesh or model.layout:
        notes.append(
            f"the config asks for mesh {model.mesh or '?'}, layout {model.layout or '?'}: not used"
        )
    parts = config_parts(model, chosen, layout or "")
    if parts is not None:
        notes.append(
            f"tokens_per_mb_per_replica {model.tokens}: {parts} microbatches, unless "
            "--microbatches says otherwise"
        )
    layout = layout or ""
    return Request(model, source, chosen, device, layout, tuple(notes), microbatches=parts)


def config_parts(model: model_file.Model, mesh: Mesh, layout: str) -> int | None:
    """Microbatches that the config's tokens_per_mb_per_replica comes to, None where it has none.
    The replicas are as many as the layout cuts the batch into; where it does not say, so that the
    plan is free to, as many as there are devices."""
    if model.tokens is None or not (model.has("batch") and model.has("seq")):
        return None
    rules = [rule.partition(":") for rule in layout.split(",")]
    axes = {axis.strip() for dim, _, axis in rules if dim.strip() == "batch"}
    sizes = [size for name, size in mesh.axes if name in axes or not axes]
    config = model.config
    return gptneo.microbatches(config.batch, config.seq, model.tokens, math.prod(sizes))


def target_chip(target: str | None, hardware: Path | None, default: str) -> Chip:
    """The chip to plan for: by name, or of a hardware file, which says whose it is.

    Raises:
        HardwareError: the table has no such chip, or the file is not right.
        NeoccError: the file is of another chip than ``target``.
    """
    if hardware is None:
        return chip(target or default)
    found = chip_of_file(hardware)
    if target is not None and target != found.name and chip(target).name != found.name:
        raise NeoccError(
            f"{hardware} calibrates {found.name}, not {target}: leave --target out, or give the "
            f"file of {target}"
        )
    return found


def source_of(
    name: str, model: model_file.Model, config: Path | None, fields: dict[str, Any]
) -> ModelSource:
    preset = model.name if config is None else None
    return ModelSource(name, preset, str(config) if config else None, fields, model.builds)


def planned(
    path: Path,
    name: str | None,
    preset: str | None,
    config: Path | None,
    mesh: str | None,
    layout: str | None,
    batch: int | None,
    target: str | None,
    hardware: Path | None = None,
) -> Request:
    """What a plan file asks for: its own model where none is named, which is otherwise checked to
    be the same, as are mesh and target."""
    if layout is not None:
        raise NeoccError("--plan has a layout for everything: give --plan or --layout, not both")
    given = read_plan(path)
    wanted = Mesh.parse(mesh) if mesh else given.mesh
    device = target_chip(target, hardware, given.chip)
    if name is None:
        if preset or config:
            raise NeoccError("--preset and --config are of a model: name the model file as well")
        model, source = load_source(given)
    else:
        builds = given.source.program if given.source else "train_step"
        model = replace(model_file.load(name, preset, config), builds=builds)
        source = source_of(name, model, config, {})
    if batch is not None:
        model = model.with_fields(batch=batch)
        source = replace(source, fields={**source.fields, "batch": batch})
    return Request(model, source, wanted, device, given.layout, model.notes, given)


def load_source(given: PlanFile) -> tuple[model_file.Model, ModelSource]:
    """The model that a plan file names; its paths are from here or from the file's own folder."""
    source = given.source
    if source is None:
        raise NeoccError(f"{given.path} names no model file: neocc compile MODEL --plan FILE")

    def found(name: str) -> str:
        beside = given.path.parent / name
        return str(beside) if not Path(name).exists() and beside.exists() else name

    config = Path(found(source.config)) if source.config else None
    try:
        model = model_file.load(found(source.file), source.preset, config)
        model = replace(model, builds=source.program)
        return (model.with_fields(**source.fields) if source.fields else model), source
    except NeoccError as error:
        raise NeoccError(f"the model of {given.path}: {error}") from None


UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for ending, base in (("ib", 1024), ("b", 1000), ("", 1000))
}


def bytes_of(text: str | None, option: str = "--memory") -> float | None:
    """``12GiB``, ``14e9``, ``14 GB`` in bytes.

    Raises:
        NeoccError: another form, or nothing.
    """
    if text is None:
        return None
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    with contextlib.suppress(ValueError, KeyError):
        size = float(number) * UNITS[unit]
        if size > 0:
            return size
    raise NeoccError(f"{option} {text!r} is no amount of memory: write 12GiB, or bytes")


def parts_asked(text: str | None, auto: bool) -> int | None:
    """``--microbatches``: a number, or None for the best one.

    Raises:
        NeoccError: neither a number above 0 nor ``auto``.
    """
    if text is None:
        return None if auto else 1
    if text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise NeoccError(f"--microbatches {text!r} is neither a number above 0 nor auto")


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """Errors that a user can cause end with code 2 and a line or two, others with a file that
    holds the traceback. ``NEOCC_DEBUG=1`` prints it instead."""
    try:
        yield
    except (NeoccError, HardwareError) as error:
        if os.environ.get("NEOCC_DEBUG"):
            traceback.print_exc()
        typer.echo(f"neocc: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, Infeasible) else 2) from None
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("NEOCC_DEBUG"):
            raise
        with tempfile.NamedTemporaryFile("w", prefix="neocc-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        typer.echo(
            f"neocc: {type(error).__name__}: {error}\nThis is a bug in neocc. The traceback is in "
            f"{file.name}; please report it with the command that you ran.",
            err=True,
        )
        raise typer.Exit(3) from None
