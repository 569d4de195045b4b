"""Moves of blocks between devices, or to their hosts' memory and back: a value keeps its global
type and changes its layout.

Attributes: ``axis``, the mesh axis's name; ``dim``, the dim that the axis cuts before
(all_gather, all_to_all) or after (local_slice, reduce_scatter) the move; ``to``, the dim that it
cuts after an all_to_all; ``reduction`` (``sum``, ``max``, ``min``) of the two that reduce.

They stand only in partitioned programs; executors run them, since only they know the mesh.
"""

from __future__ import annotations

from typing import Any

from neocc.ir.errors import IRError
from neocc.ir.ops.base import Attrs, Context, OpDef, Space, aligned_space, need
from neocc.ir.program import Op
from neocc.ir.types import TensorType

ATTRS: dict[str, tuple[str, ...]] = {
    "local_slice": ("axis", "dim"),
    "all_gather": ("axis", "dim"),
    "all_reduce": ("axis", "reduction"),
    "reduce_scatter": ("axis", "dim", "reduction"),
    "all_to_all": ("axis", "dim", "to"),
    "to_host": (),
    "to_device": (),
}
COLLECTIVES = frozenset(ATTRS)
HOST_MOVES = frozenset(("to_host", "to_device"))


def define(kind: str) -> OpDef:
    def infer(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
        need(len(types) == 1, f"{kind} takes one operand")
        for name in ATTRS[kind]:
            need(name in attrs, f"{kind} lacks the attribute {name!r}")
        for name in ("dim", "to"):
            if name in ATTRS[kind]:
                types[0].dim(attrs[name])
        return (TensorType(types[0].dims, types[0].dtype),)

    def space(op: Op) -> Space:
        return aligned_space(op)

    def evaluate(op: Op, args: list[Any], ctx: Context) -> list[Any]:
        raise IRError(f"{kind} moves blocks between devices; an executor that knows them runs it")

    return OpDef(infer, space, evaluate)


DEFS = {kind: define(kind) for kind in ATTRS}
