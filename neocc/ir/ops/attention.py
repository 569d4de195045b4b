"""Fused attention and its gradient: scores are never held whole.

``attention(q, k, v) -> out, lse`` for q[..., seq, head_dim] and k, v[..., memory, head_dim], dims
by name and in any order. Dims that q shares with k (batch, heads) are batch dims; those that only
q has, besides ``seq``, are queries that share their keys: grouped queries are q with the dims
kv_heads and group, where k and v have kv_heads alone. ``lse``: the log of the sum of exp(scores),
which the gradient needs; minus infinity where a query sees no key (there ``out`` is zero).

``attention_grad(q, k, v, out, lse, dout) -> dq, dk, dv`` makes the scores again from ``lse``
(Dao et al., "FlashAttention: fast and memory-efficient exact attention", 2022).

Attributes: ``seq``, ``memory`` and ``head_dim`` name dims; ``scale`` multiplies the scores;
``causal``: query i sees keys j <= i; ``window``, if given: only those with abs(i - j) < window;
``length``, if given: only the first so many keys (the others are padding). i and j are global
indices, wherever ``seq`` is cut. ``zigzag``, if given: both sequences lie in the zig-zag order of
so many devices (``attention_ring``), of which only such a ring cuts them.

Where one mesh axis cuts ``memory`` it cuts ``seq`` too, and the keys go round
(``attention_ring``).

Under NumPy the whole of the scores is made at once; under JAX, where they do not fit one tile, a
loop runs over the tiles that hold a visible score and keeps running maxima and sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from neocc.ir.mesh import Strategy
from neocc.ir.ops import attention_ring, attention_tiles
from neocc.ir.ops.attention_ring import Circle, Sent, circle, rows_go_round, sent, zigzag
from neocc.ir.ops.attention_tiles import (
    LOWEST,
    Kernel,
    Tiles,
    backward_loop,
    forward_loop,
    held_at_once,
    in_parts,
    merged,
    tiles,
)
from neocc.ir.ops.base import (
    RING,
    SEQUENTIAL,
    Attrs,
    Context,
    OpDef,
    Space,
    aligned_space,
    in_order,
    inverse,
    need,
    transpose_to,
)
from neocc.ir.program import Op
from neocc.ir.types import DTYPES, TensorType

PRODUCTS = {"attention": 2, "attention_grad": 5}  # of the size of the scores times head_dim
ATTENTION = frozenset(PRODUCTS)


@dataclass(frozen=True)
class Roles:
    """Names of dims by what they are to an op: see the module."""

    batch: tuple[str, ...]
    group: tuple[str, ...]
    seq: str
    memory: str
    head_dim: str

    @staticmethod
    def of(q: TensorType, k: TensorType, attrs: Attrs) -> Roles:
        seq, memory, head_dim = attrs["seq"], attrs["memory"], attrs["head_dim"]
        rest = [n for n in q.names if n not in (seq, head_dim)]
        batch = tuple(n for n in rest if k.has(n))
        return Roles(batch, tuple(n for n in rest if not k.has(n)), seq, memory, head_dim)


def roles(op: Op) -> Roles:
    return Roles.of(op.operands[0].type, op.operands[1].type, op.attrs)


# Types


def stats_type(q: TensorType, attrs: Attrs) -> TensorType:
    """Of ``lse``: q's dims without head_dim, seq last; at least f32."""
    seq = q.dim(attrs["seq"])
    rest = q.without([seq.name, attrs["head_dim"]])
    return TensorType((*rest.dims, seq), "f64" if q.dtype == "f64" else "f32")


def result_dtype(q: TensorType, attrs: Attrs) -> str:
    """Of out and of the gradients: that of the operands, if no other is asked for."""
    return attrs.get("dtype", q.dtype)


