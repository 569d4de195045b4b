"""Splash attention in place of the loop over tiles: the numbers of scores held whole."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest

from neocc.backends import chip
from neocc.backends.tpu import BACKEND
from neocc.backends.tpu.attention import SPLASH, refused
from neocc.ir.builder import Graph, fused_attention
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.lower.jax import lower
from neocc.passes.autodiff import gradients
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from tests.backends.tpu.interpreter import interpreted
from tests.numpy_executor import run_numpy

KERNEL = 'custom_call_target="tpu_custom_call"'


def program(
    seq: int, head_dim: int, window: int | None, scale: float, dtype: str, heads: int = 2
) -> Program:
    """q, k, v and the output's gradient -> output and the gradients of q, k and v."""
    rows = [Dim("batch", 2), Dim("heads", heads), Dim("seq", seq), Dim("head_dim", head_dim)]
    memory = Dim("memory", seq)
    columns = [memory if d.name == "seq" else d for d in rows]
    g = Graph("attention")
    q = g.parameter("q", rows, dtype)
    k, v = (g.parameter(n, columns, dtype) for n in "kv")
    out, _ = fused_attention(q, k, v, "seq", memory, "head_dim", True, window, scale)
    loss = (out * g.data("dout", rows, dtype)).cast("f32").sum(*rows)
    dq, dk, dv = gradients(loss, [q, k, v])
    return simplify(g.build({"out": out, "dq": dq, "dk": dk, "dv": dv}))


@pytest.mark.parametrize(("window", "scale", "head_dim"), [(None, 0.25, 32), (100, 1.0, 64)])
def test_forward_and_gradients_are_those_of_whole_scores(
    window: int | None, scale: float, head_dim: int
) -> None:
    """Causal; and as in GPT-Neo, in a window with the query in it and no scale."""
    step = program(256, head_dim, window, scale, "f32")
    rng = np.random.default_rng(0)
    inputs = {
        i.name: rng.normal(size=v.type.shape).astype(np.float32) * 0.3
        for i, v in zip(step.inputs, step.body.args, strict=True)
    }
    right = run_numpy(step, inputs)
    plan = make_plan(step, Mesh.parse("2"), chip("v5e"), layout="batch:x")
    with interpreted():
        lowered = lower(plan.partitioned, kernels=SPLASH)
        found = jax.device_get(lowered(inputs))
    for name, array in right.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("name", "mesh", "layout"),
    [("v5e", "2x4", "batch:x,heads:y"), ("v5p", "2x2x2", "batch:x,heads:y,heads:z")],
)
def test_compiles_for_a_slice(name: str, mesh: str, layout: str) -> None:
    step = program(1024, 64, 256, 1.0, "bf16", 4)
    plan = make_plan(step, Mesh.parse(mesh), chip(name), layout=layout)
    own = jax.sharding.Mesh(BACKEND.devices(plan.topology), plan.mesh.names)
    lowered = lower(plan.partitioned, own, kernels=SPLASH)
    text = BACKEND.compile(lowered.stage, {}).as_text() or ""
    assert text.count(KERNEL) == 3  # forward; dq; dk and dv


def test_what_splash_attention_does_not_take_is_told() -> None:
    (op,) = (o for o in program(200, 32, None, 1.0, "f32").body.walk() if o.kind == "attention")
    assert "200 queries and 200 keys are not whole tiles" in str(refused(op, False))
    assert "cut over devices" in str(refused(op, True))
