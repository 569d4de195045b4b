"""Fused attention on GPU: cuDNN's kernels, as JAX binds them.

They take bf16 and f16, heads of up to 128 elements, and queries that are all on the device, as many
as keys where the mask is causal: of a cut sequence each part would need another mask. What they do
not take is left to the op's own meaning (``neocc.ir.ops.attention``).

JAX's public function rounds the log-sum-exp to the operands' dtype, and has no gradient apart from
its forward pass; so the primitives are used themselves (jax is pinned to one version).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from neocc.cost.attention_kernels import KERNELS as PLANNED
from neocc.cost.attention_kernels import cudnn_refused
from neocc.ir.mesh import Mesh
from neocc.ir.ops.attention import folded, roles, unfolded
from neocc.ir.ops.base import Context
from neocc.ir.program import Op
from neocc.lower.jax import Kernel
from neocc.lower.kernels import Call

LAYOUT = "BTNH"


def takes(op: Op, ctx: Context) -> bool:
    """Whether cuDNN has a kernel for an op as it is cut."""
    seq = op.attrs["seq"]
    _, start = ctx.block(seq, op.operands[0].type.dim(seq).size)
    return isinstance(start, int) and cudnn_refused(op) is None


def options(op: Op) -> dict[str, Any]:
    mask = cudnn.MaskType.CAUSAL if op.attrs["causal"] else cudnn.MaskType.NO_MASK
    window = op.attrs.get("window")
    return {"scale": float(op.attrs["scale"]), "mask_type": mask, "sliding_window_length": window}


def forms(op: Op) -> tuple[Any, Any, Any]:
    """How q, lse and k become arrays [B, T, N, H], [B, N, T] and [B, S, N, H]: heads are the last
    of the dims that q shares with k, and with them those that q has alone."""
    r = roles(op)
    batch, heads, head = r.batch[:-1], r.batch[-1:], (r.head_dim,)
    own = (*heads, *r.group)
    return (
        (batch, (r.seq,), own, head),
        (batch, own, (r.seq,)),
        (batch, (r.memory,), heads, head),
    )


def local_sizes(op: Op, args: list[Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for v, x in zip(op.operands, args, strict=True):
        found.update(zip(v.type.names, x.shape, strict=True))
    return found


def attention(op: Op, args: list[Any], ctx: Context) -> list[Any] | None:
    """out and lse of ``attention``."""
    if not takes(op, ctx):
        return None
    rows, stats, columns = forms(op)
    wanted = (rows, columns, columns)
    q, k, v = (
        folded(x, o.type.names, form, ctx)
        for x, o, form in zip(args, op.operands, wanted, strict=True)
    )
    made: Any = cudnn.dot_product_attention(
        q, k, v, qkv_layout=LAYOUT, return_residual=True, **options(op)
    )
    local = local_sizes(op, args)
    return [
        unfolded(x, form, r.type, local, ctx)
        for x, form, r in zip(made, (rows, stats), op.results, strict=True)
    ]


def attention_grad(op: Op, args: list[Any], ctx: Context) -> list[Any] | None:
    """dq, dk and dv of ``attention_grad``."""
    if not takes(op, ctx):
        return None
    rows, stats, columns = forms(op)
    wanted = (rows, columns, columns, rows, stats, rows)
    q, k, v, out, lse, dout = (
        folded(x, o.type.names, form, ctx)
        for x, o, form in zip(args, op.operands, wanted, strict=True)
    )
    none = jnp.zeros(0, q.dtype)
    asked = options(op)
    made = bind_gradient(
        q,
        k,
        v,
        *[none] * 7,
        lse,
        out.astype(q.dtype),
        dout.astype(q.dtype),
        scale=asked["scale"],
        seed=42,  # of a dropout that there is not
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=asked["mask_type"],
        layout=cudnn.AttentionLayout[LAYOUT].value,
        sliding_window_length=asked["sliding_window_length"],
    )
    local = local_sizes(op, args)
    return [
        unfolded(x, form, r.type, local, ctx)
        for x, form, r in zip(made, (rows, columns, columns), op.results, strict=True)
    ]


def bind_gradient(*operands: Any, **options: Any) -> Any:
    return cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, **options)


KERNELS: dict[str, Kernel] = {"attention": attention, "attention_grad": attention_grad}

NAMES = {"attention": "__cudnn$fmhaSoftmax", "attention_grad": "__cudnn$fmhaSoftmaxBackward"}


def calls(op: Op, mesh: Mesh) -> list[Call]:
    """The kernel that fused attention of a plan runs as."""
    if op.attrs.get("kernel") != "cudnn":
        return []
    strategy = op.attrs["strategy"]
    flops = PLANNED["cudnn"].flops(op, lambda dim: strategy.parts(dim, mesh))
    q, k, v = (x.type.local_bytes(mesh) for x in op.operands[:3])
    made = (q,) if op.kind == "attention" else (q, k, v)
    return [Call(NAMES[op.kind], (q, k, v), made, flops=flops, others=True)]
