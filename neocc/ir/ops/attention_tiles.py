"""Arithmetic of fused attention on arrays, tile by tile, and under JAX the loops over tiles.

Folded arrays: q[n, group, seq, d] and k[n, memory, d], where n is all batch dims; one tile is some
of the queries, q[n, rows, d] with those of all groups in the rows, by some of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

BLOCK = 512  # most queries, and most keys, of a tile
SCORES = 2**22  # most scores that are held at once: in f32 they stay in a TPU's on-chip memory
MASKED = -1e30  # a score that is not seen: finite, so that differences stay numbers
LOWEST = -5e29  # of any maximum: exp(MASKED - LOWEST) is 0, also where a query sees nothing


@dataclass(frozen=True)
class Tiles:
    """The scores as ``down`` x ``across`` tiles of ``rows`` queries (of each group) by ``columns``
    keys, the last ones filled up; ``pairs``: those that are computed, by number."""

    rows: int
    columns: int
    down: int
    across: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def one(self) -> bool:
        return self.down == self.across == 1


@lru_cache(maxsize=1024)
def tiles(
    seq: int,
    memory: int,
    keys: int,
    causal: bool,
    window: int | None,
    start: int | None,
    block: int,
) -> Tiles:
    """Tiles of at most ``block`` x ``block`` scores of ``seq`` queries and ``memory`` keys, the
    first ``keys`` of which count. One tile is computed whatever it holds.

    ``start``: global index of the first query; None if it differs between devices, which run
    one program: then no tile is left out for what the masks hide.
    """
    down, across = max(1, -(-seq // block)), max(1, -(-memory // block))
    rows, columns = -(-seq // down), -(-memory // across)

    def visible(a: int, b: int) -> bool:
        if start is None or down == across == 1:
            return True
        first, last = start + a * rows, start + (a + 1) * rows - 1
        low = -math.inf if window is None else first - window + 1
        high = math.inf if window is None else last + window - 1
        high = min(high, last) if causal else high
        return b * columns <= high and (b + 1) * columns - 1 >= low

    counted = 1 if down == across == 1 else -(-keys // max(1, columns))
    pairs = ((a, b) for a in range(down) for b in range(counted))
    return Tiles(rows, columns, down, across, tuple(p for p in pairs if visible(*p)))


@dataclass(frozen=True)
class Kernel:
    """One op on one device: its masks and arithmetic.

    Arrays are q[lead..., n, rows, d] and k[lead..., n, columns, d]. ``start``: global index of the
    device's first query; ``keys``: how many keys count.
    """

    xp: Any
    start: Any
    group: int
    scale: float
    causal: bool
    window: int | None
    keys: int
    dtype: Any  # of scores and sums

    def product(self, a: Any, b: Any) -> Any:
        """Matrix product of the last two dims, summed in ``dtype``."""
        if self.xp.__name__ == "numpy":
            return self.xp.matmul(a.astype(self.dtype), b.astype(self.dtype))
        return self.xp.matmul(a, b, preferred_element_type=self.dtype)

    def scores(self, q: Any, k: Any, i: Any, j: Any) -> Any:
        """Scores of queries i[lead..., rows] and keys j[lead..., columns], ``MASKED`` where not
        seen."""
        i, j = i[..., None, :, None], j[..., None, None, :]
        seen = j < self.keys
        seen = self.xp.broadcast_to(seen, self.xp.broadcast_shapes(i.shape, seen.shape))
        if self.causal:
            seen = seen & (j <= i)
        if self.window is not None:
            seen = seen & (i < j + self.window)
        if self.window is not None and not self.causal:
            seen = seen & (j < i + self.window)
        s = self.product(q, self.turned(k)) * self.dtype.type(self.scale)
        return self.xp.where(seen, s, self.dtype.type(MASKED))

    def turned(self, x: Any) -> Any:
        return self.xp.swapaxes(x, -1, -2)

    def step(self, state: Sequence[Any], q: Any, k: Any, v: Any, i: Any, j: Any) -> Any:
        """Running (weighted sum, sum of weights, maximum) with more keys in them."""
        total, weight, top = state
        s = self.scores(q, k, i, j)
        new = self.xp.maximum(top, self.xp.max(s, axis=-1, initial=LOWEST))
        p = self.xp.exp(s - new[..., None])
        fade = self.xp.exp(top - new)
        total = total * fade[..., None] + self.product(p.astype(v.dtype), v)
        return total, weight * fade + self.xp.sum(p, axis=-1, dtype=self.dtype), new

    def finish(self, state: Sequence[Any]) -> tuple[Any, Any]:
        """Output and log-sum-exp of a running state."""
        xp = self.xp
        total, weight, top = state
        some = weight > 0
        weight = xp.where(some, weight, self.dtype.type(1))
        lse = xp.where(some, top + xp.log(weight), self.dtype.type(-math.inf))
        return total / weight[..., None], lse

    def gradient(
        self, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, i: Any, j: Any
    ) -> tuple[Any, Any, Any]:
        """The terms of dq, dk and dv that one tile adds."""
        p = self.xp.exp(self.scores(q, k, i, j) - lse[..., None])
        ds = p * (self.product(dout, self.turned(v)) - delta[..., None])
        ds = (ds * self.dtype.type(self.scale)).astype(q.dtype)
        dv = self.product(self.turned(p.astype(q.dtype)), dout)
        return self.product(ds, k), self.product(self.turned(ds), q), dv

    def anew(self, *arrays: Any) -> tuple[Any, ...]:
        """The arrays, such that a compiler does not take scores made of them for the forward
        pass's, which would then be held, where that was computed again beside the gradient."""
        if self.xp.__name__ == "numpy":
            return arrays
        from jax import lax

        return lax.optimization_barrier(arrays)

    def finite(self, lse: Any) -> Any:
        """``lse`` with any number for queries that see nothing: their weights are 0 with it."""
        return self.xp.where(self.xp.isfinite(lse), lse, self.dtype.type(0))