def check_operands(kind: str, types: tuple[TensorType, ...], attrs: Attrs) -> None:
    q, k, v = types[:3]
    seq, memory, head_dim = attrs["seq"], attrs["memory"], attrs["head_dim"]
    dtypes = {t.dtype for t in (q, k, v)}
    need(len(dtypes) == 1, f"{kind} mixes the dtypes {', '.join(sorted(dtypes))}; cast one")
    need(q.is_float, f"{kind} of {q.dtype}; cast it to a float dtype")
    for what, t, has, lacks in (("q", q, seq, memory), ("k", k, memory, seq)):
        need(t.has(has), f"{kind}: {what} lacks the dim {has!r}")
        need(t.has(head_dim), f"{kind}: {what} lacks the dim {head_dim!r}")
        need(not t.has(lacks), f"{kind}: {what} has the dim {lacks!r}; rename it")
    need(set(k.dims) == set(v.dims), f"{kind}: k is {k} and v is {v}; their dims must be the same")
    for d in k.dims:
        need(d.name == memory or d in q.dims, f"{kind}: k has the dim {d}, which q lacks")
    window, length = attrs.get("window"), attrs.get("length")
    need(window is None or window > 0, f"{kind}: a window of {window}; it is at least 1")
    size = k.dim(memory).size
    need(length is None or 0 <= length <= size, f"{kind}: {length} keys of the dim {memory}={size}")
    devices = attrs.get("zigzag")
    if devices is not None:
        halves, fits = 2 * devices, attrs["causal"] and window is None
        fits = fits and q.dim(seq).size == size and halves > 0 and size % halves == 0
        need(fits, f"{kind} is causal, without a window, of {halves} halves in zig-zag order")


def infer_attention(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 3, "attention takes three operands: q, k, v")
    check_operands("attention", types, attrs)
    return (TensorType(types[0].dims, result_dtype(types[0], attrs)), stats_type(types[0], attrs))


def infer_grad(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 6, "attention_grad takes six operands: q, k, v, out, lse, dout")
    check_operands("attention_grad", types, attrs)
    q, k, v, out, lse, dout = types
    dtype = result_dtype(q, attrs)
    for what, t in (("out", out), ("dout", dout)):
        same = set(t.dims) == set(q.dims) and t.dtype == dtype
        need(same, f"attention_grad: {what} is {t}, q is {q}; out has its dims and is {dtype}")
    stats = stats_type(q, attrs)
    same = set(lse.dims) == set(stats.dims) and lse.dtype == stats.dtype
    need(same, f"attention_grad: lse is {lse}, not {stats}")
    return tuple(TensorType(t.dims, dtype) for t in (q, k, v))


# Iteration spaces


def attention_space(op: Op) -> Space:
    return ring_space(op, {})


def grad_space(op: Op) -> Space:
    """dk and dv sum over the queries; dq has them."""
    r = roles(op)
    return ring_space(op, dict.fromkeys((r.seq, *r.group), "sum"))


def ring_space(op: Op, kinds: Mapping[str, str]) -> Space:
    r, devices = roles(op), op.attrs.get("zigzag")
    kinds = {**kinds, r.memory: RING, r.head_dim: SEQUENTIAL}
    if devices is not None:
        kinds[r.seq] = SEQUENTIAL
    return replace(aligned_space(op, kinds, {r.memory: r.seq}), devices=devices)


def contiguous(op: Op) -> Op:
    """The same op on sequences that lie as they come."""
    attrs = {name: value for name, value in op.attrs.items() if name != "zigzag"}
    return Op(op.kind, op.operands, op.results, attrs, op.regions, op.loc)


# Meaning


def keys_of(op: Op) -> int:
    """How many keys an op looks at."""
    return op.attrs.get("length", op.operands[1].type.dim(op.attrs["memory"]).size)


def lowered_tiles(op: Op, seq: int, cut: bool) -> Tiles:
    """The tiles that JAX computes of ``seq`` local queries; ``cut``: ``seq`` is cut."""
    attrs, start = op.attrs, None if cut else 0
    memory = op.operands[1].type.dim(attrs["memory"]).size
    window = attrs.get("window")
    return tiles(seq, memory, keys_of(op), attrs["causal"], window, start, attention_tiles.BLOCK)


def ring_axis(op: Op, strategy: Strategy) -> int | None:
    """The mesh axis along which an op sends its keys and values round, if it is one that does."""
    memory = op.attrs["memory"] if op.kind in ATTENTION else None
    return strategy.axes.index(memory) if memory in strategy.axes and memory else None


