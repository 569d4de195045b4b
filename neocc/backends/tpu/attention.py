"""Fused attention by JAX's splash attention kernels, in place of neocc's loop over tiles.

``SPLASH`` has the kernels of ``attention`` and ``attention_grad`` for ``neocc.lower``. Scores stay
on chip, and tiles that a mask hides are skipped. The scale goes into q. A head's size that is not
whole lanes is padded. What they do not take (``refused``) runs as the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from neocc.backends.tpu.blocks import LANES, round_up
from neocc.cost.attention_kernels import KERNELS, splash_refused, splash_tiles
from neocc.ir.mesh import Mesh
from neocc.ir.ops.attention import folded, prepared, unfolded
from neocc.ir.ops.attention_tiles import merged
from neocc.ir.ops.base import Context
from neocc.ir.program import Op, Value
from neocc.lower.jax import Kernel
from neocc.lower.kernels import Call


def refused(op: Op, cut: bool) -> str | None:
    """Why an op is none of splash attention's, if so. ``cut``: its queries are, over devices."""
    return "the queries are cut over devices, whose masks differ" if cut else splash_refused(op)


def kernel_of(op: Op, heads: int, seq: int) -> Any:
    """Splash attention of so many heads of queries; those that share their keys lie together."""
    memory = op.operands[1].type.dim(op.attrs["memory"]).size
    window, causal = op.attrs.get("window"), op.attrs["causal"]
    shape = (seq, memory)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    rows, columns, _ = splash_tiles(op)
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
    )


def whole_lanes(x: Any) -> Any:
    more = round_up(x.shape[-1], LANES) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def taken(op: Op, args: list[Any], ctx: Context) -> Any:
    """Folds, local sizes, whether it is taken."""
    folds, local, kernel, _ = prepared(op, args, ctx)
    reason = refused(op, not isinstance(kernel.start, int))
    return None if reason else (folds, local, kernel)


def attention(op: Op, args: list[Any], ctx: Context) -> list[Any] | None:
    found = taken(op, args, ctx)
    if found is None:
        return None
    folds, local, kernel = found
    forms = (folds.rows, folds.columns, folds.columns)
    q, k, v = (
        whole_lanes(folded(x, o.type.names, form, ctx))
        for x, o, form in zip(args, op.operands, forms, strict=True)
    )
    n, group = q.shape[:2]
    run = kernel_of(op, n * group, local[op.attrs["seq"]])
    out, (lse,) = run(merged(q * jnp.asarray(kernel.scale, q.dtype), 0), k, v)
    out = out[..., : local[op.attrs["head_dim"]]]
    made = (x.reshape(n, group, *x.shape[1:]) for x in (out, lse))
    return [
        unfolded(x, form, r.type, local, ctx)
        for x, form, r in zip(made, (folds.rows, folds.stats), op.results, strict=True)
    ]


def attention_grad(op: Op, args: list[Any], ctx: Context) -> list[Any] | None:
    found = taken(op, args, ctx)
    if found is None:
        return None
    folds, local, kernel = found
    rows, columns = folds.rows, folds.columns
    forms = (rows, columns, columns, rows, folds.stats, rows)
    q, k, v, out, lse, dout = (
        folded(x, o.type.names, form, ctx)
        for x, o, form in zip(args, op.operands, forms, strict=True)
    )
    q, k, v, out, dout = (whole_lanes(x) for x in (q, k, v, out, dout))
    n, group = q.shape[:2]
    run = kernel_of(op, n * group, local[op.attrs["seq"]])
    static = {"attn_logits_soft_cap": None, "interpret": False} | dict(run.kwargs)
    q = q * jnp.asarray(kernel.scale, q.dtype)
    q, out, lse, dout = (merged(x, 0) for x in (q, out, lse, dout.astype(q.dtype)))
    saved = (q, k, v, None, None, out, lse, run.dq_mask_info, run.dkv_mask_info)
    dq, dk, dv = splash._splash_attention_bwd(**static, res=saved, do=dout)[3:6]
    dq = dq.reshape(n, group, *dq.shape[1:])
    dq = dq * jnp.asarray(kernel.scale, dq.dtype)
    size = local[op.attrs["head_dim"]]
    return [
        unfolded(g[..., :size], form, r.type, local, ctx)
        for g, form, r in zip((dq, dk, dv), forms, op.results, strict=False)
    ]


SPLASH: Mapping[str, Kernel] = MappingProxyType(
    {"attention": attention, "attention_grad": attention_grad}
)

NAMES = {
    "attention": ("splash_mha_fwd_residuals",),
    "attention_grad": ("splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals"),
}
"""The kernels of each op, as HLO has them."""


def calls(op: Op, mesh: Mesh) -> list[Call]:
    """The kernels that fused attention of a plan runs as."""
    if op.attrs.get("kernel") != "splash":
        return []
    own, strategy = KERNELS["splash"], op.attrs["strategy"]

    def parts(dim: str) -> int:
        return strategy.parts(dim, mesh)

    def size(v: Value) -> int:
        """Bytes with each head's elements as whole lanes."""
        shape = ((d.size // parts(d.name), d.name == op.attrs["head_dim"]) for d in v.type.dims)
        whole = (round_up(n, LANES) if head else n for n, head in shape)
        return math.prod(whole) * v.type.itemsize

    flops = own.flops(op, parts) // own.products[op.kind]
    q, k, v = map(size, op.operands[:3])
    names = NAMES[op.kind]
    if op.kind == "attention":
        return [Call(names[0], (q, k, v), (q,), flops=2 * flops, others=True)]
    return [
        Call(names[0], (q, k, v, q), (q,), flops=3 * flops, others=True),
        Call(names[1], (q, k, v, q), (k, v), flops=4 * flops, others=True),
    ]
