"""A program's parameters and state on a mesh, out of a checkpoint and into one.

A checkpoint has no padding and knows no mesh: what one mesh saved, any other restores, each device
reading the block that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neocc.ir.program import Program
from neocc.ir.types import DTYPES, TensorType
from neocc.lower.jax import Lowered
from neocc.runtime.checkpoint import Checkpoint, ModelOf, whole, write_checkpoint
from neocc.runtime.safetensors import Planned, Stored


def restore(
    saved: Checkpoint, source: Program, lowered: Lowered, names: Iterable[str]
) -> dict[str, jax.Array]:
    """The inputs ``names`` of a lowered program from a checkpoint, in the program's dtypes, with
    zeros in their padding. ``source``: the program as it was before it was padded.

    Raises:
        CheckpointError: a tensor is not there, or is another one; by its name.
    """
    plain = {i.name: v.type for i, v in source.named_inputs}
    program = lowered.partitioned.program
    wanted = set(names)
    found = {}
    for (info, value), sharding in zip(program.named_inputs, lowered.in_shardings, strict=True):
        if info.name in wanted:
            stored = saved.find(info.name, plain[info.name])
            found[info.name] = placed(stored, value.type, sharding)
    return found


def placed(stored: Stored, type: TensorType, sharding: Any) -> jax.Array:
    """A tensor on a mesh, grown to ``type``; each device has memory of its own."""
    mapped, dtype = stored.mapped(), DTYPES[type.dtype]

    def block(index: tuple[slice, ...]) -> np.ndarray:
        spans = [s.indices(n) for s, n in zip(index, type.shape, strict=True)]
        made = np.zeros([stop - start for start, stop, _ in spans], dtype)
        there = [slice(a, min(b, n)) for (a, b, _), n in zip(spans, stored.shape, strict=True)]
        if all(s.start < s.stop for s in there):
            part = mapped[tuple(there)]
            made[tuple(slice(0, n) for n in part.shape)] = part
        return made

    blocks = sharding.addressable_devices_indices_map(type.shape)
    # A processor's device would take numpy's own memory; a step overwrites what it is given.
    arrays = [jax.device_put(block(i), d, may_alias=False) for d, i in blocks.items()]
    return jax.make_array_from_single_device_arrays(type.shape, sharding, arrays)


def fetched(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array, also of one that lies on other processes' devices too."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def save(
    path: Path, model: ModelOf, source: Program, state: Mapping[str, jax.Array], step: int
) -> None:
    """Writes parameters and state, without their padding, as the checkpoint ``path``; where a
    cluster runs the step, all its processes call this and the first one writes.

    Raises:
        CheckpointError: ``path`` is there already, or cannot be written.
    """
    types = {i.name: v.type for i, v in source.named_inputs if i.name in state}
    tensors = [Planned(n, DTYPES[t.dtype], t.shape) for n, t in types.items()]
    dims = {n: [(d.name, d.size) for d in t.dims] for n, t in types.items()}

    def produce(tensor: Planned) -> Iterator[np.ndarray]:
        array = state[tensor.name]
        inside = tuple(slice(0, n) for n in tensor.shape)
        if not tensor.shape:
            yield fetched(array)
            return
        # Row by row: a stack of layers is never on the host as a whole.
        for row in range(tensor.shape[0] if array.ndim > 2 else 1):
            at = slice(row, row + 1) if array.ndim > 2 else inside[0]
            yield fetched(array[(at, *inside[1:])])

    if jax.process_index():  # takes its part in fetching; the first process writes
        for tensor in tensors:
            for _ in produce(tensor):
                pass
        return
    with whole(path) as folder:
        write_checkpoint(folder, model, step, tensors, dims, produce)
