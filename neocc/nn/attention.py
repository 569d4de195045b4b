"""Attention that is not fused: its mask, its softmax, rotary positions, and a linear kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from neocc.ir.builder import Tensor, cos, einsum, exp, iota, select, sin
from neocc.ir.errors import NeoccError
from neocc.ir.types import Dim
from neocc.nn.norms import joint_softmax, softmax

LINEAR_EPSILON = 1e-6  # GPT-Neo's, models/layers.py
CHUNK = 128  # positions whose scores linear attention takes together: a matrix unit's tile


def visible(
    like: Tensor, seq: Dim, memory: Dim, causal: bool, window: int | None = None
) -> Tensor | None:
    """Which keys j a query i sees, bool[seq, memory]: j <= i if ``causal``, and only those with
    abs(i - j) < window if there is one. None: all of them."""
    if not causal and window is None:
        return None
    i, j = iota(like, seq), iota(like, memory)
    if causal:
        seen = j <= i
        return seen if window is None else seen & (i < j + window)
    assert window is not None
    return (i < j + window) & (j < i + window)


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    dtype: str,
    drops: Sequence[Callable[[Tensor], Tensor]],
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax of ``scale`` q k along memory, times v, the scores held whole in ``dtype``.

    q[batch, seq, heads, head_dim], k and v[batch, memory, heads, head_dim]; ``causal`` and
    ``window``: as ``visible`` has them. ``more``: keys and values [mem, heads, head_dim] that every
    query sees beside (Sukhbaatar et al., 2019). ``drops``: dropout of the weights of memory, and
    of those of mem.
    """
    scores = einsum(q, k, "batch heads seq memory", dtype=dtype) * scale
    seen = visible(scores, scores.dim("seq"), scores.dim("memory"), causal, window)
    if seen is not None:
        scores = select(seen, scores, -1e10)
    if more is None:
        p = drops[0](softmax(scores, "memory")).cast(q.dtype)
        return einsum(p, v, "batch seq heads head_dim")
    always = einsum(q, more[0], "batch heads seq mem", dtype=dtype) * scale
    p, r = joint_softmax([(scores, "memory"), (always, "mem")])
    p, r = drops[0](p).cast(q.dtype), drops[1](r).cast(q.dtype)
    mixed = einsum(p, v, "batch seq heads head_dim")
    return mixed + einsum(r, more[1], "batch seq heads head_dim")


def rotary(
    x: Tensor, seq: Dim, head_dim: Dim, dtype: str, positions: Tensor | None = None
) -> Tensor:
    """``x[..., seq, head_dim]`` with each pair of features (f, f + head_dim / 2) turned by the
    angle position / 10000 ** (2 f / head_dim) (Su et al., 2021, paired as in GPT-Neo and
    GPT-NeoX). ``positions``: integers; by default those along seq. Computed in ``dtype``, returned
    in x's.

    Raises:
        NeoccError: head_dim is odd.
    """
    if head_dim.size % 2:
        raise NeoccError(f"rotary positions need an even head_dim, not {head_dim.size}")
    half, feature = Dim("half", 2), Dim("rotary", head_dim.size // 2)
    rate = exp(iota(x, feature, dtype) * (-2.0 * math.log(10000.0) / head_dim.size))
    angle = (iota(x, seq, dtype) if positions is None else positions.cast(dtype)) * rate
    pairs = x.cast(dtype).split(head_dim.name, half, feature)
    # (first, second) -> (-second, first)
    turned = pairs.shift("half", 1) - pairs.shift("half", -1)
    y = pairs * cos(angle) + turned * sin(angle)
    return y.merge("half", "rotary", head_dim.name).cast(x.dtype)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dtype: str, chunk: int = CHUNK
) -> Tensor:
    """GPT-Neo's linear attention (after Shen et al., 2018), in time and memory linear in seq.

    q[batch, seq, heads, head_dim], k and v[batch, memory, heads, head_dim]; softmax of q over its
    features. ``causal``: the mean of v_j over j <= i with weights q_i . exp k_j; else keys are
    softmaxed along memory. GPT-Neo holds a head_dim x head_dim state for each position; here for
    each ``chunk`` of them (the largest divisor of seq up to it), with scores inside a chunk: the
    same sum in another order. Statistics run in ``dtype``, products in q's.
    """
    seq, narrow = q.dim("seq"), q.dtype
    q = softmax(q.cast(dtype).rename(head_dim="feature"), "feature")
    k = k.cast(dtype).rename(head_dim="feature")
    if not causal:
        k = softmax(k, "memory").cast(narrow)
        state = einsum(k, v, "batch heads feature head_dim")
        return einsum(q.cast(narrow), state, "batch seq heads head_dim")
    k = exp(k)
    total = (q * k.cumsum("memory").rename(memory="seq")).sum("feature") + LINEAR_EPSILON
    q = (q / total).cast(narrow)
    size = next(n for n in range(min(chunk, seq.size), 0, -1) if seq.size % n == 0)
    chunks, within, past = Dim("chunk", seq.size // size), Dim("within", size), Dim("past", size)
    q = q.split("seq", chunks, within)
    k, v = (t.split("memory", chunks, past) for t in (k.cast(narrow), v))
    scores = einsum(q, k, "batch chunk heads within past", dtype=dtype)
    near = select(iota(q, past) <= iota(q, within), scores, 0.0).cast(narrow)
    mixed = einsum(near, v, "batch chunk within heads head_dim", dtype=dtype)
    if chunks.size > 1:
        state = einsum(k, v, "batch chunk heads feature head_dim", dtype=dtype)
        # Not a shift: XLA would leave the last state out, and its FLOPs would not be the plan's.
        before = (state.cumsum("chunk") - state).cast(narrow)
        mixed = mixed + einsum(q, before, "batch chunk within heads head_dim", dtype=dtype)
    return mixed.merge("chunk", "within", seq.name).cast(narrow)
