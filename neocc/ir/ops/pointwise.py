"""Elementwise ops, which broadcast by dim name, and ``broadcast`` and ``cast``."""

from __future__ import annotations

from typing import Any

from neocc.ir.errors import IRError
from neocc.ir.ops.base import Attrs, Context, OpDef, Space, aligned_space, need, transpose_to
from neocc.ir.program import Op
from neocc.ir.types import DTYPES, TensorType, union_dims

ALL = frozenset
LINEAR: dict[str, tuple[frozenset[int], ...]] = {
    "add": (ALL({0, 1}),),
    "sub": (ALL({0, 1}),),
    "mul": (ALL({0}), ALL({1})),
    "div": (ALL({0}),),
    "neg": (ALL({0}),),
    "select": (ALL({1, 2}),),
    "detach": (ALL({0}),),
}


def error_function(xp: Any, x: Any) -> Any:
    """2 / sqrt(pi) times the integral of exp(-t * t) from 0 to x. NumPy has none."""
    if xp.__name__ == "numpy":
        from scipy.special import erf  # which JAX brings

        wide = x.astype("float32") if x.dtype.itemsize == 2 else x
        return erf(wide).astype(x.dtype, copy=False)
    from jax.lax import erf

    return erf(x)


UNARY: dict[str, Any] = {
    "neg": lambda xp, x: -x,
    "exp": lambda xp, x: xp.exp(x),
    "log": lambda xp, x: xp.log(x),
    "tanh": lambda xp, x: xp.tanh(x),
    "sqrt": lambda xp, x: xp.sqrt(x),
    "rsqrt": lambda xp, x: 1 / xp.sqrt(x),
    "abs": lambda xp, x: abs(x),
    "sin": lambda xp, x: xp.sin(x),
    "cos": lambda xp, x: xp.cos(x),
    "erf": error_function,
    "not": lambda xp, x: xp.logical_not(x),
    "detach": lambda xp, x: x,
}
BINARY: dict[str, Any] = {
    "add": lambda xp, x, y: x + y,
    "sub": lambda xp, x, y: x - y,
    "mul": lambda xp, x, y: x * y,
    "div": lambda xp, x, y: x / y,
    "pow": lambda xp, x, y: xp.power(x, y),
    "maximum": lambda xp, x, y: xp.maximum(x, y),
    "minimum": lambda xp, x, y: xp.minimum(x, y),
    "and": lambda xp, x, y: xp.logical_and(x, y),
    "or": lambda xp, x, y: xp.logical_or(x, y),
    "lt": lambda xp, x, y: x < y,
    "le": lambda xp, x, y: x <= y,
    "eq": lambda xp, x, y: x == y,
}
TERNARY: dict[str, Any] = {"select": lambda xp, c, x, y: xp.where(c, x, y)}
COMPARE = ("lt", "le", "eq")
FLOAT_ONLY = ("exp", "log", "tanh", "sqrt", "rsqrt", "sin", "cos", "erf", "div", "pow")
BOOL_ONLY = ("and", "or", "not")


def define(kind: str, arity: int, function: Any) -> OpDef:
    def infer(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
        need(len(types) == arity, f"{kind} takes {arity} operands, not {len(types)}")
        values = types[1:] if kind == "select" else types
        dtypes = {t.dtype for t in values}
        need(len(dtypes) == 1, f"{kind} mixes the dtypes {', '.join(sorted(dtypes))}; cast one")
        if kind == "select":
            need(types[0].dtype == "bool", f"select's condition is {types[0].dtype}, not bool")
        dtype = values[0].dtype
        if kind in FLOAT_ONLY:
            need(values[0].is_float, f"{kind} of {dtype}; cast it to a float dtype")
        if kind in BOOL_ONLY:
            need(dtype == "bool", f"{kind} of {dtype}, not bool")
        try:
            dims = union_dims(types)
        except IRError as error:
            raise IRError(f"{kind}: {error.message}") from None
        return (TensorType(dims, "bool" if kind in COMPARE else dtype),)

    def evaluate(op: Op, args: list[Any], ctx: Context) -> list[Any]:
        target = op.result.type.names
        aligned = [
            transpose_to(a, v.type.names, target, ctx)
            for a, v in zip(args, op.operands, strict=True)
        ]
        return [function(ctx.xp, *aligned)]

    return OpDef(infer, aligned_space, evaluate, lambda op: LINEAR.get(kind, ()))


def infer_cast(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 1, "cast takes one operand")
    return (TensorType(types[0].dims, attrs["dtype"]),)


def evaluate_cast(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    """``excess_precision``: only a device that multiplies in the narrow dtype has to round."""
    if op.attrs.get("excess_precision") and not ctx.rounds:
        return args
    return [args[0].astype(DTYPES[op.attrs["dtype"]])]


def linear_cast(op: Op) -> tuple[frozenset[int], ...]:
    """Sums are made before their rounding is put off to what reads them."""
    both_float = op.operands[0].type.is_float and op.result.type.is_float
    return (ALL({0}),) if both_float and not op.attrs.get("excess_precision") else ()


def infer_broadcast(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 1, "broadcast takes one operand")
    result = TensorType(tuple(attrs["dims"]), types[0].dtype)
    for d in types[0].dims:
        need(d in result.dims, f"broadcast drops dim {d}")
    return (result,)


def evaluate_broadcast(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    t = op.result.type
    x = transpose_to(args[0], op.operands[0].type.names, t.names, ctx)
    local = tuple(ctx.block(d.name, d.size)[0] for d in t.dims)
    return [ctx.xp.broadcast_to(x, (*x.shape[: ctx.lead], *local))]


def infer_constant(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(not types, "constant takes no operand")
    return (TensorType((), attrs["dtype"]),)


def evaluate_constant(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    return [ctx.xp.full((1,) * ctx.lead, op.attrs["value"], dtype=DTYPES[op.attrs["dtype"]])]


def scalar_space(op: Op) -> Space:
    return Space((), tuple(() for _ in op.operands), tuple(() for _ in op.results))


DEFS = {
    **{kind: define(kind, 1, f) for kind, f in UNARY.items()},
    **{kind: define(kind, 2, f) for kind, f in BINARY.items()},
    **{kind: define(kind, 3, f) for kind, f in TERNARY.items()},
    "cast": OpDef(
        infer_cast,
        aligned_space,
        evaluate_cast,
        linear_cast,
    ),
    "broadcast": OpDef(infer_broadcast, aligned_space, evaluate_broadcast, lambda op: (ALL({0}),)),
    # A zero on every device is also the terms of a sum of zero: an accumulator's start.
    "constant": OpDef(
        infer_constant,
        scalar_space,
        evaluate_constant,
        lambda op: (ALL(),) if op.attrs["value"] == 0 else (),
    ),
}
ELEMENTWISE = frozenset(DEFS) - {"constant"}
