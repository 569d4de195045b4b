"""Ring all-gather and reduce-scatter as one kernel each, of remote DMAs from memory to memory.

The steps are those of ``neocc.lower.collectives.rings``, in the same order of sums, so that the
results are equal; but a device launches one kernel in place of a permute a step, and the two ways
round go on at once by construction.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neocc.backends.tpu.blocks import (
    MEMORY,
    Combine,
    Matrix,
    as_matrices,
    fold,
    from_matrices,
    in_memory,
    matrix_of,
)
from neocc.backends.tpu.ring import Slots, enter, rounds, semaphores, ways_round
from neocc.lower.collectives.group import Group

GATHER, SCATTER = "neocc_ring_gather", "neocc_ring_scatter"  # as HLO has them


def gather_kernel(x: Any, out: Any, sent: Any, came: Any, own: Any, *, group: Group, ways: int):
    """x[...] to out[n, ...]. Each place of ``out`` is written once, so that no neighbour has to be
    waited for; but messages may come out of order, so each has semaphores of its own."""
    ring = enter(group)
    keep = pltpu.make_async_copy(x, out.at[ring.here], own)
    keep.start()
    started = []
    for t, running in rounds(ways_round(group.size, ways)):
        now = []
        for way in running:
            place = out.at[ring.place(-way.by * (t - 1))]  # whose it is
            w, s = way.number, t - 1
            copy = pltpu.make_async_remote_copy(
                x if t == 1 else place,
                place,
                sent.at[w, s],
                came.at[w, s],
                device_id=ring.device(way.by),
            )
            copy.start()
            now.append(copy)
        for copy in now:
            copy.wait_recv()
        started += now
    for copy in started:
        copy.wait_send()
    keep.wait()


def gather(x: Any, group: Group, ways: int, collective: int) -> Any:
    """[n, *x.shape]: the ``x`` of each device of the ring, in order. ``x`` has a dim at least;
    ``collective``: the number of the barrier that the ring's devices share."""
    shape = x.shape if x.ndim > 1 else (1, *x.shape)
    going = ways_round(group.size, ways)
    steps = pltpu.SemaphoreType.DMA((len(going), going[0].steps))
    out = pl.pallas_call(
        functools.partial(gather_kernel, group=group, ways=ways),
        out_shape=in_memory((group.size, *shape), x.dtype),
        in_specs=[MEMORY],
        out_specs=MEMORY,
        scratch_shapes=[steps, steps, pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(collective_id=collective, has_side_effects=True),
        name=GATHER,
    )(x.reshape(shape))
    return out.reshape(group.size, *x.shape)


def scatter_kernel(
    x: Any,
    out: Any,
    land: Any,
    sent: Any,
    came: Any,
    free: Any,
    *,
    group: Group,
    ways: int,
    combine: Combine,
    form: Matrix,
):
    """x[n, rows, columns] to out[rows, columns]. While one way's message is under way, the other
    way's is combined, in the slot where it came."""
    ring = enter(group)
    slots = Slots(ring, land, sent, came, free)
    going = ways_round(group.size, ways)
    for t, running in rounds(going):
        for way in running:
            mine = x.at[ring.place(way.by * (way.steps - t + 1))]
            if t == 1:
                slots.send(way, t, mine)
                continue
            slots.leave(way, t - 1)
            held = slots.receive(way, t - 1)
            fold(combine, held, [held, mine], form)
            slots.send(way, t)
    last = []
    for way in going:
        slots.leave(way, way.steps)
        last.append(slots.receive(way, way.steps))
    fold(combine, out, [last[0], x.at[ring.here], *last[1:]], form)


def scatter(x: Any, group: Group, ways: int, collective: int, combine: Combine = jnp.add) -> Any:
    """x[n, ...] to [...]: this device's piece, of all devices' combined."""
    shape = x.shape[1:]
    form = matrix_of(shape, x.dtype)
    out, _ = pl.pallas_call(
        functools.partial(scatter_kernel, group=group, ways=ways, combine=combine, form=form),
        # What is sent between devices lies in memory, which a kernel has as outputs.
        out_shape=[
            in_memory(form.shape, x.dtype),
            in_memory((len(ways_round(group.size, ways)), 2, *form.shape), x.dtype),
        ],
        in_specs=[MEMORY],
        out_specs=[MEMORY, MEMORY],
        scratch_shapes=semaphores(),
        compiler_params=pltpu.CompilerParams(collective_id=collective, has_side_effects=True),
        name=SCATTER,
    )(as_matrices(x, 1, form.shape))
    # libtpu 0.0.42 ends itself where it fuses what reads one of a kernel's several outputs into it.
    return from_matrices(jax.lax.optimization_barrier(out), 0, shape)
