"""The real GPU compiler, with no GPU: clusters to compile for, and how a process joins one.

JAX's CUDA plugin (extra ``gpu``) holds XLA's GPU compiler and cuDNN. It compiles for the GPUs of a
described cluster as for real ones, but for what it measures on a GPU where there is one: which of a
library's algorithms, and which tiles, are the fastest.
"""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from neocc.backends.base import BackendError, started
from neocc.backends.gpu.devices import DESCRIPTIONS
from neocc.cost.topology import Topology

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class GpuCompileError(BackendError):
    """The GPU compiler is missing, or knows no such GPU."""


def prepare() -> None:
    """Where there is no GPU, has JAX look for none: it would refuse to load the plugin, with its
    compiler, because there is no driver. Of use before JAX's first look at its devices."""
    if not glob.glob("/dev/nvidia[0-9]*") and not getattr(jax.config, "jax_platforms", None):
        jax.config.update("jax_platforms", "cpu")


def describe(laid: Topology) -> Sequence[Any]:
    """The GPUs of a cluster: as many nodes, each one NVLink domain, as the topology has.

    Raises:
        GpuCompileError: JAX's CUDA plugin is missing, or the GPU's description.
    """
    name = laid.chip.name
    if name not in DESCRIPTIONS:
        known = ", ".join(DESCRIPTIONS)
        raise GpuCompileError(f"{name} is no GPU that can be compiled for without it; {known} are")
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        raise GpuCompileError(
            "compiling for GPU needs JAX's CUDA plugin, which is not installed: "
            "pip install 'neocc[gpu]'"
        )
    prepare()
    text = DESCRIPTIONS[name].text()
    try:
        found = topologies.get_topology_desc(
            name, platform="cuda", target_config=text, topology=laid.name
        )
    except RuntimeError as error:  # JAX has none, or XLA refuses the description
        raise GpuCompileError(f"JAX describes no GPUs {name} {laid.name}: {error}") from error
    return found.devices


def start(count: int) -> list[Any]:
    """The cluster's GPUs, of all its hosts.

    Raises:
        BackendError: there are no GPUs here, or fewer than ``count``.
    """
    return started("cuda", count)
