"""The accelerators that neocc knows: a checked-in table with its sources.

A *device* is what JAX presents as one: a chip, except on TPU v3 and TPU7x, where it is half of one
(``Chip.device`` says which). Every figure of a ``Chip`` is per device; the table in hardware.json
is per chip, as the vendors publish it.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal


class HardwareError(ValueError):
    """A chip, dtype or number of devices that the table cannot answer for."""


@dataclass(frozen=True, slots=True)
class Link:
    """One way out of a device: nominal bytes/s in one direction, the fraction of it that large
    transfers reach, and seconds a hop."""

    bandwidth: float
    efficiency: float
    latency: float

    @property
    def rate(self) -> float:
        """Bytes/s in one direction that a large transfer reaches."""
        return self.bandwidth * self.efficiency

    def shared_by(self, devices: int) -> Link:
        return Link(self.bandwidth / devices, self.efficiency, self.latency)


@dataclass(frozen=True, slots=True)
class Torus:
    """The wires between the chips of a TPU slice: one link each way along each axis.

    ``wrap_rule`` says which axes close to rings: ``axis``, those whose size is a multiple of
    ``wrap_multiple``; ``slice``, all of them where every size is one, else none.
    """

    max_shape: tuple[int, ...]  # chips, ascending
    wrap_rule: Literal["axis", "slice"]
    wrap_multiple: int
    link: Link

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of a slice of ``shape`` chips close to rings."""
        fits = tuple(size % self.wrap_multiple == 0 for size in shape)
        return fits if self.wrap_rule == "axis" else (all(fits),) * len(shape)


@dataclass(frozen=True, slots=True)
class Switch:
    """A group of ``size`` devices in which each reaches each other at its link's full rate."""

    size: int
    link: Link


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where a chip's fitted figures were measured: JAX's name of the devices, how many, the day."""

    device: str
    devices: int
    date: str

    def __str__(self) -> str:
        many = f"{self.devices} x " if self.devices > 1 else ""
        return f"calibrated on {many}{self.device}, {self.date}"


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """What shares a GPU's work: ``count`` of them, in clusters of ``cluster`` that share what they
    load; ``operand_bandwidth`` bytes/s from the L2 cache into all of them together; ``fill``
    seconds that a tile of a matrix product takes beside its FLOPs; ``exponentials`` a second that
    all of them compute, which bound attention."""

    count: int
    cluster: int
    operand_bandwidth: float
    fill: float
    exponentials: float


@dataclass(frozen=True, slots=True)
class Stream:
    """How a TPU reads what it multiplies by a few rows: bytes/s, and seconds until it has begun."""

    rate: float
    start: float


@dataclass(frozen=True, slots=True)
class Chip:
    """One device of an accelerator. Rates are dense peaks; see ``sources`` and ``assumptions``."""

    name: str
    title: str
    kind: str  # the backend that it is of: tpu, gpu, cpu, or another package's
    device: str  # what JAX presents as one device
    devices_per_chip: int
    peak_flops: Mapping[str, float] = field(hash=False)  # dtype of the operands -> FLOP/s
    matmul_tile: tuple[int, int, int]  # steps of (m, n, k) that the matrix unit works in
    matmul_efficiency: float  # fraction of the peak that a large product reaches
    hbm_bytes: int  # usable: what the TPU compiler allows a program to hold
    hbm_bandwidth: float  # bytes/s
    hbm_efficiency: float  # fraction of it that a large fusion reaches
    collective_overhead: float  # seconds to launch and to finish one collective
    torus: Torus | None  # TPU: between chips
    switch: Switch | None  # the NVLink domain; a TPU chip's two devices; a host's simulated ones
    network: Link  # beyond those: NIC of a GPU, data-centre network of a TPU
    host: Link | None  # to the memory of its host; None: not known
    sm: Multiprocessors | None  # GPU
    vector_clock: float | None  # TPU: cycles/s of all the vector units together
    cores: int  # TPU: that one device joins; each has a share of the vector units
    kernel_overhead: float  # seconds from the end of one kernel to the start of the next
    permutes_beside: bool  # its compiler was seen to run work between a permute's start and its end
    stream: Stream | None  # TPU
    sources: tuple[str, ...]
    assumptions: Mapping[str, str] = field(hash=False)  # field of the table -> why
    calibration: Calibration | None = None  # None: the table's own figures

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of a matrix product of operands of ``dtype`` (``bf16``, ``f32``, ...).

        Raises:
            HardwareError: the chip has no matrix rate for that dtype.
        """
        if dtype not in self.peak_flops:
            raise HardwareError(
                f"{self.name} has no matrix-product rate for {dtype!r}; it has "
                f"{', '.join(self.peak_flops)}: cast the operands to one of these"
            )
        return self.peak_flops[dtype]


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("neocc.cost").joinpath("hardware.json").read_text("utf-8"))


