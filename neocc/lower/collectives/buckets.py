"""Small reductions as one: several arrays pay the latency of one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from neocc.lower.collectives.grids import all_reduce
from neocc.lower.collectives.group import Groups
from neocc.lower.collectives.rings import Combine


def all_reduce_together(
    arrays: Sequence[Any], groups: Groups, combine: Combine = jnp.add
) -> list[Any]:
    """All devices' arrays combined, those of one dtype in one all-reduce."""
    found: list[Any] = list(arrays)
    for dtype in dict.fromkeys(x.dtype for x in arrays):
        here = [i for i, x in enumerate(arrays) if x.dtype == dtype]
        flat = jnp.concatenate([arrays[i].reshape(-1) for i in here])
        flat, at = all_reduce(flat, groups, combine), 0
        for i in here:
            found[i] = flat[at : at + arrays[i].size].reshape(arrays[i].shape)
            at += arrays[i].size
    return found
