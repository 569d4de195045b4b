"""All-gather, reduce-scatter, all-reduce and all-to-all over a grid of rings.

One form for rings, tori and hierarchies, which differ in the rings and in the order of going over
them (``neocc.cost.algorithms``): a torus cuts the data into as many parts as it has rings, and each
part goes over them in another order. What does not divide is padded inside.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from neocc.cost.algorithms import orders
from neocc.lower.collectives.group import Groups
from neocc.lower.collectives.rings import Combine, exchange, gather, scatter


def sizes_of(groups: Groups) -> tuple[int, ...]:
    return tuple(group.size for group in groups)


def padded(flat: Any, multiple: int) -> Any:
    """A 1-D array with zeros behind it up to a multiple."""
    return jnp.pad(flat, (0, -flat.size % multiple))


def split(x: Any, at: int, sizes: tuple[int, ...]) -> Any:
    """[*sizes, *piece]: dim ``at`` cut into as many blocks, the blocks in front."""
    shape = (*x.shape[:at], *sizes, x.shape[at] // math.prod(sizes), *x.shape[at + 1 :])
    front = tuple(range(at, at + len(sizes)))
    return jnp.moveaxis(x.reshape(shape), front, tuple(range(len(sizes))))


def merge(x: Any, at: int, count: int) -> Any:
    """The other way round: ``count`` axes in front joined to dim ``at`` of the rest."""
    blocks = math.prod(x.shape[:count])
    x = jnp.moveaxis(x.reshape(blocks, *x.shape[count:]), 0, at)
    return x.reshape(*x.shape[:at], blocks * x.shape[at + 1], *x.shape[at + 2 :])


def _scatter_part(x: Any, groups: Groups, order: tuple[int, ...], f: Combine, ways: int) -> Any:
    """x[*sizes, p] to [p]."""
    left = list(range(len(groups)))
    for ring in order:
        x = scatter(jnp.moveaxis(x, left.index(ring), 0), groups[ring], f, ways)
        left.remove(ring)
    return x


def _gather_part(x: Any, groups: Groups, order: tuple[int, ...], ways: int) -> Any:
    """x[p] to [*sizes, p], over the rings in the order against ``order``."""
    have: list[int] = []
    for ring in reversed(order):
        x = gather(x, groups[ring], ways)
        have.insert(0, ring)
    return jnp.moveaxis(x, range(len(have)), have)


def all_gather(x: Any, groups: Groups, at: int, ways: int = 2, torus: bool = False) -> Any:
    """``x`` of every device, dim ``at`` joined in the order of the devices."""
    parts = len(groups) if torus else 1
    flat = padded(x.reshape(-1), parts).reshape(parts, -1)
    found = [
        _gather_part(part, groups, order, ways)
        for part, order in zip(flat, orders(len(groups), parts), strict=True)
    ]
    whole = jnp.stack(found, len(groups)).reshape(*sizes_of(groups), -1)[..., : x.size]
    return merge(whole.reshape(*sizes_of(groups), *x.shape), at, len(groups))


def reduce_scatter(
    x: Any, groups: Groups, at: int, combine: Combine = jnp.add, ways: int = 2, torus: bool = False
) -> Any:
    """This device's block of dim ``at``, of all devices' combined. The dim divides."""
    parts, sizes = len(groups) if torus else 1, sizes_of(groups)
    cut = split(x, at, sizes)
    shape = cut.shape[len(sizes) :]
    flat = cut.reshape(*sizes, -1)
    flat = jnp.pad(flat, [(0, 0)] * len(sizes) + [(0, -flat.shape[-1] % parts)])
    flat = flat.reshape(*sizes, parts, -1)
    found = [
        _scatter_part(flat[..., i, :], groups, order, combine, ways)
        for i, order in enumerate(orders(len(groups), parts))
    ]
    return jnp.concatenate(found)[: math.prod(shape)].reshape(shape)


def all_reduce(
    x: Any, groups: Groups, combine: Combine = jnp.add, ways: int = 2, torus: bool = False
) -> Any:
    """All devices' ``x`` combined: a reduce-scatter and an all-gather of its elements."""
    parts, sizes = len(groups) if torus else 1, sizes_of(groups)
    flat = padded(x.reshape(-1), math.prod(sizes) * parts).reshape(parts, *sizes, -1)
    found = []
    for part, order in zip(flat, orders(len(groups), parts), strict=True):
        mine = _scatter_part(part, groups, order, combine, ways)
        found.append(_gather_part(mine, groups, order, ways))
    return jnp.stack(found).reshape(-1)[: x.size].reshape(x.shape)


def all_to_all(x: Any, groups: Groups, split_at: int, join_at: int) -> Any:
    """Blocks of dim ``split_at`` to the devices in order; theirs joined along ``join_at``. Over
    the innermost ring first, so that the outer ones send what all inner devices have for one."""
    cut = split(x, split_at, sizes_of(groups))
    for i in reversed(range(len(groups))):
        cut = jnp.moveaxis(exchange(jnp.moveaxis(cut, i, 0), groups[i]), 0, i)
    return merge(cut, join_at, len(groups))
