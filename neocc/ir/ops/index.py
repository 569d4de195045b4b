"""Ops that know the global index: iota, gather (embedding), scatter_add, update, cumsum."""

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
    need,
    transpose_to,
)
from neocc.ir.program import Op
from neocc.ir.types import DTYPES, TensorType


def infer_iota(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(not types, "iota takes no operand")
    return (TensorType((attrs["dim"],), attrs["dtype"]),)


def evaluate_iota(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    dim = op.attrs["dim"]
    return [ctx.index(dim.name, dim.size, 1, 0).astype(DTYPES[op.attrs["dtype"]])]


def infer_gather(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    table, ids = types
    need(ids.dtype == "i32", f"gather's ids are {ids.dtype}, not i32")
    rest = table.without([table.dim(attrs["dim"]).name])
    both = set(rest.names) & set(ids.names)
    need(not both, f"gather: dim {', '.join(both)} is in the table and in the ids; rename one")
    need(not ids.has(attrs["dim"]), f"gather: the ids have the dim {attrs['dim']!r}; rename it")
    return (TensorType((*ids.dims, *rest.dims), table.dtype),)


def gather_space(op: Op) -> Space:
    """The table's dim is a sum: a device that lacks the row adds zero."""
    return aligned_space(op, {op.attrs["dim"]: "sum"})


def local_ids(ids: Any, dim: str, size: int, ctx: Context) -> tuple[Any, Any, int]:
    """Ids as positions in this device's block, whether they are in it, and the block's size."""
    local, offset = ctx.block(dim, size)
    at = ids - ctx.expand(offset, ids.ndim - ctx.lead)
    inside = (at >= 0) & (at < local) & (ids >= 0) & (ids < size)
    return ctx.xp.where(inside, at, 0), inside, local


def evaluate_gather(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """A row per id; an id outside the dim gives zeros."""
    table, ids = args
    xp, lead, dim = ctx.xp, ctx.lead, op.attrs["dim"]
    t = op.operands[0].type
    at, inside, local = local_ids(ids, dim, t.dim(dim).size, ctx)
    table = xp.moveaxis(table, ctx.axis(t, dim), lead)
    rank = table.ndim - lead - 1
    if local == 0:
        shape = xp.broadcast_shapes(table.shape[:lead], ids.shape[:lead])
        return [xp.zeros((*shape, *ids.shape[lead:], *table.shape[lead + 1 :]), table.dtype)]
    if lead:
        shape = xp.broadcast_shapes(table.shape[:lead], at.shape[:lead])
        table = xp.broadcast_to(table, (*shape, *table.shape[lead:]))
        at = xp.broadcast_to(at, (*shape, *at.shape[lead:]))
        flat = at.reshape((*shape, -1) + (1,) * rank)
        rows = xp.take_along_axis(table, flat, axis=lead)
        rows = rows.reshape((*at.shape, *table.shape[lead + 1 :]))
    else:
        rows = xp.take(table, at, axis=0, mode="clip")
    return [xp.where(inside.reshape(inside.shape + (1,) * rank), rows, xp.zeros((), rows.dtype))]


def infer_scatter_add(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    updates, ids = types
    need(ids.dtype == "i32", f"scatter_add's ids are {ids.dtype}, not i32")
    for d in ids.dims:
        need(d in updates.dims, f"scatter_add: the updates lack the ids' dim {d}")
    need(
        not ids.has(attrs["dim"].name), f"scatter_add: the ids have the dim {attrs['dim']}; rename"
    )
    return (TensorType((attrs["dim"], *updates.without(ids.names).dims), updates.dtype),)


def scatter_add_space(op: Op) -> Space:
    return aligned_space(op, dict.fromkeys(op.operands[1].type.names, "sum"))


def evaluate_scatter_add(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """Row r is the sum of the updates whose id is r; ids outside the dim are dropped."""
    updates, ids = args
    xp, lead, dim = ctx.xp, ctx.lead, op.attrs["dim"]
    at, inside, local = local_ids(ids, dim.name, dim.size, ctx)
    source, id_names = op.operands[0].type, op.operands[1].type.names
    rest = source.without(id_names).names
    order = [ctx.axis(source, n) for n in (*id_names, *rest)]
    updates = xp.transpose(updates, (*range(lead), *order))
    shape = xp.broadcast_shapes(updates.shape[:lead], at.shape[:lead])
    devices = 1
    for n in shape:
        devices *= n
    tail = updates.shape[lead + len(id_names) :]
    updates = xp.broadcast_to(updates, (*shape, *updates.shape[lead:]))
    mask = inside.reshape(inside.shape + (1,) * len(tail))
    updates = xp.where(mask, updates, xp.zeros((), updates.dtype))
    at = xp.broadcast_to(at, (*shape, *at.shape[lead:])).reshape(devices, -1)
    out = xp.zeros((devices * local, *tail), updates.dtype)
    if updates.size and local:
        rows = (at + local * xp.arange(devices, dtype=at.dtype)[:, None]).reshape(-1)
        flat = updates.reshape((-1, *tail))
        if xp.__name__ == "numpy":
            xp.add.at(out, rows, flat)
        else:
            out = out.at[rows].add(flat)
    return [out.reshape((*shape, local, *tail))]


def infer_update(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 3, "update takes three operands: what is written to, what, and where")
    x, new, at = types
    dim = attrs["dim"]
    need(at.dtype == "i32" and not at.dims, f"update's position is {at}, not an i32 scalar")
    need(x.dtype == new.dtype, f"update of {x.dtype} by {new.dtype}; cast one")
    need(x.has(dim), f"update along {dim!r}, which {x} does not have")
    same = set(new.dims) == set(x.without([dim]).dims)
    need(same, f"update of {x} along {dim!r} by {new}, which is not one row of it")
    return (x,)


def evaluate_update(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """``x`` with ``new`` in its row ``at`` along the dim, wherever the device has that row: one
    beyond either end is dropped."""
    x, new, at = args
    xp, lead, t = ctx.xp, ctx.lead, op.operands[0].type
    dim, rank = op.attrs["dim"], len(t.dims)
    axis, size = ctx.axis(t, dim), t.dim(dim).size
    new = transpose_to(new, op.operands[1].type.names, t.names, ctx)
    if lead or xp.__name__ == "numpy":
        here = ctx.index(dim, size, rank, axis - lead) == at.reshape(at.shape + (1,) * rank)
        return [xp.where(here, new, x)]
    local, offset = ctx.block(dim, size)
    if not x.size:
        return [x]
    # In place, where the operand may be overwritten: one row is read and written.
    from jax import lax

    row = xp.clip(at - offset, 0, local - 1)
    before = lax.dynamic_slice_in_dim(x, row, 1, axis)
    after = xp.where(row + offset == at, new, before)
    return [lax.dynamic_update_slice_in_dim(x, after, row, axis)]


def infer_cumsum(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    (t,) = types
    need(t.has(attrs["dim"]), f"cumsum along {attrs['dim']!r}, which {t} does not have")
    return types


def evaluate_cumsum(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    (x,) = args
    axis = ctx.axis(op.operands[0].type, op.attrs["dim"])
    if op.attrs["reverse"]:
        return [ctx.xp.flip(ctx.xp.cumsum(ctx.xp.flip(x, axis), axis=axis, dtype=x.dtype), axis)]
    return [ctx.xp.cumsum(x, axis=axis, dtype=x.dtype)]


def iota_space(op: Op) -> Space:
    d = op.attrs["dim"]
    return Space((Iter(d.name, d.size),), (), ((d.name,),))


def along_dim(op: Op) -> tuple[str, ...]:
    dim = op.attrs["dim"]
    return (dim if isinstance(dim, str) else dim.name,)


FIRST = (frozenset({0}),)
DEFS = {
    "iota": OpDef(infer_iota, iota_space, evaluate_iota, indexed=along_dim),
    "gather": OpDef(infer_gather, gather_space, evaluate_gather, lambda op: FIRST, along_dim),
    "scatter_add": OpDef(
        infer_scatter_add, scatter_add_space, evaluate_scatter_add, lambda op: FIRST, along_dim
    ),
    "update": OpDef(
        infer_update, aligned_space, evaluate_update, lambda op: (frozenset({0, 1}),), along_dim
    ),
    "cumsum": OpDef(
        infer_cumsum,
        lambda op: aligned_space(op, {op.attrs["dim"]: SEQUENTIAL}),
        evaluate_cumsum,
        lambda op: FIRST,
    ),
}
