"""``repeat``: one region run once per index of a dim (the layers of a model).

Operands: the carried values, then the stacked ones (they have the dim; the region sees one
slice), then the constant ones. Region outputs: the carried values of the next step, then one
slice of each stacked result. Results: the final carried values, then the stacked results with
the dim in front. ``reverse`` runs from the last index to the first.

Executors and partitioning handle regions themselves; the definition here gives the types.

``either``: two ways to the same value, of which a plan takes one: a kept value, or the ops that
compute it again (``passes.remat``).
"""

from __future__ import annotations

from typing import Any

from neocc.ir.errors import IRError
from neocc.ir.ops.base import Attrs, Context, OpDef, Space, aligned_space, need
from neocc.ir.program import Op, Region
from neocc.ir.types import Dim, TensorType


def repeat_types(
    operands: tuple[TensorType, ...], attrs: Attrs, region: Region
) -> tuple[TensorType, ...]:
    """Result types of a repeat.

    Raises:
        IRError: operands, region arguments and region outputs do not fit each other.
    """
    dim: Dim = attrs["dim"]
    carries, stacked = attrs["carries"], attrs["stacked"]
    need(len(operands) == len(region.args), "repeat: as many operands as region arguments")
    for i, (t, arg) in enumerate(zip(operands, region.args, strict=True)):
        inner = t
        if carries <= i < carries + stacked:
            need(dim in t.dims, f"repeat: stacked operand {t} lacks the dim {dim}")
            inner = t.without([dim.name])
        need(inner == arg.type, f"repeat: operand {inner} meets region argument {arg.type}")
    for i in range(carries):
        out = region.outputs[i].type
        need(out == operands[i], f"repeat: carried {operands[i]} leaves the region as {out}")
    outs = [v.type for v in region.outputs]
    for t in outs:
        need(not t.has(dim.name), f"repeat: region output {t} already has the dim {dim}")
    stacked_outs = (TensorType((dim, *t.dims), t.dtype) for t in outs[carries:])
    return (*outs[:carries], *stacked_outs)


def refuse(*_: Any) -> Any:
    raise IRError("repeat holds a region; walk into it")


def refuse_infer(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    return refuse()


def refuse_space(op: Op) -> Space:
    return refuse()


def refuse_evaluate(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    return refuse()


def infer_either(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    need(len(types) == 2, "either takes a kept value and a recomputed one")
    need(types[0] == types[1], f"either of {types[0]} and {types[1]}, which differ")
    return types[:1]


DEFS = {
    "repeat": OpDef(refuse_infer, refuse_space, refuse_evaluate),
    "either": OpDef(infer_either, aligned_space, lambda op, args, ctx: [args[0]]),
}
