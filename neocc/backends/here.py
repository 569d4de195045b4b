"""Devices that are here, for a plan to run on: a simulated mesh, or the chips it is made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from neocc.backends import backend
from neocc.backends.base import Backend
from neocc.backends.cpu.host import host_devices
from neocc.cost.hardware import Chip
from neocc.cost.topology import Topology, topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.lower.jax import Lowered, jax_mesh, lower
from neocc.passes.partition import Partitioned
from neocc.passes.plan import Plan

SIMULATED, TARGET = "simulated", "target"


@dataclass(frozen=True)
class Here:
    """``devices`` of a backend, at least as many as the mesh has. ``placed``: they are the plan's
    chips, and each takes the place that the plan's topology gives it; else they stand in for them,
    in order."""

    backend: Backend
    devices: Sequence[Any]
    placed: bool = False

    @property
    def kind(self) -> str:
        """What JAX calls one, or that it is simulated."""
        return self.devices[0].device_kind if self.placed else SIMULATED

    def topology(self, chip: Chip, mesh: Mesh) -> Topology | None:
        """How a mesh lies on the slice that these devices are; None where no slice is given."""
        shape = self.backend.slice_shape(self.devices) if self.placed else None
        return topology(chip, mesh.sizes, shape) if shape else None

    def mesh(self, plan: Plan) -> jax.sharding.Mesh:
        """The plan's mesh of these devices.

        Raises:
            NeoccError: there are too few, or some place of the plan's topology has none.
        """
        if not self.placed:
            return jax_mesh(plan.mesh, self.devices)
        placed = self.backend.placed(plan.topology, self.devices)
        return jax.sharding.Mesh(placed, plan.mesh.names)

    def lower(self, partitioned: Partitioned, mesh: jax.sharding.Mesh) -> Lowered:
        """With the backend's own kernels and forms of collectives, as a plan is audited."""
        own = self.backend
        return lower(partitioned, mesh, kernels=own.kernels, forms=own.forms)

    def compile(self, lowered: Lowered) -> jax.stages.Compiled:
        """Under the backend's options.

        Raises:
            BackendError: the compiler rejects the program.
        """
        return self.backend.compile(lowered.stage, self.backend.compiler_options())


def here(which: str, chip: Chip, count: int) -> Here:
    """At least ``count`` devices: ``simulated`` by this machine's processor, or those of the
    ``target``, of all hosts of a cluster that has started this process.

    Raises:
        NeoccError: there are none such, or too few.
    """
    if which == SIMULATED:
        return Here(backend("cpu"), host_devices(count))
    if which != TARGET:
        raise NeoccError(f"devices are {SIMULATED} or {TARGET}, not {which!r}")
    own = backend(chip.kind)
    return Here(own, own.start(count), placed=True)


def present() -> Here:
    """JAX's devices of this process, in order."""
    return Here(backend("cpu"), jax.devices())
