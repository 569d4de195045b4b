"""``einsum`` of two tensors by dim name, and ``reduce``."""

from __future__ import annotations

from typing import Any

from neocc.ir.ops.base import Attrs, Context, OpDef, Space, aligned_space, need
from neocc.ir.program import Op
from neocc.ir.types import DTYPES, TensorType, union_dims

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
REDUCTIONS = ("sum", "max", "min")


def infer_einsum(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 2, "einsum takes two operands")
    need(types[0].dtype == types[1].dtype, f"einsum of {types[0].dtype} and {types[1].dtype}")
    sizes = {d.name: d for d in union_dims(types)}
    for name in attrs["out"]:
        need(name in sizes, f"einsum: no operand has the result's dim {name!r}")
    dims = tuple(sizes[name] for name in attrs["out"])
    return (TensorType(dims, attrs.get("dtype", types[0].dtype)),)


def einsum_space(op: Op) -> Space:
    kept = op.result.type.names
    names = {n for v in op.operands for n in v.type.names}
    return aligned_space(op, {n: "sum" for n in names if n not in kept})


def einsum_spec(
    operands: tuple[TensorType, ...], result: TensorType, lead: int = 0
) -> tuple[str, dict[str, str]]:
    """``ab,bc->ac``, and the letter of each dim; ``lead`` more dims stand before all others."""
    names = list(dict.fromkeys(n for t in operands for n in t.names))
    letter = dict(zip(names, LETTERS[lead:], strict=False))
    terms = [LETTERS[:lead] + "".join(letter[n] for n in t.names) for t in (*operands, result)]
    return f"{terms[0]},{terms[1]}->{terms[2]}", letter


def evaluate_einsum(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    types = tuple(v.type for v in op.operands)
    spec, _ = einsum_spec(types, op.result.type, ctx.lead)
    dtype = DTYPES[op.result.type.dtype]
    if ctx.xp.__name__ == "numpy":
        wide = [x.astype("float32") if x.dtype.itemsize == 2 else x for x in args]
        return [ctx.xp.einsum(spec, *wide, optimize=True).astype(dtype, copy=False)]
    return [ctx.xp.einsum(spec, *args, preferred_element_type=dtype)]


def infer_reduce(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 1, "reduce takes one operand")
    need(attrs["op"] in REDUCTIONS, f"reduce by {attrs['op']!r}; one of {', '.join(REDUCTIONS)}")
    for name in attrs["dims"]:
        need(types[0].has(name), f"reduce over {name!r}, which {types[0]} does not have")
    return (types[0].without(attrs["dims"]).with_dtype(types[0].dtype),)


def reduce_space(op: Op) -> Space:
    reduction: str = op.attrs["op"]
    return aligned_space(op, dict.fromkeys(op.attrs["dims"], reduction))


def evaluate_reduce(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    axes = tuple(ctx.axis(op.operands[0].type, n) for n in op.attrs["dims"])
    x = args[0]
    if op.attrs["op"] == "sum":
        return [ctx.xp.sum(x, axis=axes, dtype=x.dtype)]
    reducer = ctx.xp.max if op.attrs["op"] == "max" else ctx.xp.min
    return [reducer(x, axis=axes, initial=identity(op.attrs["op"], op.result.type.dtype))]


def identity(reduction: str, dtype: str) -> float | int:
    """The element that leaves a reduction unchanged."""
    if reduction == "sum":
        return 0
    low = reduction == "max"
    if dtype in ("i32", "u32"):
        info = {"i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1)}[dtype]
        return info[0] if low else info[1]
    return float("-inf") if low else float("inf")


DEFS = {
    "einsum": OpDef(
        infer_einsum,
        einsum_space,
        evaluate_einsum,
        lambda op: (frozenset({0}), frozenset({1})),
    ),
    "reduce": OpDef(
        infer_reduce,
        reduce_space,
        evaluate_reduce,
        lambda op: (frozenset({0}),) if op.attrs["op"] == "sum" else (),
    ),
}
