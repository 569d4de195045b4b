"""Collectives of values in a byte each, with a scale per block of them: lossy, so only on request.

A block's scale is its largest magnitude over the format's largest value. One value's error is at
most ``bound``; an all-reduce adds those of its terms, each sent once, and that of the sum, sent
once more (``all_reduce_bound``). With ``Feedback`` what a step loses is added to the next one, so
the error of a sum over steps does not grow with their number.

Gradients are those of the standard collective (rounding has none of its own).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from neocc.cost.algorithms import BLOCK, SCALE
from neocc.lower.collectives import grids
from neocc.lower.collectives.group import Group
from neocc.lower.collectives.rings import exchange, gather

TINY = 2.0**-126  # the least scale: below it float32 has only subnormal numbers
F32 = 2.0**-22  # share of a value that scaling in float32 may round off


@dataclass(frozen=True)
class Format:
    """A byte's dtype and its rounding: of a value ``y`` of at most ``top`` it loses at most
    ``relative * |y| + absolute``."""

    name: str
    dtype: Any
    top: float
    relative: float
    absolute: float


FORMATS = {
    f.name: f
    for f in (
        Format("int8", jnp.int8, 127.0, 0.0, 0.5),
        Format("float8_e4m3", jnp.float8_e4m3fn, 448.0, 2.0**-4, 2.0**-10),
        Format("float8_e5m2", jnp.float8_e5m2, 57344.0, 2.0**-3, 2.0**-17),
    )
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Feedback:
    """What a device has lost and not sent yet: of its own terms, shaped as the operand, and of the
    piece of the sum that it keeps. float32."""

    terms: Any
    piece: Any


def blocks(flat: Any) -> Any:
    """[..., items] to [..., blocks, block]; zeros fill the last one."""
    items = flat.shape[-1]
    block = max(1, min(BLOCK, items))
    wide = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -items % block)])
    return wide.reshape(*flat.shape[:-1], wide.shape[-1] // block, block)


def scales(cut: Any, f: Format) -> Any:
    """[..., blocks, 1], float32."""
    return jnp.maximum(jnp.max(jnp.abs(cut), -1, keepdims=True) / f.top, TINY)


def pack(flat: Any, f: Format) -> Any:
    """[..., items] of a float dtype to int8[..., blocks, block + SCALE], one message."""
    cut = blocks(flat.astype(jnp.float32))
    scale = scales(cut, f)
    y = jnp.clip(cut / scale, -f.top, f.top)
    y = jnp.round(y).astype(f.dtype) if f.dtype == jnp.int8 else y.astype(f.dtype)
    byte = y if f.dtype == jnp.int8 else lax.bitcast_convert_type(y, jnp.int8)
    return jnp.concatenate([byte, lax.bitcast_convert_type(scale[..., 0], jnp.int8)], -1)


def unpack(packed: Any, items: int, f: Format) -> Any:
    """float32[..., items]."""
    byte, scale = packed[..., :-SCALE], packed[..., -SCALE:]
    y = byte if f.dtype == jnp.int8 else lax.bitcast_convert_type(byte, f.dtype)
    x = y.astype(jnp.float32) * lax.bitcast_convert_type(scale, jnp.float32)[..., None]
    return x.reshape(*x.shape[:-2], -1)[..., :items]


def bound(flat: Any, f: Format) -> Any:
    """[..., items]: the most that each value may lose in being sent once."""
    x = jnp.abs(flat.astype(jnp.float32))
    cut = blocks(x)
    absolute = jnp.broadcast_to(f.absolute * scales(cut, f), cut.shape)
    absolute = absolute.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    return absolute + (f.relative + F32) * x + 2 * TINY  # subnormal numbers may be flushed to 0


def all_reduce_bound(terms: Any, f: Format) -> Any:
    """terms[n, items] of n devices to [items]: the most by which their quantised sum may miss the
    true one, in float32."""
    n, items = terms.shape
    x = jnp.pad(terms.astype(jnp.float32), ((0, 0), (0, -items % n)))
    each = bound(x.reshape(n, n, -1), f).sum(0)  # a device's pieces have blocks of their own
    adding = n * F32 * jnp.abs(x).sum(0).reshape(n, -1)
    before = jnp.abs(x.sum(0)).reshape(n, -1) + each + adding
    return (each + adding + bound(before, f)).reshape(-1)[:items]


def no_feedback(x: Any, group: Group) -> Feedback:
    """Before the first step."""
    piece = -(-x.size // group.size)
    return Feedback(jnp.zeros(x.shape, jnp.float32), jnp.zeros(piece, jnp.float32))


def all_reduce_with_feedback(
    x: Any, group: Group, f: Format, lost: Feedback
) -> tuple[Any, Feedback]:
    """The sum of all devices' ``x``, and what this step lost of it."""
    n = group.size
    terms = x.astype(jnp.float32) + lost.terms
    cut = grids.padded(terms.reshape(-1), n).reshape(n, -1)
    packed = pack(cut, f)
    came = unpack(exchange(packed, group), cut.shape[-1], f)
    kept = (cut - unpack(packed, cut.shape[-1], f)).reshape(-1)[: x.size].reshape(x.shape)
    mine = came.sum(0) + lost.piece
    sent = pack(mine, f)
    whole = unpack(gather(sent, group), mine.size, f).reshape(-1)[: x.size]
    lost = Feedback(kept, mine - unpack(sent, mine.size, f))
    return whole.reshape(x.shape).astype(x.dtype), lost


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_reduce(x: Any, group: Group, f: Format) -> Any:
    """The sum of all devices' ``x``."""
    return all_reduce_with_feedback(x, group, f, no_feedback(x, group))[0]


all_reduce.defvjp(
    lambda x, group, f: (all_reduce(x, group, f), None),
    lambda group, f, _, bar: (grids.all_reduce(bar, (group,)),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x: Any, group: Group, at: int, f: Format) -> Any:
    """``x`` of every device, dim ``at`` joined in the order of the devices."""
    came = unpack(gather(pack(x.reshape(-1), f), group), x.size, f)
    return grids.merge(came.reshape(-1, *x.shape).astype(x.dtype), at, 1)


all_gather.defvjp(
    lambda x, group, at, f: (all_gather(x, group, at, f), None),
    lambda group, at, f, _, bar: (grids.reduce_scatter(bar, (group,), at),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def reduce_scatter(x: Any, group: Group, at: int, f: Format) -> Any:
    """This device's block of dim ``at`` of the sum; added in float32, sent once."""
    cut = grids.split(x, at, (group.size,))
    flat = cut.reshape(group.size, -1)
    came = unpack(exchange(pack(flat, f), group), flat.shape[-1], f)
    return came.sum(0).reshape(cut.shape[1:]).astype(x.dtype)


reduce_scatter.defvjp(
    lambda x, group, at, f: (reduce_scatter(x, group, at, f), None),
    lambda group, at, f, _, bar: (grids.all_gather(bar, (group,), at),),
)
