"""What an op is: type rule, iteration space, meaning. Everything else is derived from these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neocc.ir.errors import IRError
from neocc.ir.program import Op
from neocc.ir.types import TensorType

Attrs = Mapping[str, Any]
# Kinds of iteration dims; the others are the reductions sum, max, min.
PARALLEL, SEQUENTIAL, RING = "parallel", "sequential", "ring"


@dataclass(frozen=True, slots=True)
class Iter:
    """One dim of an op's iteration space. ``kind``: ``parallel``, ``sequential`` (cannot be
    cut), ``ring`` (see ``Space``), or the reduction (``sum``, ``max``, ``min``) that runs along
    it, for those results that do not have the dim (of an op with several, others may)."""

    name: str
    size: int
    kind: str = PARALLEL


@dataclass(frozen=True, slots=True)
class Space:
    """The dims an op runs over, and, per operand and result, which of them each dim follows.

    ``operands[i][j]`` names the iteration dim that cuts dim j of operand i; None means that
    this dim cannot be cut in this op.

    ``along``: for each dim of kind ``ring``, the one that an axis which cuts it cuts too: each
    device has its own block of both, and the blocks of the ring dim go round, so that every device
    sees all of them. One axis may do that, where no other cuts the two; of ``devices``, if given.
    """

    iters: tuple[Iter, ...]
    operands: tuple[tuple[str | None, ...], ...]
    results: tuple[tuple[str | None, ...], ...]
    along: tuple[tuple[str, str], ...] = ()
    devices: int | None = None


@dataclass(frozen=True)
class Ring:
    """The devices along a mesh axis, in a ring. ``place``: the number of a device in it, a traced
    scalar or an array over the mesh axes; ``permute(x, pairs)``: what each place has when place s
    sent its ``x`` to place t, for each (s, t): a permutation."""

    size: int
    place: Any
    permute: Callable[[Any, Sequence[tuple[int, int]]], Any]

    def send(self, x: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        """``permute``; nothing is sent where each place keeps its own."""
        return x if all(s == t for s, t in pairs) else self.permute(x, pairs)


@dataclass(frozen=True)
class Context:
    """How to evaluate an op on blocks.

    Arrays carry ``lead`` mesh axes in front of the tensor's dims (the virtual executor); under
    JAX ``lead`` is 0. ``block(iteration dim, size)`` gives the local size of that dim and the
    global index of the block's first element (an int, a traced scalar, or an array over the
    mesh axes). ``rounds``: casts that may keep excess precision round. ``ring(iteration dim)``: the
    devices among which the blocks of that dim go round, if it is cut so (``Space.along``).
    """

    xp: Any
    lead: int = 0
    block: Callable[[str, int], tuple[int, Any]] = lambda name, size: (size, 0)
    rounds: bool = False
    ring: Callable[[str], Ring | None] = lambda name: None

    def index(self, name: str, size: int, rank: int, axis: int) -> Any:
        """Global indices along one dim of a block, shaped to broadcast over a rank-``rank``
        tensor whose dim number ``axis`` it is."""
        local, offset = self.block(name, size)
        xp = self.xp
        ids = xp.arange(local, dtype=xp.int32)
        ids = ids.reshape((1,) * (self.lead + axis) + (local,) + (1,) * (rank - axis - 1))
        return self.expand(offset, rank) + ids

    def expand(self, offset: Any, rank: int) -> Any:
        """A block offset shaped to broadcast against arrays of ``rank`` tensor dims."""
        if self.lead and not isinstance(offset, int):
            return offset.reshape(offset.shape + (1,) * rank)
        return offset

    def axis(self, t: TensorType, dim: str) -> int:
        """Array axis of a dim."""
        return self.lead + t.names.index(dim)


@dataclass(frozen=True)
class OpDef:
    """One kind of op.

    infer: operand types and attributes -> result types; raises IRError.
    space: the iteration space (see ``Space``).
    evaluate: op, operand arrays, context -> result arrays.
    linear: sets of operands in which the op is linear together: when exactly those are partial
        sums on a mesh axis and the others replicated on it, the result is a partial sum.
    indexed: iteration dims whose global indices its meaning depends on, beside its operands.
    """

    infer: Callable[[tuple[TensorType, ...], Attrs], tuple[TensorType, ...]]
    space: Callable[[Op], Space]
    evaluate: Callable[[Op, list[Any], Context], list[Any]]
    linear: Callable[[Op], tuple[frozenset[int], ...]] = lambda op: ()
    indexed: Callable[[Op], tuple[str, ...]] = lambda op: ()


def need(condition: bool, message: str) -> None:
    if not condition:
        raise IRError(message)


def aligned_space(
    op: Op, kinds: Mapping[str, str] | None = None, along: Mapping[str, str] | None = None
) -> Space:
    """The space of an op whose operands and results share dims by name."""
    kinds = kinds or {}
    sizes: dict[str, int] = {}
    for value in (*op.operands, *op.results):
        for d in value.type.dims:
            sizes.setdefault(d.name, d.size)
    return Space(
        tuple(Iter(n, s, kinds.get(n, PARALLEL)) for n, s in sizes.items()),
        tuple(v.type.names for v in op.operands),
        tuple(v.type.names for v in op.results),
        tuple((along or {}).items()),
    )


def points(space: Space) -> int:
    """Number of points of an iteration space."""
    return math.prod(i.size for i in space.iters)


def transpose_to(
    x: Any, source: tuple[str, ...], target: tuple[str, ...], ctx: Context, insert: bool = True
) -> Any:
    """Array ``x`` with dims ``source`` as dims ``target``; absent ones become size-1 axes."""
    order = [source.index(n) for n in target if n in source]
    if order != sorted(order):
        x = ctx.xp.transpose(x, (*range(ctx.lead), *(ctx.lead + i for i in order)))
    if insert and len(order) < len(target):
        sizes = iter(x.shape[ctx.lead :])
        x = x.reshape((*x.shape[: ctx.lead], *(next(sizes) if n in source else 1 for n in target)))
    return x


def in_order(x: Any, axis: int, order: Sequence[int], xp: Any) -> Any:
    """``x`` with the equal blocks of an axis in another order."""
    blocks = xp.split(x, len(order), axis)
    return xp.concatenate([blocks[i] for i in order], axis)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes another."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
