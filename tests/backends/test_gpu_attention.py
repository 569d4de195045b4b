"""cuDNN's attention: what reaches it and comes back is what the op means; and that it compiles."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gpt
from neocc.backends import backend
from neocc.backends.gpu import attention
from neocc.backends.gpu.compile import PLUGINS
from neocc.backends.target import lower_for_target
from neocc.cost.hardware import chip
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.mesh import Mesh
from neocc.ir.ops import OPS, Context
from neocc.ir.program import Op, Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import differentiate
from neocc.passes.plan import make_plan


def reference(q, k, v, mask_type, scale, sliding_window_length):
    """[B, T, N, H] attention as cuDNN defines it, in f32, and its log-sum-exp [B, N, T]."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
    seen = j <= i if mask_type is attention.cudnn.MaskType.CAUSAL else j >= 0
    if sliding_window_length is not None:
        seen &= i - j < sliding_window_length
    s = jnp.where(seen, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jnp.exp(s - lse[..., None]), v), lse


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arithmetic of cuDNN's kernels, on any device; and which were asked for."""
    called = []

    def forward(q, k, v, qkv_layout, return_residual, **options):
        assert qkv_layout == "BTNH" and return_residual
        called.append("forward")
        out, lse = reference(q, k, v, **options)
        return out.astype(q.dtype), lse

    def backward(q, k, v, *others: Any, layout, mask_type, scale, sliding_window_length, **options):
        lse, out, dout = others[7:]
        assert layout == attention.cudnn.AttentionLayout.BTNH.value
        called.append("backward")
        made, vjp, kept = jax.vjp(
            lambda *x: reference(*x, mask_type, scale, sliding_window_length), q, k, v, has_aux=True
        )
        np.testing.assert_allclose(lse, kept, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(out.astype(jnp.float32), made, rtol=0.05, atol=0.05)
        return vjp(dout.astype(jnp.float32))

    monkeypatch.setattr(attention.cudnn, "dot_product_attention", forward)
    monkeypatch.setattr(attention, "bind_gradient", backward)
    return called


def program(causal: bool, window: int | None, group: int, dtype: str = "bf16") -> Program:
    d = {"batch": 2, "seq": 16, "memory": 16, "heads": 2, "group": group, "head_dim": 8}
    d = {name: Dim(name, size) for name, size in d.items()}
    g = Graph("attention")
    rows = [d[n] for n in ("batch", "seq", "heads", "group", "head_dim")]
    columns = [d[n] for n in ("batch", "memory", "heads", "head_dim")]
    q, k = g.parameter("q", rows, dtype), g.parameter("k", columns, dtype)
    v = g.parameter("v", columns[::-1], dtype)
    out, _ = b.fused_attention(q, k, v, "seq", "memory", "head_dim", causal, window, 0.4)
    return differentiate(g.build({"loss": (out.cast("f32") * q.cast("f32")).sum(*rows)}))


def ops_of(made: Program) -> list[Op]:
    return [op for op in made.body.ops if op.kind in attention.KERNELS]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (False, None)])
@pytest.mark.parametrize("group", [1, 3])
def test_the_kernels_compute_what_the_ops_mean(stand_in, rng, causal, window, group):
    values: dict[Any, Any] = {}
    ctx = Context(jnp)
    for op in ops_of(program(causal, window, group)):
        for value in op.operands:
            if value not in values:
                shape = [d.size for d in value.type.dims]
                made = jnp.asarray(rng.normal(size=shape), jnp.float32)
                values[value] = made.astype(jnp.bfloat16)
        operands = [values[value] for value in op.operands]
        meant = OPS[op.kind].evaluate(op, operands, ctx)
        found = attention.KERNELS[op.kind](op, operands, ctx)
        assert found is not None
        for x, y in zip(found, meant, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
            np.testing.assert_allclose(x, y, rtol=0.05, atol=0.06)
        values.update(zip(op.results, meant, strict=True))
    assert stand_in == ["forward", "backward"]


def test_what_cudnn_does_not_take_is_left_to_the_op(stand_in):
    whole = Context(jnp)
    cut = Context(jnp, block=lambda name, size: (size // 2, jnp.int32(0)))
    (op, _) = ops_of(program(True, None, 1))
    assert attention.takes(op, whole) and not attention.takes(op, cut)
    for other in (program(True, None, 1, "f32"), program(False, 5, 1)):
        assert attention.KERNELS["attention"](ops_of(other)[0], [None] * 3, whole) is None
    assert stand_in == []


@pytest.mark.slow
@pytest.mark.skipif(
    not any(importlib.util.find_spec(plugin) for plugin in PLUGINS),
    reason="JAX's CUDA plugin is not installed",
)
@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_a_step_with_cudnn_attention_compiles_for_gpus(name: str):
    small = replace(gpt.PRESETS["tiny"], embd=64, batch=8, vocab=100, dtype="bf16", layers=3)
    layout = "batch:x,heads:y,mlp:y,vocab:y"
    plan = make_plan(gpt.train_step(small), Mesh.parse("2x4"), chip(name), layout)
    own = backend("gpu")
    lowered = lower_for_target(plan, kernels=attention.KERNELS)
    text = own.compile(lowered.stage, own.compiler_options()).as_text()
    assert text is not None
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
