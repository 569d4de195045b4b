"""The real TPU compiler, with no TPU: topologies to compile for, and what compiling gives.

libtpu (extra ``tpu``) holds the whole compiler and descriptions of every TPU generation. JAX
compiles for the devices of a described slice as for real ones; only running needs the chips.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from neocc.backends import base
from neocc.backends.base import BackendError, Options, Place, in_mesh_order, started
from neocc.cost.hardware import chip as chip_named
from neocc.cost.hardware import device_chip
from neocc.cost.topology import Topology, topology

ONE_FOR_ONE: Mapping[str, Any] = MappingProxyType(
    {
        # Else all-reduces of one group and reduction become one instruction with several operands.
        "xla_jf_crs_combiner_threshold_count": 1,
        # Else small reduce-scatters along the minor dim become an all-reduce and a slice.
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 0,
    }
)
"""Compiler options under which more of a program's collectives come out one for one. They cost
speed (combining saves launches): for looking, not for running. docs/compiler-behaviour.md lists
what they cannot switch off."""


class TpuCompileError(BackendError):
    """The TPU compiler is missing, knows no such slice, or rejects the program."""


def prepare_environment() -> None:
    """Sets what libtpu reads from the environment when it is loaded; the only place that does.

    On a machine with a TPU nothing is set: there libtpu serves the chips. Elsewhere, each unless
    the user has set it:

    - ``TPU_SKIP_MDS_QUERY``: do not ask the cloud's metadata server which machine this is (it
      would be waited for, on a machine that has none);
    - ``TPU_ACCELERATOR_TYPE``, ``TPU_WORKER_HOSTNAMES``: the answers it would give. They do not
      matter for a described slice, but without them libtpu warns on each start;
    - ``ALLOW_MULTIPLE_LIBTPU_LOAD``: libtpu takes a lock on the machine's chips; without chips two
      compilers can run side by side.
    """
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def tpu_topology(chip: str, mesh_sizes: tuple[int, ...]) -> tuple[str, np.ndarray]:
    """``tpu_devices`` of the cost model's default mapping (``neocc.cost.topology.topology``)."""
    return tpu_devices(topology(chip_named(chip), tuple(mesh_sizes)))


def tpu_devices(laid: Topology) -> tuple[str, np.ndarray]:
    """A described slice for a mesh, and its devices in mesh order: its name (``v5p:4x4x8``) and an
    array of JAX devices shaped as the mesh. Raises as ``describe``."""
    return laid.name, in_mesh_order(laid, places(laid, describe(laid)))


def describe(laid: Topology) -> Sequence[Any]:
    """The devices of the slice that a topology names.

    A device is what JAX makes of the chip. On v3 and TPU7x that is one of two per chip, so a mesh
    of 128 takes 64 chips. v4's two cores are joined to one device ("megacore"), as they are in
    use; libtpu would describe them apart if not asked.

    Raises:
        TpuCompileError: libtpu is missing, the chip is no TPU, or the mesh needs several slices.
    """
    described, mesh_sizes = laid.chip, laid.mesh_sizes
    if described.kind != "tpu":
        name = described.name
        raise TpuCompileError(f"{name} is not a TPU: compile for it with the backend of its kind")
    shape = laid.torus_shape
    if laid.shape[0] > 1:
        sizes = "x".join(map(str, mesh_sizes))
        raise TpuCompileError(
            f"mesh {sizes} needs {laid.shape[0]} slices of {described.name}, which cannot be"
            " compiled for without the machines: choose a mesh of one slice"
        )
    _require_libtpu()
    prepare_environment()
    # A slice is made of hosts of 2x2 chips; ones too thin for that have smaller hosts.
    host = [2 if size % 2 == 0 else 1 for size in shape[:2]]
    options: dict[str, Any] = {"chips_per_host_bounds": (*host, 1)}
    if described.name == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology_name=laid.name, platform="tpu", **options)
    except Exception as error:  # libtpu reports through several types
        raise TpuCompileError(f"libtpu describes no slice {laid.name}: {error}") from error
    return found.devices


def places(laid: Topology, devices: Sequence[Any]) -> dict[Place, Any]:
    """Devices by (slice, coordinates in its torus, core)."""
    rank = len(laid.torus_shape)
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    return {
        (slices.index(getattr(d, "slice_index", 0)), *d.coords[:rank], d.core_on_chip): d
        for d in devices
    }


def slice_shape(devices: Sequence[Any]) -> tuple[int, ...] | None:
    """Chips along each axis of the slice that these devices are all of; None of simulated ones."""
    if devices[0].platform != "tpu":
        return None
    shape = tuple(int(n) + 1 for n in np.max([device.coords for device in devices], axis=0))
    torus = chip_named(device_chip(devices[0].device_kind)).torus
    return shape[: len(torus.max_shape)] if torus else shape


def start(count: int) -> list[Any]:
    """The slice's devices, of all its hosts.

    Raises:
        BackendError: there are no TPUs here, or fewer than ``count``.
    """
    prepare_environment()
    return started("tpu", count)


def compile_for_tpu(
    function: Any,
    args: Sequence[Any],
    *,
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles a jitted function for the slice that its arguments' shardings lie on.

    Args:
        function: what ``jax.jit`` returned.
        args: pytrees of ``jax.ShapeDtypeStruct`` with shardings over ``tpu_topology``'s devices.
        compiler_options: XLA options for this compile, e.g. ``ONE_FOR_ONE``.

    Raises:
        TpuCompileError: libtpu is missing, does not know an option, or finds that the program does
            not fit into HBM.
    """
    return compile_lowered(function.lower(*args), compiler_options or {})


def compile_lowered(lowered: jax.stages.Lowered, options: Options) -> jax.stages.Compiled:
    """Compiles what was lowered for the devices of a described slice. Raises as the above."""
    _require_libtpu()
    prepare_environment()
    try:
        return base.compile_lowered(lowered, options)
    except BackendError as error:
        if "RESOURCE_EXHAUSTED" in (message := str(error)):
            # libtpu calls the whole sum, arguments and outputs included, "HLO temporaries".
            found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message)
            figures = f"needs {found[1]} of {found[2]} HBM a device" if found else message
            raise TpuCompileError(
                f"the program does not fit: {figures}. Use more devices, a smaller batch, or"
                " recompute more"
            ) from error
        raise TpuCompileError(message) from error


def _require_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise TpuCompileError(
            "compiling for TPU needs libtpu, which is not installed: pip install 'neocc[tpu]'"
        )