def merged(x: Any, axis: int) -> Any:
    """``x`` with an axis and the next as one."""
    size = x.shape[axis] * x.shape[axis + 1]
    return x.reshape((*x.shape[:axis], size, *x.shape[axis + 2 :]))


# Loops over tiles, under JAX


def held_at_once(q: Any, cut: Tiles) -> int:
    """The share of the n of q[n, group, seq, d] whose tiles ``SCORES`` holds; it divides n."""
    n, group = q.shape[:2]
    most = max(1, SCORES // max(1, group * cut.rows * cut.columns))
    return max((size for size in range(1, min(n, most) + 1) if n % size == 0), default=n)


def in_parts(function: Any, size: int, *arrays: Any) -> Any:
    """``function`` of ``size`` slices of the arrays' first dim at a time."""
    from jax import lax, tree

    if arrays[0].shape[0] == size:
        return function(*arrays)
    parts = tuple(x.reshape((-1, size, *x.shape[1:])) for x in arrays)
    made = lax.map(lambda some: function(*some), parts)
    return tree.map(lambda x: x.reshape((-1, *x.shape[2:])), made)


def in_tiles(x: Any, axis: int, count: int, size: int) -> Any:
    """``x`` with zeros at the end of an axis, so that it is ``count`` times ``size`` long."""
    from jax import numpy as jnp

    width = [(0, 0)] * x.ndim
    width[axis] = (0, count * size - x.shape[axis])
    return jnp.pad(x, width) if width[axis][1] else x


Numbers = Callable[[Any, Any], tuple[Any, Any]]  # of a tile's rows and columns -> global indices


def forward_loop(kernel: Kernel, cut: Tiles, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """out[n, group, seq, d] and lse[n, group, seq], tile by tile."""
    from jax import numpy as jnp

    n, group, seq, d = q.shape
    q = in_tiles(q, 2, cut.down, cut.rows)
    k, v = (in_tiles(x, 1, cut.across, cut.columns) for x in (k, v))
    shape = (n, group, cut.down * cut.rows)
    start = (
        jnp.zeros((*shape, d), kernel.dtype),
        jnp.zeros(shape, kernel.dtype),
        jnp.full(shape, LOWEST, kernel.dtype),
    )
    pairs = jnp.asarray(cut.pairs, jnp.int32).reshape(-1, 2)
    state = forward_tiles(kernel, cut, pairs, partial(tile_indices, kernel, cut), *start, q, k, v)
    out, lse = kernel.finish(state)
    return out[:, :, :seq], lse[:, :, :seq]


def forward_tiles(
    kernel: Kernel,
    cut: Tiles,
    pairs: Any,
    numbers: Numbers,
    total: Any,
    weight: Any,
    top: Any,
    q: Any,
    k: Any,
    v: Any,
) -> tuple[Any, Any, Any]:
    """A running state of the queries with the tiles ``pairs[count, 2]`` of their scores in it; of
    arrays that are whole tiles."""
    from jax import lax

    def tile(state: Any, pair: Any) -> tuple[Any, None]:
        a, b = pair
        rows, columns = Window(a, cut.rows, 2), Window(b, cut.columns, 1)
        own = [merged(rows.read(x), 1) for x in state]
        i, j = numbers(a, b)
        new = kernel.step(
            tuple(own), merged(rows.read(q), 1), columns.read(k), columns.read(v), i, j
        )
        return tuple(rows.write(x, y) for x, y in zip(state, new, strict=True)), None

    state, _ = lax.scan(tile, (total, weight, top), (pairs[:, 0], pairs[:, 1]))
    return state


def backward_loop(
    kernel: Kernel,
    cut: Tiles,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
) -> tuple[Any, Any, Any]:
    """dq[n, group, seq, d], dk and dv[n, memory, d], tile by tile."""
    from jax import numpy as jnp

    seq, memory = q.shape[2], k.shape[1]
    q, dout, lse, delta = (in_tiles(x, 2, cut.down, cut.rows) for x in (q, dout, lse, delta))
    k, v = (in_tiles(x, 1, cut.across, cut.columns) for x in (k, v))
    dq, dk, dv = (jnp.zeros(x.shape, kernel.dtype) for x in (q, k, v))
    pairs = jnp.asarray(cut.pairs, jnp.int32).reshape(-1, 2)
    numbers = partial(tile_indices, kernel, cut)
    sums = (dq, dk, dv)
    dq, dk, dv = backward_tiles(kernel, cut, pairs, numbers, *sums, q, k, v, dout, lse, delta)
    return dq[:, :, :seq], dk[:, :memory], dv[:, :memory]


def backward_tiles(
    kernel: Kernel,
    cut: Tiles,
    pairs: Any,
    numbers: Numbers,
    dq: Any,
    dk: Any,
    dv: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
) -> tuple[Any, Any, Any]:
    """dq, dk and dv with the terms of the tiles ``pairs[count, 2]``; of whole tiles."""
    from jax import lax

    def tile(sums: Any, pair: Any) -> tuple[Any, None]:
        a, b = pair
        rows, columns = Window(a, cut.rows, 2), Window(b, cut.columns, 1)
        i, j = numbers(a, b)
        dq, dk, dv = sums
        own_q, own_dout, own_lse, own_delta = (
            merged(rows.read(x), 1) for x in (q, dout, lse, delta)
        )
        own_k, own_v = columns.read(k), columns.read(v)
        terms = kernel.gradient(own_q, own_k, own_v, own_dout, own_lse, own_delta, i, j)
        return (
            rows.write(dq, merged(rows.read(dq), 1) + terms[0]),
            columns.write(dk, columns.read(dk) + terms[1]),
            columns.write(dv, columns.read(dv) + terms[2]),
        ), None

    sums, _ = lax.scan(tile, (dq, dk, dv), (pairs[:, 0], pairs[:, 1]))
    return sums


def tile_indices(kernel: Kernel, cut: Tiles, a: Any, b: Any) -> tuple[Any, Any]:
    from jax import numpy as jnp

    i = kernel.start + a * cut.rows + jnp.arange(cut.rows, dtype=jnp.int32)
    return jnp.tile(i, kernel.group), b * cut.columns + jnp.arange(cut.columns, dtype=jnp.int32)


@dataclass(frozen=True)
class Window:
    """One tile's part of an axis."""

    number: Any
    size: int
    axis: int

    def read(self, x: Any) -> Any:
        from jax import lax

        return lax.dynamic_slice_in_dim(x, self.number * self.size, self.size, self.axis)

    def write(self, x: Any, part: Any) -> Any:
        """``x`` with ``part``, whose axes may be merged, in its place."""
        from jax import lax

        shape = (*x.shape[: self.axis], self.size, *x.shape[self.axis + 1 :])
        return lax.dynamic_update_slice_in_dim(
            x, part.reshape(shape), self.number * self.size, self.axis
        )