def circle_of(op: Op, devices: int) -> Circle:
    """How a ring of devices shares an op, whose ``seq`` and ``memory`` no other axis cuts."""
    r, attrs = roles(op), op.attrs
    q, k = (v.type for v in op.operands[:2])
    local = (q.dim(r.seq).size // devices, k.dim(r.memory).size // devices)
    ordered, block = "zigzag" in attrs, attention_tiles.BLOCK
    return circle(*local, attrs["causal"], attrs.get("window"), devices, block, ordered)


def ring_sends(op: Op, devices: int, parts: Callable[[str], int]) -> list[Sent]:
    """All permutes of one run on a ring of devices. ``parts``: into how many blocks each dim is
    cut, ``seq`` by the ring alone."""
    cut = {op.attrs["seq"]: devices, op.attrs["memory"]: devices}
    dims = (d for v in op.operands[:2] for d in v.type.dims)
    local = {d.name: d.size // cut.get(d.name, parts(d.name)) for d in dims}
    count = math.prod(local[n] for n in roles(op).batch)
    grad = op.kind == "attention_grad"
    return sent(circle_of(op, devices), grad, count, ring_bytes(op, local))


def ring_bytes(op: Op, local: Mapping[str, int]) -> dict[str, int]:
    """Bytes that a device of a ring has of each array that a run may send; ``local``: of every dim,
    its own elements."""
    q, k = (v.type for v in op.operands[:2])
    stats = stats_type(q, op.attrs)

    def size(t: TensorType, dtype: str) -> int:
        return math.prod(local[n] for n in t.names) * TensorType((), dtype).itemsize

    result = op.results[0].type.dtype
    found = {"lse": size(stats, stats.dtype), "stats": 2 * size(stats, stats.dtype)}
    found |= {"q": size(q, q.dtype), "dout": size(q, q.dtype), "out": size(q, result)}
    found |= {"k": size(k, k.dtype), "v": size(k, k.dtype)}
    for name, t in (("dq", q), ("dk", k), ("dv", k)):
        found |= {name: size(t, result), f"{name}+": size(t, stats.dtype)}
    return found


Groups = tuple[tuple[str, ...], ...]


def folded(x: Any, names: tuple[str, ...], groups: Groups, ctx: Context) -> Any:
    """``x`` with one array axis per group of dims."""
    x = transpose_to(x, names, tuple(n for g in groups for n in g), ctx)
    sizes = iter(x.shape[ctx.lead :])
    return x.reshape((*x.shape[: ctx.lead], *(math.prod(next(sizes) for _ in g) for g in groups)))


def unfolded(x: Any, groups: Groups, t: TensorType, local: dict[str, int], ctx: Context) -> Any:
    """The inverse of ``folded``, with the dims in the order of ``t`` and in its dtype."""
    names = tuple(n for g in groups for n in g)
    x = x.reshape((*x.shape[: ctx.lead], *(local[n] for n in names)))
    return transpose_to(x, names, t.names, ctx).astype(DTYPES[t.dtype])


@dataclass(frozen=True)
class Folds:
    """What becomes one array axis: of q, out and their gradients; of lse; of k and v."""

    rows: Groups
    stats: Groups
    columns: Groups


def prepared(op: Op, args: list[Any], ctx: Context) -> tuple[Folds, dict[str, int], Kernel, Tiles]:
    """How to fold the operands, local sizes by dim, and how to compute."""
    r, attrs = roles(op), op.attrs
    local: dict[str, int] = {}
    for v, x in zip(op.operands, args, strict=True):
        local.update(zip(v.type.names, x.shape[ctx.lead :], strict=True))
    q = op.operands[0].type
    _, start = ctx.block(r.seq, q.dim(r.seq).size)
    kernel = Kernel(
        xp=ctx.xp,
        start=start,
        group=math.prod(local[n] for n in r.group),
        scale=attrs["scale"],
        causal=attrs["causal"],
        window=attrs.get("window"),
        keys=keys_of(op),
        dtype=DTYPES[stats_type(q, attrs).dtype],
    )
    stats = (r.batch, r.group, (r.seq,))
    head = (r.head_dim,)
    folds = Folds((*stats, head), stats, (r.batch, (r.memory,), head))
    return folds, local, kernel, lowered_tiles(op, local[r.seq], not isinstance(start, int))


def all_indices(kernel: Kernel, seq: int, memory: int, ctx: Context) -> tuple[Any, Any]:
    """Global indices of all rows, [lead..., group seq], and of all keys."""
    xp = ctx.xp
    i = ctx.expand(kernel.start, 1) + xp.arange(seq, dtype=xp.int32)
    return xp.tile(i, kernel.group), xp.arange(memory, dtype=xp.int32)


def evaluate(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """Sequences in zig-zag order are put as they come, but for a ring that wants them so."""
    meaning = evaluate_attention if op.kind == "attention" else evaluate_grad
    if "zigzag" not in op.attrs or ctx.ring(op.attrs["memory"]) is not None:
        return meaning(op, args, ctx)
    order = zigzag(op.attrs["zigzag"])

    def put(x: Any, t: TensorType, order: Sequence[int]) -> Any:
        (at,) = (n for n in t.names if n in (op.attrs["seq"], op.attrs["memory"]))
        return in_order(x, ctx.axis(t, at), order, ctx.xp)

    back = inverse(order)
    args = [put(x, v.type, back) for x, v in zip(args, op.operands, strict=True)]
    made = meaning(contiguous(op), args, ctx)
    return [put(x, v.type, order) for x, v in zip(made, op.results, strict=True)]


def evaluate_attention(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    folds, local, kernel, cut = prepared(op, args, ctx)
    forms = (folds.rows, folds.columns, folds.columns)
    q, k, v = (
        folded(x, o.type.names, form, ctx)
        for x, o, form in zip(args, op.operands, forms, strict=True)
    )
    if (ring := ctx.ring(op.attrs["memory"])) is not None:
        dtype = DTYPES[op.results[0].type.dtype]
        made = attention_ring.forward(kernel, circle_of(op, ring.size), ring, q, k, v, dtype)
    elif ctx.xp.__name__ == "numpy" or cut.one:
        i, j = all_indices(kernel, q.shape[-2], k.shape[-2], ctx)
        nothing = (0.0, 0.0, kernel.dtype.type(LOWEST))
        made = kernel.finish(kernel.step(nothing, merged(q, ctx.lead + 1), k, v, i, j))
    else:
        loop = partial(forward_loop, kernel, cut)
        made = in_parts(loop, held_at_once(q, cut), q, k, v)
    forms = (folds.rows, folds.stats)
    return [
        unfolded(x, form, r.type, local, ctx)
        for x, form, r in zip(made, forms, op.results, strict=True)
    ]


def evaluate_grad(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    folds, local, kernel, cut = prepared(op, args, ctx)
    rows, columns = folds.rows, folds.columns
    forms = (rows, columns, columns, rows, folds.stats, rows)
    q, k, v, out, lse, dout = (
        folded(x, o.type.names, form, ctx)
        for x, o, form in zip(args, op.operands, forms, strict=True)
    )
    lse = kernel.finite(lse)
    delta = ctx.xp.sum(out.astype(kernel.dtype) * dout.astype(kernel.dtype), axis=-1)
    dout = dout.astype(q.dtype)
    if (ring := ctx.ring(op.attrs["memory"])) is not None:
        grads = attention_ring.backward(
            kernel,
            circle_of(op, ring.size),
            ring,
            (q, k, v, dout),
            (lse, delta),
            DTYPES[op.results[0].type.dtype],
            rows_go_round(ring_bytes(op, local)),
        )
    elif ctx.xp.__name__ == "numpy" or cut.one:
        i, j = all_indices(kernel, q.shape[-2], k.shape[-2], ctx)
        q, dout, lse, delta = (merged(x, ctx.lead + 1) for x in (q, dout, lse, delta))
        q, k = kernel.anew(q, k)
        grads = kernel.gradient(q, k, v, dout, lse, delta, i, j)
    else:
        loop = partial(backward_loop, kernel, cut)
        grads = in_parts(loop, held_at_once(q, cut), q, k, v, dout, lse, delta)
    return [
        unfolded(g, form, r.type, local, ctx)
        for g, form, r in zip(grads, forms, op.results, strict=False)
    ]


DEFS = {
    "attention": OpDef(infer_attention, attention_space, evaluate),
    "attention_grad": OpDef(infer_grad, grad_space, evaluate),
}
