"""``neocc calibrate``: measures the devices here and writes a hardware file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neocc.cli.request import bytes_of, told_errors
from neocc.cost.fit import RESIDUAL, BadFit
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.report import calibration as shown
from neocc.report.terminal import WIDTH


def calibrate_command(
    chip: Annotated[
        str | None,
        typer.Option(
            help="h100, v5e, ...; cpu: this machine's processor; FILE.json: a row of its own. By "
            "default what JAX says that the devices are."
        ),
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="2x4, or data:2,model:4; by default one axis of all devices.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; ./CHIP.calibrated.json by default.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to measure.")] = 300.0,
    largest: Annotated[
        str | None,
        typer.Option(help="The largest collective: 256MiB; 4MiB on a processor."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and short measurements: a first look.")
    ] = False,
    residual: Annotated[
        float,
        typer.Option(min=0.0, help="Median relative error that is allowed on points not fitted."),
    ] = RESIDUAL,
) -> None:
    """Measure this machine's devices, fit the chip's figures to them, write a hardware file.

    Exit code 1: no sane figures explain the measurements; nothing is written. 2: the input is not
    right.
    """
    with told_errors():
        grid = Mesh.parse(mesh) if mesh else None
        size = bytes_of(largest, "--largest")
        if size is not None and size < 2**17:
            raise NeoccError(f"--largest {largest}: collectives of less than 128 KiB tell no rate")
        # Here, not above: JAX takes a second to import.
        from neocc.backends.tpu.compile import prepare_environment
        from neocc.runtime import calibrate, progress

        prepare_environment()
        subject = calibrate.prepare(chip, grid)
        path = out or Path(f"{subject.chip}.calibrated.json")
        if not path.parent.is_dir():
            raise NeoccError(f"cannot write {path}: there is no folder {path.parent}")
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(shown.heading(subject.row["title"], subject.mesh.devices), highlight=False)
        points = progress.measured(
            calibrate.run(subject, seconds, None if size is None else int(size), quick), console
        )
        try:
            found = calibrate.conclude(subject, points, residual)
        except BadFit as error:
            for reason in error.reasons:
                typer.echo(f"neocc: {reason}", err=True)
            typer.echo("neocc: nothing was written", err=True)
            raise typer.Exit(1) from None
        calibrate.write(path, found)
        console.print(shown.table(found.row, found.fields, found.fits))
        console.print(
            f"wrote {path}; plan with it: neocc compile MODEL --mesh MESH --hardware {path}",
            highlight=False,
        )
