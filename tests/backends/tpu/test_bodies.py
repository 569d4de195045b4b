"""What kernels send, read off their bodies, which JAX makes with no TPU or its compiler."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from neocc.backends.tpu import rings
from neocc.backends.tpu.blocks import MEMORY, in_memory
from neocc.backends.tpu.bodies import sent
from neocc.cost.algorithms import FORMULAS
from neocc.ir.mesh import Mesh
from neocc.lower.collectives import axis_groups
from neocc.lower.hlo import Message
from neocc.lower.hlo_text import HloError
from neocc.lower.kernels import messages
from tests.backends.tpu.interpreter import as_v5e


def body(f: Any, mesh: Mesh, *shapes: tuple[int, ...]) -> str:
    """Of the one kernel of ``f``, traced for TPUs on devices of this process."""
    devices = np.array(jax.devices()[: mesh.size]).reshape(mesh.sizes)
    own = jax.sharding.Mesh(devices, mesh.names)
    mapped = jax.shard_map(f, mesh=own, in_specs=P(), out_specs=P(), check_vma=False)
    traced = jax.jit(mapped).trace(*(jax.ShapeDtypeStruct(s, "bfloat16") for s in shapes))
    with as_v5e():
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    (found,) = re.findall(r"\\22body\\22: ?\\22([^\\]*)\\22", text)
    return found


@pytest.mark.parametrize(("text", "axis"), [("8", "x"), ("5", "x"), ("2x4", "x"), ("2x4", "y")])
@pytest.mark.parametrize("ways", [1, 2])
def test_every_message_of_a_ring_is_read_with_its_devices(text: str, axis: str, ways: int) -> None:
    mesh = Mesh.parse(text)
    n = mesh.sizes[mesh.index(axis)]
    (group,) = axis_groups(axis, (n,))
    name = "ring" if ways == 1 else "ring2"

    def wanted(kind: str) -> Counter[Message]:
        rounds = FORMULAS[kind, name].rounds(n * 16 * 256, 2, (n,))
        return Counter(messages(rounds, (n,), mesh, axis))

    gather = body(lambda x: rings.gather(x, group, ways, 0), mesh, (16, 256))
    assert Counter(sent(gather, mesh.size)) == wanted("all_gather")
    scatter = body(lambda x: rings.scatter(x, group, ways, 0), mesh, (n, 16, 256))
    assert Counter(sent(scatter, mesh.size)) == wanted("reduce_scatter")


def test_a_message_in_a_loop_is_not_taken_for_one() -> None:
    def sending(x: Any, out: Any, left: Any, came: Any) -> None:
        target = lax.rem(lax.axis_index("x") + 1, 4)

        def send(_: Any, nothing: Any) -> Any:
            pltpu.make_async_remote_copy(x, out, left, came, device_id={"x": target}).start()
            return nothing

        lax.fori_loop(0, target, send, None)

    def f(x: Any) -> Any:
        return pl.pallas_call(
            sending,
            out_shape=in_memory(x.shape, x.dtype),
            in_specs=[MEMORY],
            out_specs=MEMORY,
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
        )(x)

    looping = body(f, Mesh.parse("4"), (16, 256))
    with pytest.raises(HloError, match="sends in a loop or branch"):
        sent(looping, 4)
