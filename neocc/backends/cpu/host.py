"""Host devices: JAX can present one processor as any number of devices."""

from __future__ import annotations

import math
from typing import Any

import jax

from neocc.cost.topology import Topology
from neocc.ir.errors import NeoccError


def host_devices(count: int) -> list[Any]:
    """``count`` CPU devices of this process, to simulate a mesh with.

    JAX fixes their number when its backend starts, which the first array or ``jax.devices()``
    does: call this before. A backend that has started already will do if it has enough.

    Raises:
        NeoccError: JAX has started with fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")  # look for no accelerator
    except RuntimeError:
        pass  # started already: what counts is what there is now
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise NeoccError(
            f"a mesh of {count} simulated devices: JAX has already started with {len(devices)}. "
            "Ask for them before anything uses JAX, in a process of its own, or start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def described_hosts(laid: Topology) -> list[Any]:
    """Simulated devices for every place of a topology. Raises as ``host_devices``."""
    return host_devices(math.prod(laid.shape))