def chip_names() -> tuple[str, ...]:
    """Names of the chips in the table, in its order."""
    return tuple(_table()["chips"])


@cache
def chip(name: str) -> Chip:
    """The chip called ``name`` (``v5p``, ``h100``; ``a100`` is the 80 GB one).

    Raises:
        HardwareError: no such chip; names the nearest ones and all that are known.
    """
    known = known_name(name)
    return _chip(known, _table()["chips"][known])


def known_name(name: str) -> str:
    """The table's name of a chip, behind its aliases.

    Raises:
        HardwareError: as ``chip``.
    """
    table = _table()
    known = table["aliases"].get(name.lower(), name.lower())
    if known not in table["chips"]:
        near = difflib.get_close_matches(name.lower(), [*table["chips"], *table["aliases"]])
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise HardwareError(f"unknown chip {name!r}; {hint}known: {', '.join(table['chips'])}")
    return known


def table_row(name: str) -> dict[str, Any]:
    """A copy of a chip's row in hardware.json.

    Raises:
        HardwareError: as ``chip``.
    """
    return copy.deepcopy(_table()["chips"][known_name(name)])


def chip_of_row(name: str, row: Mapping[str, Any], calibration: Calibration | None = None) -> Chip:
    """The chip that a row in hardware.json's form describes.

    Raises:
        HardwareError: a field is missing or not of its type.
    """
    try:
        return replace(_chip(name, dict(row)), calibration=calibration)
    except KeyError as error:
        raise HardwareError(f"the row of {name} lacks the field {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise HardwareError(f"the row of {name} is not right: {error}") from None


def device_chip(device_kind: str) -> str:
    """The name of the chip that JAX calls ``device_kind`` (``NVIDIA H100 80GB HBM3``: h100).

    Raises:
        HardwareError: the table has no such device.
    """
    kinds = {kind.lower(): name for kind, name in _table()["device_kinds"].items()}
    if device_kind.lower() not in kinds:
        raise HardwareError(
            f"no chip of the table is a {device_kind!r}: say with --chip which one it is nearest"
            f" to ({', '.join(chip_names())}), or give --chip a file with a row of its own"
        )
    return kinds[device_kind.lower()]


def _chip(name: str, row: dict[str, Any]) -> Chip:
    devices = row["devices_per_chip"]
    torus = switch = None
    if "torus" in row:
        torus = Torus(
            max_shape=tuple(row["torus"]["max_shape"]),
            wrap_rule=row["torus"]["wrap"]["rule"],
            wrap_multiple=row["torus"]["wrap"]["multiple"],
            link=Link(**row["torus"]["link"]).shared_by(devices),
        )
    if "die" in row:
        switch = Switch(row["die"]["size"], Link(**row["die"]["link"]))
    if "host" in row:
        switch = Switch(row["host"]["size"], Link(**row["host"]["link"]))
    if "nvlink" in row:
        switch = Switch(row["nvlink"]["domain"], Link(**row["nvlink"]["link"]))
    m, n, k = row["matmul_tile"]
    return Chip(
        name=name,
        title=row["title"],
        kind=row["kind"],
        device=row["device"],
        devices_per_chip=devices,
        peak_flops={dtype: rate / devices for dtype, rate in row["peak_flops"].items()},
        matmul_tile=(m, n, k),
        matmul_efficiency=row["matmul_efficiency"],
        hbm_bytes=int(row["hbm_bytes_per_device"]),
        hbm_bandwidth=row["hbm_bandwidth"] / devices,
        hbm_efficiency=row["hbm_efficiency"],
        collective_overhead=row["collective_overhead"],
        torus=torus,
        switch=switch,
        network=Link(**row["network"]).shared_by(devices),
        host=Link(**row["host_memory"]).shared_by(devices) if "host_memory" in row else None,
        sm=Multiprocessors(**row["sm"]) if "sm" in row else None,
        vector_clock=row.get("vector_clock"),
        cores=row.get("cores", 1),
        kernel_overhead=row.get("kernel_overhead", 0.0),
        permutes_beside=row.get("permutes_beside", False),
        stream=Stream(**row["stream"]) if "stream" in row else None,
        sources=tuple(row["sources"]),
        assumptions=row["assumptions"],
    )
