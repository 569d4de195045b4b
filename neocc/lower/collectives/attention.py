"""Ring attention: keys and values go round, and are never whole on a device.

Liu, Zaharia and Abbeel, "Ring attention with blockwise transformers for near-infinite context",
arXiv 2310.01889. Under a causal mask the first devices of contiguous blocks would have little to
do and the last ones much; so device ``r`` of ``n`` takes blocks ``r`` and ``2n - 1 - r`` of ``2n``
(zig-zag), and every step has the same work on every device: two of the four pairs of blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from neocc.lower.collectives.group import Group

LOW = -1e30  # a masked score: finite, so that a row without any other gives 0 and not NaN


def to_zigzag(x: Any, group: Group, at: int) -> Any:
    """From contiguous blocks of dim ``at`` to halves ``r`` and ``2n - 1 - r``: two permutes."""
    n = group.size
    first, second = jnp.split(x, 2, at)  # halves 2d and 2d + 1 of device d
    even, odd = (group.send(h, pairs(n, i)) for i, h in enumerate((first, second)))
    swapped = group.index() % 2 == 1  # an odd device's low half is an odd one
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=at)


def from_zigzag(x: Any, group: Group, at: int) -> Any:
    """The way back."""
    n = group.size
    low, high = jnp.split(x, 2, at)
    swapped = group.index() % 2 == 1
    halves = jnp.where(swapped, high, low), jnp.where(swapped, low, high)
    back = ([(t, s) for s, t in pairs(n, i)] for i in range(2))
    came = [group.send(h, moves) for h, moves in zip(halves, back, strict=True)]
    return jnp.concatenate(came, axis=at)


def pairs(n: int, which: int) -> list[tuple[int, int]]:
    """Where device d's first (0) or second (1) half goes."""
    halves = [(d, 2 * d + which) for d in range(n)]
    return [(d, h if h < n else 2 * n - 1 - h) for d, h in halves]


State = tuple[Any, Any, Any]  # values so far, largest score, sum of exponentials


@jax.checkpoint
def attend(state: State, q: Any, k: Any, v: Any, mask: Any) -> State:
    """Takes one block of keys and values in; its scores are not kept."""
    values, most, total = state
    scores = jnp.einsum("...sd,...md->...sm", q, k, preferred_element_type=most.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, LOW)
    top = jnp.maximum(most, jax.lax.stop_gradient(scores.max(-1)))
    old = jnp.exp(most - top)
    weights = jnp.where(scores > LOW / 2, jnp.exp(scores - top[..., None]), 0)
    part = jnp.einsum("...sm,...me->...se", weights, v, preferred_element_type=most.dtype)
    return old[..., None] * values + part, top, old * total + weights.sum(-1)


def choose(first: Any, a: State, b: State) -> State:
    """``a`` where ``first`` holds, else ``b``."""
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))  # type: ignore


def start(q: Any, k: Any, v: Any) -> State:
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    lead = jnp.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    rows = (*lead, q.shape[-2])
    return (
        jnp.zeros((*rows, v.shape[-1]), dtype),
        jnp.full(rows, LOW, dtype),
        jnp.zeros(rows, dtype),
    )


def finished(state: State, dtype: Any) -> Any:
    values, _, total = state
    return (values / total[..., None]).astype(dtype)


def ring_attention(
    q: Any, k: Any, v: Any, group: Group, causal: bool = True, scale: float = 1.0
) -> Any:
    """softmax(scale q k^T) v with the sequence cut in contiguous blocks over the ring.

    q[..., s, d], k[..., m, d], v[..., m, e] to [..., s, e], the leading dims broadcast together.
    ``causal`` masks keys behind their query, in zig-zag order; ``s`` and ``m`` are then equal and
    even. Scores and sums are float32 or wider.
    """
    q = q * scale
    if not causal:
        state, here = start(q, k, v), (k, v)
        for step in range(group.size):
            state = attend(state, q, *here, None)
            if step < group.size - 1:
                here = tuple(group.shift(x, 1) for x in here)
        return finished(state, v.dtype)
    q, k, v = (to_zigzag(x, group, x.ndim - 2) for x in (q, k, v))
    out = zigzag_attention(q, k, v, group)
    return from_zigzag(out, group, out.ndim - 2)


def zigzag_attention(q: Any, k: Any, v: Any, group: Group) -> Any:
    """Causal, of operands in zig-zag order; the result too. The scores' scale is in ``q``."""
    low_q, high_q = jnp.split(q, 2, -2)
    place = group.index()
    before = jnp.tril(jnp.ones((low_q.shape[-2],) * 2, bool))
    low, high = start(low_q, k, v), start(high_q, k, v)
    for step in range(group.size):
        (low_k, high_k), (low_v, high_v) = jnp.split(k, 2, -2), jnp.split(v, 2, -2)
        high = attend(high, high_q, low_k, low_v, None)
        if step == 0:
            low = attend(low, low_q, low_k, low_v, before)
            high = attend(high, high_q, high_k, high_v, before)
        else:
            # From a device before this one, its low block is for both halves of q; from one behind,
            # both its blocks are for the high half.
            earlier = step <= place
            state = choose(earlier, low, high)
            rows = jnp.where(earlier, low_q, high_q)
            keys, values = jnp.where(earlier, low_k, high_k), jnp.where(earlier, low_v, high_v)
            state = attend(state, rows, keys, values, None)
            low, high = choose(earlier, state, low), choose(earlier, high, state)
        if step < group.size - 1:
            k, v = group.shift(k, 1), group.shift(v, 1)
    return jnp.concatenate([finished(s, v.dtype) for s in (low, high)], -2)
