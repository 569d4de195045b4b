"""Kernels under Pallas' TPU interpreter: devices, memories, DMAs and semaphores simulated.

Each device's thread waits in a callback for the others; arrays of more than some 100 KB come to it
through XLA's threads, of which there must be more than devices (``NPROC``, in tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax._src.pallas.mosaic import tpu_info
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from tests.lower.collectives.devices import NAMES, QUICK

Mode = Literal["eager", "on_wait"]


@contextlib.contextmanager
def as_v5e() -> Iterator[None]:
    """Kernels' pipelines ask what chip they run on, which is the processor."""
    tpu_info.registry["cpu"] = lambda: pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
    try:
        yield
    finally:
        del tpu_info.registry["cpu"]


@contextlib.contextmanager
def interpreted(mode: Mode = "on_wait") -> Iterator[Callable[[], bool]]:
    """Runs the kernels that are traced inside as a v5e would. Gives whether a race was seen.

    ``mode``: when a DMA moves its bytes, at once or as late as it may.
    """
    params = pltpu.InterpretParams(
        detect_races=True,
        dma_execution_mode=mode,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    try:
        with as_v5e(), pltpu.force_tpu_interpret_mode(params):
            yield lambda: state.races is not None and state.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def mesh_of(sizes: Sequence[int]) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return jax.sharding.Mesh(devices, NAMES[: len(sizes)])


def on_mesh(f: Callable[..., Any], sizes: Sequence[int]) -> Callable[..., Any]:
    """``f`` of each device's arrays and results (a tuple) as a function of arrays with the devices
    in front."""
    mesh = mesh_of(sizes)
    spec = P(mesh.axis_names)

    def body(*blocks: Any) -> Any:
        return tuple(out[None] for out in f(*(x[0] for x in blocks)))

    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped, compiler_options=QUICK)
