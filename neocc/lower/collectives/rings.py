"""Gather, scatter and exchange over one ring, with the pieces along a leading axis.

All of permutes and adds, so that JAX differentiates them: the transpose of a gather is a scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from neocc.cost.algorithms import steps
from neocc.lower.collectives.group import Group

Combine = Callable[[Any, Any], Any]


def piece(x: Any, index: Any) -> Any:
    """``x[index]``, for an index that a device computes."""
    return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def placed(out: Any, x: Any, index: Any) -> Any:
    return lax.dynamic_update_index_in_dim(out, x, index, 0)


def gather(x: Any, group: Group, ways: int = 2) -> Any:
    """[n, *x.shape]: the ``x`` of each device of the ring, in order."""
    n, here = group.size, group.index()
    out = placed(jnp.zeros((n, *x.shape), x.dtype), x, here)
    ahead, back = steps(n, ways)
    forward = backward = x
    for step in range(1, ahead + 1):
        forward = group.shift(forward, 1)
        out = placed(out, forward, (here - step) % n)
        if step <= back:
            backward = group.shift(backward, -1)
            out = placed(out, backward, (here + step) % n)
    return out


def scatter(x: Any, group: Group, combine: Combine = jnp.add, ways: int = 2) -> Any:
    """x[n, ...] to [...]: this device's piece, of all devices' combined.

    A piece is combined on its way to the device that keeps it: from ``ahead`` places before it
    forward, and from ``back`` places behind it backward.
    """
    n, here = group.size, group.index()
    ahead, back = steps(n, ways)

    def chain(length: int, by: int) -> Any:
        """What arrives of this device's piece from ``length`` places against ``by``."""
        total = piece(x, (here + by * length) % n)
        for step in range(1, length + 1):
            total = group.shift(total, by)
            if step < length:
                total = combine(total, piece(x, (here + by * (length - step)) % n))
        return total

    own = piece(x, here)
    if ahead:
        own = combine(chain(ahead, 1), own)
    return combine(own, chain(back, -1)) if back else own


def exchange(x: Any, group: Group) -> Any:
    """x[n, ...] to [n, ...]: piece ``i`` goes to device ``i``; what comes lies by its source."""
    n, here = group.size, group.index()
    out = placed(jnp.zeros_like(x), piece(x, here), here)
    for step in range(1, n // 2 + 1):
        for by in dict.fromkeys((step, n - step)):
            came = group.shift(piece(x, (here + by) % n), by)
            out = placed(out, came, (here - by) % n)
    return out
