"""Ops that move elements: rename, split, merge, slice, concat, pad, shift, reorder."""

from __future__ import annotations

from typing import Any

from neocc.ir.ops.base import (
    SEQUENTIAL,
    Attrs,
    Context,
    Iter,
    OpDef,
    Space,
    aligned_space,
    in_order,
    need,
    transpose_to,
)
from neocc.ir.program import Op
from neocc.ir.types import Dim, TensorType


def acted_on(op: Op) -> list[str]:
    """Names of the dims that an op's attributes speak of."""
    listed = [v if isinstance(v, tuple) else (v,) for v in op.attrs.values()]
    return [v.name if isinstance(v, Dim) else v for values in listed for v in values]


def replace_dim(t: TensorType, old: str, new: tuple[Dim, ...]) -> TensorType:
    dims: list[Dim] = []
    for d in t.dims:
        dims.extend(new if d.name == old else (d,))
    return TensorType(tuple(dims), t.dtype)


def infer_rename(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    old, new = attrs["dim"], attrs["to"]
    need(t.has(old), f"rename of {old!r}, which {t} does not have")
    need(not t.has(new), f"rename to {new!r}, which {t} already has")
    return (replace_dim(t, old, (Dim(new, t.dim(old).size),)),)


def rename_space(op: Op) -> Space:
    """Both names follow one iteration dim, called by the new name."""
    result = op.result.type
    iters = tuple(Iter(d.name, d.size) for d in result.dims)
    return Space(iters, (result.names,), (result.names,))


def infer_split(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    major, minor = attrs["into"]
    whole = t.dim(attrs["dim"])
    need(
        major.size * minor.size == whole.size,
        f"split of {whole} into {major} and {minor}: {major.size} x {minor.size} != {whole.size}",
    )
    return (replace_dim(t, whole.name, (major, minor)),)


def split_space(op: Op) -> Space:
    """A cut of the whole dim is a cut of its major part."""
    major, minor = op.attrs["into"]
    result = op.result.type
    iters = tuple(
        Iter(d.name, d.size, SEQUENTIAL if d.name == minor.name else "parallel")
        for d in result.dims
    )
    whole = op.attrs["dim"]
    operand = tuple(major.name if n == whole else n for n in op.operands[0].type.names)
    return Space(iters, (operand,), (result.names,))


def evaluate_split(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    (x,) = args
    major, minor = op.attrs["into"]
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    local = x.shape[axis] // minor.size if minor.size else ctx.block(major.name, major.size)[0]
    return [x.reshape((*x.shape[:axis], local, minor.size, *x.shape[axis + 1 :]))]


def infer_merge(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    major, minor = (t.dim(n) for n in attrs["dims"])
    out = Dim(attrs["to"], major.size * minor.size)
    return (replace_dim(t.without([minor.name]), major.name, (out,)),)


def merge_space(op: Op) -> Space:
    major, minor = op.attrs["dims"]
    operand = op.operands[0].type
    iters = tuple(
        Iter(d.name, d.size, SEQUENTIAL if d.name == minor else "parallel") for d in operand.dims
    )
    result = tuple(major if n == op.attrs["to"] else n for n in op.result.type.names)
    return Space(iters, (operand.names,), (result,))


def evaluate_merge(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    major, minor = op.attrs["dims"]
    source = op.operands[0].type
    order: list[str] = []
    for n in source.names:
        if n != minor:
            order.extend((n, minor) if n == major else (n,))
    x = transpose_to(args[0], source.names, tuple(order), ctx)
    axis = ctx.lead + order.index(major)
    merged = x.shape[axis] * x.shape[axis + 1]
    return [x.reshape((*x.shape[:axis], merged, *x.shape[axis + 2 :]))]


def infer_slice(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    source, to, start = t.dim(attrs["dim"]), attrs["to"], attrs["start"]
    need(
        start >= 0 and start + to.size <= source.size,
        f"slice [{start}, {start + to.size}) of {source} is out of range",
    )
    return (replace_dim(t, source.name, (to,)),)


def uncut_space(op: Op, gone: tuple[str, ...], made: str) -> Space:
    """Dims by name, where ``gone`` (of operands) and ``made`` (of the result) cannot be cut."""
    sizes = {d.name: d.size for v in op.operands for d in v.type.dims if d.name not in gone}
    return Space(
        tuple(Iter(n, s) for n, s in sizes.items()),
        tuple(tuple(None if n in gone else n for n in v.type.names) for v in op.operands),
        (tuple(None if n == made else n for n in op.result.type.names),),
    )


def evaluate_slice(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    start = op.attrs["start"]
    return [args[0][(slice(None),) * axis + (slice(start, start + op.attrs["to"].size),)]]


def infer_concat(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    dims, to = attrs["dims"], attrs["to"]
    need(0 < len(types) == len(dims), "concat takes one dim name per operand")
    need(len({t.dtype for t in types}) == 1, "concat mixes dtypes; cast one")
    sizes = [t.dim(n).size for t, n in zip(types, dims, strict=True)]
    need(sum(sizes) == to.size, f"concat of sizes {sizes} does not make {to}")
    rest = [set(t.without([n]).dims) for t, n in zip(types, dims, strict=True)]
    need(all(r == rest[0] for r in rest), "concat: the other dims differ")
    return (replace_dim(types[0], dims[0], (to,)),)


def evaluate_concat(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    target = op.result.type.names
    to = op.attrs["to"].name
    parts = []
    for x, v, n in zip(args, op.operands, op.attrs["dims"], strict=True):
        names = tuple(to if m == n else m for m in v.type.names)
        parts.append(transpose_to(x, names, target, ctx))
    if ctx.lead:
        lead = ctx.xp.broadcast_shapes(*(p.shape[: ctx.lead] for p in parts))
        parts = [ctx.xp.broadcast_to(p, (*lead, *p.shape[ctx.lead :])) for p in parts]
    return [ctx.xp.concatenate(parts, axis=ctx.lead + target.index(to))]


def infer_pad(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    source, to, before = t.dim(attrs["dim"]), attrs["to"], attrs["before"]
    need(before >= 0 and before + source.size <= to.size, f"pad of {source} to {to} cuts it")
    return (replace_dim(t, source.name, (to,)),)


def evaluate_pad(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    before = op.attrs["before"]
    after = op.attrs["to"].size - before - args[0].shape[axis]
    width = [(0, 0)] * args[0].ndim
    width[axis] = (before, after)
    return [ctx.xp.pad(args[0], width, constant_values=op.attrs["value"])]


def infer_shift(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    need(t.has(attrs["dim"]), f"shift along {attrs['dim']!r}, which {t} does not have")
    return types


def evaluate_shift(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """Element i of the result is element i - by of the operand, zero where there is none."""
    (x,) = args
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    size, by = x.shape[axis], op.attrs["by"]
    by = max(-size, min(size, by))
    keep = slice(0, size - by) if by >= 0 else slice(-by, size)
    width = [(0, 0)] * x.ndim
    width[axis] = (by, 0) if by >= 0 else (0, -by)
    return [ctx.xp.pad(x[(slice(None),) * axis + (keep,)], width)]


def infer_reorder(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    dim, order = attrs["dim"], attrs["order"]
    need(t.has(dim), f"reorder along {dim!r}, which {t} does not have")
    blocks = len(order)
    need(sorted(order) == [*range(blocks)], f"reorder: {order} does not name each block once")
    size = t.dim(dim).size
    need(blocks > 0 and size % blocks == 0, f"reorder: {dim}={size} in {blocks} equal blocks")
    return types


def evaluate_reorder(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """Equal blocks along a dim: block i of the result is block order[i] of the operand."""
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    return [in_order(args[0], axis, op.attrs["order"], ctx.xp)]


FIRST = (frozenset({0}),)
DEFS = {
    "rename": OpDef(infer_rename, rename_space, lambda op, args, ctx: list(args), lambda op: FIRST),
    "split": OpDef(infer_split, split_space, evaluate_split, lambda op: FIRST),
    "merge": OpDef(infer_merge, merge_space, evaluate_merge, lambda op: FIRST),
    "slice": OpDef(
        infer_slice,
        lambda op: uncut_space(op, (op.attrs["dim"],), op.attrs["to"].name),
        evaluate_slice,
        lambda op: FIRST,
    ),
    "concat": OpDef(
        infer_concat,
        lambda op: uncut_space(op, tuple(op.attrs["dims"]), op.attrs["to"].name),
        evaluate_concat,
        lambda op: (frozenset(range(len(op.operands))),),
    ),
    "pad": OpDef(
        infer_pad,
        lambda op: uncut_space(op, (op.attrs["dim"],), op.attrs["to"].name),
        evaluate_pad,
        lambda op: FIRST if op.attrs["value"] == 0 else (),
    ),
    "shift": OpDef(
        infer_shift,
        lambda op: aligned_space(op, {op.attrs["dim"]: SEQUENTIAL}),
        evaluate_shift,
        lambda op: FIRST,
    ),
    "reorder": OpDef(
        infer_reorder,
        lambda op: aligned_space(op, {op.attrs["dim"]: SEQUENTIAL}),
        evaluate_reorder,
        lambda op: FIRST,
    ),
}
