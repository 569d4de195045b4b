"""Calibrate: measure JAX's devices, fit the table's figures to them, keep them in a file."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import neocc.ir.mesh as ir_mesh
from neocc import backends
from neocc.cost.calibration import SCHEMA, nominal_rates, read_row, set_fields
from neocc.cost.fit import RESIDUAL, Fit, Measured, Pass, Product, Transfer, best_seen, fit_row
from neocc.cost.hardware import chip_of_row
from neocc.cost.topology import Topology, topology
from neocc.ir.errors import NeoccError
from neocc.runtime.measure import Bench, Point, measure, sweep
from neocc.version import VERSION

CPU = "cpu"
UNIT = {"cpu": 64}  # side of the smallest product; of an accelerator, 1024
LARGEST = {"cpu": 2**22}  # bytes of the largest collective; of an accelerator, 256 MiB


@dataclass(frozen=True)
class Subject:
    """What is calibrated. ``row``: nominal; ``own``: it is not in the table, so the file holds
    it; ``measured_row``: its rates are to be measured too."""

    chip: str
    row: dict[str, Any]
    own: bool
    measured_row: bool
    laid: Topology
    mesh: Mesh


@dataclass(frozen=True)
class Calibrated:
    """What came out: the row with its nominal rates, the fitted fields and how well they fit."""

    subject: Subject
    row: dict[str, Any]
    fields: dict[str, float]
    fits: tuple[Fit, ...]
    points: tuple[Point, ...]
    date: str

    def document(self) -> dict[str, Any]:
        """The hardware file's content; ``neocc.cost.calibration`` reads it."""
        subject = self.subject
        return {
            "schema": SCHEMA,
            "chip": subject.chip,
            "device": {
                "kind": subject.mesh.devices.flat[0].device_kind,
                "count": int(subject.mesh.devices.size),
                "mesh": list(subject.laid.mesh_sizes),
                "placement": [
                    [[p.axis, p.size, p.stride] for p in ps] for ps in subject.laid.parts
                ],
            },
            "date": self.date,
            "versions": {"neocc": VERSION, "jax": jax.__version__},
            "fields": self.fields,
            "nominal": nominal_rates(self.row, self.fields),
            "fits": [
                {
                    "of": fit.name,
                    "fields": sorted(fit.fields),
                    "points_fitted": fit.fitted,
                    "points_tested": fit.tested,
                    "residual_median": fit.residual,
                    "residual_worst": fit.worst,
                    "residual_uneven": fit.uneven,
                }
                for fit in self.fits
            ],
            "row": self.row if subject.own else None,
            "points": [[type(p).__name__, *p.key[1:], p.seconds] for p in self.points],
        }


def prepare(chip: str | None, mesh: ir_mesh.Mesh | None) -> Subject:
    """Finds the devices and the row to calibrate.

    ``chip``: a name of the table, ``cpu`` for this machine's processor, or a file with a row;
    None: what JAX says that the devices are. ``mesh``: by default one axis of all devices.

    Raises:
        HardwareError: no row for the devices.
        NeoccError: fewer devices than the mesh has, or they do not lie as a mesh of the chip does.
    """
    if mesh is not None:
        with contextlib.suppress(RuntimeError):  # JAX has started: what counts is what there is
            jax.config.update("jax_num_cpu_devices", mesh.size)
            if chip == CPU:
                jax.config.update("jax_platforms", CPU)
    devices = jax.devices(CPU) if chip == CPU else jax.devices()
    sizes = (len(devices),) if mesh is None else mesh.sizes
    names = ("x",) if mesh is None else mesh.names
    count = int(np.prod(sizes))
    if len(devices) < count:
        raise NeoccError(
            f"a mesh of {count} devices, and JAX has {len(devices)} {devices[0].device_kind}"
        )
    devices = devices[:count]
    name, row, own, bare = row_for(chip, devices[0].device_kind, count)
    described = chip_of_row(name, row)
    of_kind = backends.backend(described.kind)
    laid = topology(described, sizes, of_kind.slice_shape(devices))
    return Subject(name, row, own, bare, laid, Mesh(of_kind.placed(laid, devices), names))


def row_for(chip: str | None, kind: str, count: int) -> tuple[str, dict[str, Any], bool, bool]:
    """Name and nominal row of a chip; whether it is not of the table; and whether its rates are
    yet to be measured."""
    if chip == CPU or (chip is None and kind == CPU):
        return CPU, processor_row(count), True, True
    if chip is None:
        chip = backends.device_chip(kind)
    if chip.endswith(".json"):
        return (*read_row(Path(chip)), True, False)
    name, row = backends.row(chip)
    return name, row, False, False


def processor_row(devices: int) -> dict[str, Any]:
    """A row for this machine's processor as that many simulated devices, with unit rates."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    link = {"bandwidth": 1e9, "efficiency": 1.0, "latency": 0.0}
    best = "the best that any point of the calibration reached"
    return {
        "kind": "cpu",
        "title": f"{devices} simulated devices of a processor with {os.cpu_count()} cores",
        "device": "an equal share of one processor",
        "devices_per_chip": 1,
        "peak_flops": {"bf16": 1e9, "f32": 1e9},
        "matmul_tile": [1, 1, 1],
        "matmul_efficiency": 1.0,
        "hbm_bytes_per_device": memory // devices,
        "hbm_bandwidth": 1e9,
        "hbm_efficiency": 1.0,
        "collective_overhead": 0.0,
        "host": {"size": devices, "link": link},
        "network": dict(link),
        "sources": ["measured by neocc calibrate"],
        "assumptions": {
            "peak_flops": best,
            "hbm_bandwidth": best,
            "host.link.bandwidth": best,
            "matmul_tile": "a processor's vectors are too short to count",
            "network": "not measured: there is one host",
        },
    }


def run(
    subject: Subject, seconds: float, largest: int | None = None, quick: bool = False
) -> Iterator[tuple[int, int, Point]]:
    """Measures: (done, of how many, point), for about as long as is asked."""
    kind = subject.laid.chip.kind
    size = largest or LARGEST.get(kind, 2**28)
    bench = Bench(subject.mesh, sweep(UNIT.get(kind, 1024), size, quick))
    return measure(bench, seconds)


def conclude(subject: Subject, points: Sequence[Point], allowed: float = RESIDUAL) -> Calibrated:
    """Fits the row to the points.

    Raises:
        BadFit: no sane row explains them.
    """
    measured = Measured(
        tuple(p for p in points if isinstance(p, Product)),
        tuple(p for p in points if isinstance(p, Pass)),
        tuple(p for p in points if isinstance(p, Transfer)),
        subject.laid,
    )
    row = subject.row
    if subject.measured_row:
        row = set_fields(row, best_seen(measured, row))
        chip = chip_of_row(subject.chip, row)
        measured = replace(measured, laid=replace(subject.laid, chip=chip))
    fields, fits = fit_row(row, measured, allowed)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Calibrated(subject, row, fields, tuple(fits), tuple(points), today)


def write(path: Path, found: Calibrated) -> None:
    """Writes the hardware file whole or not at all.

    Raises:
        NeoccError: it cannot be written.
    """
    text = json.dumps(found.document(), indent=1) + "\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise NeoccError(f"cannot write {path}: {error.strerror}") from None
