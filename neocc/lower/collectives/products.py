"""Products that start before their operand is whole: collective matrix products.

``gather_products`` multiplies the shards that it has while the next ones come;
``scatter_products`` sends a block of the result on while it computes what to add to the next. Wang
and others, "Overlap communication with dependent computation via decomposition in large deep
learning models", ASPLOS 2023. ``ways`` 2 sends in both directions of a ring, in half the
steps; ``chunks`` cuts each shard further, so that the first product waits for less.

The shards that arrive from both sides in one step are multiplied as one. So the TPU compiler's
scheduler has one product to put between the permutes' start and their end; of two it would start
the permutes behind the first, and wait for them. Barriers keep the products of one step between
those of the steps beside it: else it would put all products but one before the first permute, or
behind the last (docs/collectives.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def cut(x: Any, names: str, dim: str, starts: Sequence[Any], size: int) -> Any:
    """``size`` places of a dim from each start, joined; all of ``x`` where it lacks the dim."""
    if dim not in names:
        return x
    at = names.index(dim)
    return joined([lax.dynamic_slice_in_dim(x, start, size, at) for start in starts], at)


def joined(parts: Sequence[Any], at: int) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, at)


def add(x: Any, y: Any) -> Any:
    """In float32 or wider: alone on narrower numbers, the TPU compiler takes twice as long."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + y.astype(wide)).astype(x.dtype)


@dataclass(frozen=True)
class Factor:
    """One of the products that share a gathered operand: ``einsum(spec, it, other)`` to ``dtype``,
    gathered along ``dim`` of the spec."""

    spec: str
    other: Any
    dim: str
    dtype: Any = None


@dataclass(frozen=True)
class Term:
    """One of the products whose sum is scattered: ``einsum(spec, x, w)`` along ``dim``."""

    spec: str
    x: Any
    w: Any
    dim: str
    dtype: Any = None


class Blocks:
    """An array to which blocks along one dim are written as they come."""

    def __init__(self, at: int, size: int):
        self.at, self.size = at, size
        self.array: Any = None

    def put(self, block: Any, start: Any) -> None:
        if self.array is None:
            shape = [*block.shape]
            shape[self.at] = self.size
            self.array = lax.empty(tuple(shape), block.dtype)
        self.array = lax.dynamic_update_slice_in_dim(self.array, block, start, self.at)


def gather_products(
    x: Any,
    factors: Sequence[Factor],
    group: Group,
    ways: int = 2,
    chunks: int = 1,
    whole: bool = False,
) -> tuple[Any, list[Any]]:
    """Each ``einsum(spec, X, other)`` where ``X`` is ``x`` of every device, joined along ``dim``,
    which is one dim of ``x`` for all of them: it goes round once. And ``X``, where ``whole`` or a
    product sums over ``dim``: such a product is made of the whole when it is there, as one block
    added to the others would read and write the whole result; else None.
    """
    parsed = [subscripts(f.spec) for f in factors]
    n, here, at = group.size, group.index(), parsed[0][0].index(factors[0].dim)
    local = x.shape[at]
    made = {
        i: Blocks(out.index(f.dim), n * local)
        for i, (f, (_, _, out)) in enumerate(zip(factors, parsed, strict=True))
        if f.dim in out
    }
    joins = Blocks(at, n * local) if whole or len(made) < len(factors) else None
    ahead, back = steps(n, ways)

    def go_round(start: int, size: int) -> None:
        """With a part of every shard."""
        forward = backward = lax.slice_in_dim(x, start, start + size, axis=at)
        before: list[Any] = []
        for step in range(ahead + 1):
            shards, places = [forward], [here]
            if step:
                forward = group.shift(forward, 1)
                shards, places = [forward], [(here - step) % n]
            if 0 < step <= back:
                backward = group.shift(backward, -1)
                shards.append(backward)
                places.append((here + step) % n)
            # What goes on from here in the next step waits for the products of the last.
            forward, backward, *_ = lax.optimization_barrier((forward, backward, *before))
            starts = [place * local + start for place in places]
            before = []
            for i, blocks in made.items():
                f, (_, b, _) = factors[i], parsed[i]
                rest = cut(f.other, b, f.dim, starts, size)
                part = product(f.spec, joined(shards, at), rest, f.dtype)
                before.append(part)
                for k, to in enumerate(starts):
                    ends = k * size, (k + 1) * size
                    blocks.put(lax.slice_in_dim(part, *ends, axis=blocks.at), to)
            if joins is not None:
                for shard, to in zip(shards, starts, strict=True):
                    joins.put(shard, to)

    for start, size in spans(local, chunks):
        go_round(start, size)
    full = joins.array if joins else None
    return full, [
        made[i].array if i in made else product(f.spec, full, f.other, f.dtype)
        for i, f in enumerate(factors)
    ]


def product(spec: str, x: Any, w: Any, dtype: Any) -> Any:
    return jnp.einsum(spec, x, w, preferred_element_type=dtype or jnp.result_type(x, w))


def gather_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, chunks: int = 1
) -> Any:
    """``gather_products`` of one."""
    return gather_products(x, [Factor(spec, w, dim)], group, ways, chunks)[1][0]


def scatter_products(terms: Sequence[Term], group: Group, ways: int = 2, chunks: int = 1) -> Any:
    """This device's block along ``dim`` of the sum of all terms' products of all devices. ``dim``
    is one of each result's, at the same place, and divides."""
    n, here = group.size, group.index()
    a, b, out = subscripts(terms[0].spec)
    first, at = terms[0], out.index(terms[0].dim)
    whole = first.x.shape[a.index(first.dim)] if first.dim in a else 0
    local = (whole or first.w.shape[b.index(first.dim)]) // n
    ahead, back = steps(n, ways)

    def blocks(places: Sequence[Any], start: int, size: int, sent: list[Any]) -> list[Any]:
        """This device's terms of the blocks of some devices."""
        starts = [place * local + start for place in places]
        starts, sent[:] = lax.optimization_barrier((starts, sent[:]))  # not before these are
        total: Any = None
        for term in terms:
            a, b, _ = subscripts(term.spec)
            x, w = cut(term.x, a, term.dim, starts, size), cut(term.w, b, term.dim, starts, size)
            part = product(term.spec, x, w, term.dtype)
            total = part if total is None else total + part
        cuts = range(0, size * len(starts), size)
        return [lax.slice_in_dim(total, i, i + size, axis=at) for i in cuts]

    def one(start: int, size: int) -> Any:
        sent: list[Any] = []
        for far in range(ahead, 0, -1):
            places = [(here + far) % n, *([(here - far) % n] if far <= back else [])]
            made = blocks(places, start, size, sent)
            came = [group.shift(block, way) for block, way in zip(sent, (1, -1), strict=False)]
            sent = [add(x, y) for x, y in zip(came, made, strict=False)] + made[len(came) :]
        (own,) = blocks([here], start, size, sent)
        for block, way in zip(sent, (1, -1), strict=False):
            own = add(own, group.shift(block, way))
        return own

    return joined([one(start, size) for start, size in spans(local, chunks)], at)


def scatter_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, chunks: int = 1
) -> Any:
    """``scatter_products`` of one."""
    return scatter_products([Term(spec, x, w, dim)], group, ways, chunks)
