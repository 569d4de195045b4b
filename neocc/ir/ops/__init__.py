"""The op vocabulary: one file per family, one table of definitions."""

from __future__ import annotations

from neocc.ir.ops import (
    attention,
    collective,
    contraction,
    control,
    index,
    pointwise,
    random,
    shape,
)
from neocc.ir.ops.attention import ATTENTION
from neocc.ir.ops.base import Context, Iter, OpDef, Space
from neocc.ir.ops.collective import COLLECTIVES, HOST_MOVES
from neocc.ir.ops.control import repeat_types
from neocc.ir.ops.pointwise import ELEMENTWISE

OPS: dict[str, OpDef] = {
    **pointwise.DEFS,
    **contraction.DEFS,
    **shape.DEFS,
    **index.DEFS,
    **random.DEFS,
    **attention.DEFS,
    **control.DEFS,
    **collective.DEFS,
}

__all__ = [
    "ATTENTION",
    "COLLECTIVES",
    "ELEMENTWISE",
    "HOST_MOVES",
    "OPS",
    "Context",
    "Iter",
    "OpDef",
    "Space",
    "repeat_types",
]
