"""Products that start before their operand is whole: collective matrix products.

``gather_product`` multiplies the shard that it has while the next ones come; ``scatter_product``
sends a block of the result on while it computes what to add to the next. Wang and others, "Overlap
communication with dependent computation via decomposition in large deep learning models", ASPLOS
2023. ``ways`` 2 sends in both directions of a ring, in half the steps; ``chunks`` cuts each
shard further, so that the first product waits for less.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from neocc.cost.algorithms import steps
from neocc.lower.collectives.group import Group


def subscripts(spec: str) -> tuple[str, str, str]:
    """``ab,bc->ac`` as its three parts."""
    operands, _, out = spec.partition("->")
    a, _, b = operands.partition(",")
    return a, b, out


def spans(size: int, chunks: int) -> list[tuple[int, int]]:
    """(start, size) of up to ``chunks`` parts of ``size``, the first ones larger by one where it
    does not divide."""
    count = max(1, min(chunks, size))
    base, more = divmod(size, count)
    sizes = [base + (i < more) for i in range(count)]
    return [(sum(sizes[:i]), n) for i, n in enumerate(sizes)]


def cut(x: Any, names: str, dim: str, start: Any, size: int) -> Any:
    """``size`` places of a dim from ``start``; all of ``x`` where it lacks the dim."""
    if dim not in names:
        return x
    return lax.dynamic_slice_in_dim(x, start, size, names.index(dim))


def gather_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, chunks: int = 1
) -> Any:
    """``einsum(spec, X, w)`` where ``X`` is ``x`` of every device, joined along ``dim``.

    A summed ``dim`` adds up in float32 where the operands are narrower.
    """
    a, b, out = subscripts(spec)
    n, here, local = group.size, group.index(), x.shape[a.index(dim)]
    summed = dim not in out
    exact = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
    dtype = jnp.result_type(x, w)
    result: Any = None

    def multiply(result: Any, shard: Any, place: Any, start: int) -> Any:
        """Adds or places the product of part of the shard of device ``place``."""
        at = place * local + start
        rest = cut(w, b, dim, at, shard.shape[a.index(dim)])
        if summed:
            part = jnp.einsum(spec, shard, rest, preferred_element_type=exact)
            return part if result is None else result + part
        part = jnp.einsum(spec, shard, rest)
        if result is None:
            shape = [*part.shape]
            shape[out.index(dim)] = n * local
            result = jnp.zeros(shape, part.dtype)
        return lax.dynamic_update_slice_in_dim(result, part, at, out.index(dim))

    ahead, back = steps(n, ways)
    parts = spans(local, chunks)
    forward = [lax.slice_in_dim(x, s, s + k, axis=a.index(dim)) for s, k in parts]
    backward = list(forward)
    for i, (start, _) in enumerate(parts):
        result = multiply(result, forward[i], here, start)
    for step in range(1, ahead + 1):
        for i, (start, _) in enumerate(parts):
            forward[i] = group.shift(forward[i], 1)
            result = multiply(result, forward[i], (here - step) % n, start)
            if step <= back:
                backward[i] = group.shift(backward[i], -1)
                result = multiply(result, backward[i], (here + step) % n, start)
    return result.astype(dtype)


def scatter_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, chunks: int = 1
) -> Any:
    """This device's block along ``dim`` of the sum of all devices' ``einsum(spec, x, w)``. ``dim``
    is one of the result's, and divides."""
    a, b, out = subscripts(spec)
    n, here = group.size, group.index()
    whole = x.shape[a.index(dim)] if dim in a else w.shape[b.index(dim)]
    local = whole // n
    ahead, back = steps(n, ways)

    def block(place: Any, start: int, size: int) -> Any:
        at = place * local + start
        return jnp.einsum(spec, cut(x, a, dim, at, size), cut(w, b, dim, at, size))

    def chain(length: int, by: int, start: int, size: int) -> Any:
        total = block((here + by * length) % n, start, size)
        for step in range(1, length + 1):
            total = group.shift(total, by)
            if step < length:
                total = total + block((here + by * (length - step)) % n, start, size)
        return total

    found = []
    for start, size in spans(local, chunks):
        own = block(here, start, size)
        if ahead:
            own = own + chain(ahead, 1, start, size)
        if back:
            own = own + chain(back, -1, start, size)
        found.append(own)
    return jnp.concatenate(found, out.index(dim))
