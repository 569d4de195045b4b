"""What a backend is: the one interface between neocc and a kind of device.

Physical topology is data: a chip's row in the hardware table has its torus and wrap rule, its
NVLink domain, its network, and the cost model lays mesh axes on those (``neocc.cost.topology``). A
backend finds the devices that lie there, described or real, and compiles for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from neocc.cost.topology import Topology
from neocc.ir.errors import NeoccError
from neocc.lower.collectives import Algorithm
from neocc.lower.hlo import HloFacts, read_hlo
from neocc.lower.jax import Kernel
from neocc.lower.kernels import Calls

Place = tuple[int, ...]  # coordinates in ``Topology.shape``
Options = Mapping[str, Any]


class BackendError(NeoccError):
    """A compiler is missing, knows no such devices, or rejects the program."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the compiler that every program of a backend is compiled with, and why."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """HBM of one device, in bytes, as the compiler laid it out; tiling and padding included."""

    argument: int
    output: int
    alias: int
    """Output that reuses a donated argument's buffer: in both of the figures above."""
    temp: int
    """The block for everything else, at its fullest; reserved as one piece for the whole call."""
    live: int
    """Bytes in use at the fullest moment, XLA's ``peak_memory_in_bytes``: without the gaps that
    the block for temporaries has."""
    code: int
    """The program itself. It lies in HBM too, but is not in ``peak``: the compiler's own figures
    (``peak_memory_in_bytes``, its out-of-memory check) leave it out as well."""

    @property
    def peak(self) -> int:
        """``argument + output - alias + temp``: the HBM that one call needs.

        This is the sum that the TPU compiler holds against the device's HBM (by experiment:
        programs just over it are refused with this figure). XLA's ``peak_memory_in_bytes`` is
        another thing: on small programs it also counts buffers in on-chip memory (56 MiB where 24
        MiB of HBM were in use on v5e), and it leaves out what ``temp`` holds reserved while it is
        empty.
        """
        return self.argument + self.output - self.alias + self.temp


def memory_facts(compiled: jax.stages.Compiled) -> MemoryFacts:
    """What one device holds when it runs ``compiled``.

    Raises:
        BackendError: the compiler gives no memory figures.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise BackendError("this backend gives no memory figures for a compiled program")
    return MemoryFacts(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temp=stats.temp_size_in_bytes,
        live=stats.peak_memory_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def compile_lowered(lowered: jax.stages.Lowered, options: Options) -> jax.stages.Compiled:
    """Compiles for the devices that it was lowered for, which need not be here.

    Raises:
        BackendError: the compiler does not know an option, or rejects the program.
    """
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        raise BackendError(f"the compiler rejects the program: {error}") from error


def places_by_process(laid: Topology, devices: Sequence[Any]) -> dict[Place, Any]:
    """Devices by (node, number in it): the processes' devices in order, as many to a node as the
    topology has. A process may have those of one host, of part of a node, or, of a simulated mesh,
    of several nodes."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return {divmod(i, laid.shape[-1]): device for i, device in enumerate(ordered)}


def in_mesh_order(laid: Topology, found: Mapping[Place, Any]) -> np.ndarray:
    """Devices by their places as an array shaped as the mesh, each where the topology has it.

    Raises:
        BackendError: some place of the topology has no device.
    """
    coordinates = laid.coordinates()
    made = np.empty(laid.mesh_sizes, dtype=object)
    for index in np.ndindex(*laid.mesh_sizes):
        place = tuple(coordinates[index].tolist())
        if place not in found:
            raise BackendError(
                f"{laid.name} has a device at {place}, and JAX's {len(found)} devices have none:"
                " give a --mesh of whole nodes or of the whole slice"
            )
        made[index] = found[place]
    return made


def started(platform: str, count: int) -> list[Any]:
    """The devices of an accelerator: of all hosts, where a cluster that JAX knows (Slurm, Open MPI,
    Kubernetes, Cloud TPU) has started a process on each.

    Raises:
        BackendError: there are none, or fewer than ``count``.
    """
    if not jax.distributed.is_initialized():
        # No cluster: one process. JAX has started before this: it is taken as it is.
        with contextlib.suppress(ValueError, RuntimeError):
            jax.distributed.initialize()
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise BackendError(f"JAX finds no {platform} here: {error}") from error
    if len(devices) < count:
        raise BackendError(f"a mesh of {count} devices, and JAX has {len(devices)} of {platform}")
    return devices


@dataclass(frozen=True)
class Backend:
    """A kind of device: what neocc has to know of it and to do with it.

    kind: the ``kind`` of its chips' rows in a hardware table.
    describe: JAX devices of the slice or cluster that a topology names, in any order, without the
        hardware; raises BackendError where they cannot be described.
    start: makes the process's devices ready, at least so many, and gives them.
    rows: chips of its own, beside neocc's table, by name: rows in the form of
        ``neocc/cost/hardware.json``. device_kinds: what JAX calls devices of its own chips.
    places: where devices that JAX has lie in a topology.
    slice_shape: chips along each axis of the slice that devices are all of; None if there is none.
    options: of the compiler, each with its reason.
    compile, memory, read: a lowered program, what a compiled one holds, and what its HLO does.
    kernels: how it computes an op of the IR itself, in place of the op's own meaning in JAX, by
        kind; or, ``attention=splash``, where a plan has that kernel run it.
    forms: its own forms of algorithms for collectives, by kind and name, in place of those made of
        permutes.
    calls: the kernels that ops of a partitioned program run as, for the audit.
    """

    kind: str
    describe: Callable[[Topology], Sequence[Any]]
    start: Callable[[int], list[Any]]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    device_kinds: Mapping[str, str] = field(default_factory=dict)
    places: Callable[[Topology, Sequence[Any]], dict[Place, Any]] = places_by_process
    slice_shape: Callable[[Sequence[Any]], tuple[int, ...] | None] = lambda devices: None
    options: tuple[Option, ...] = ()
    compile: Callable[[jax.stages.Lowered, Options], jax.stages.Compiled] = compile_lowered
    memory: Callable[[jax.stages.Compiled], MemoryFacts] = memory_facts
    read: Callable[[str], HloFacts] = read_hlo
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    forms: Mapping[tuple[str, str], Algorithm] = field(default_factory=dict)
    calls: Calls = lambda op, mesh: ()

    def devices(self, laid: Topology) -> np.ndarray:
        """The described devices of a topology in mesh order: an array shaped as the mesh, so that
        a program is compiled for the wires that its plan was costed on.

        Raises:
            BackendError: they cannot be described.
        """
        return self.placed(laid, self.describe(laid))

    def placed(self, laid: Topology, devices: Sequence[Any]) -> np.ndarray:
        """Devices in mesh order, each where the topology has it: an array shaped as the mesh.

        Raises:
            BackendError: some place of the topology has no device.
        """
        return in_mesh_order(laid, self.places(laid, devices))

    def compiler_options(self, more: Options | None = None) -> dict[str, Any]:
        """The backend's own options, and ``more`` in place of them or beside them."""
        return {option.name: option.value for option in self.options} | dict(more or {})
