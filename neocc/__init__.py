"""neocc: a compiler for large GPT models.

Write a training step once, over named dimensions; neocc decides how to lay it out on a mesh of
TPUs or GPUs, proves the choice optimal under a cost model, and lowers it to JAX with every
collective explicit:

    import neocc

    step = neocc.simplify(train_step(config))
    plan = neocc.make_plan(step, neocc.Mesh.parse("8x16"), neocc.chip("v5p"))
    plan.timeline.step, plan.memory.peak, plan.solution.gap

Build programs with ``Graph``, ``Dim`` and the functions of ``neocc.ir.builder`` (``einsum``,
``repeat``, ...), ``neocc.nn`` and ``neocc.optim``; differentiate with ``gradients``; look at them
with ``print_program``; run a plan's ``partitioned`` program on devices with ``lower``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neocc.cost.calibration import chip_of_file
from neocc.cost.hardware import Chip, chip
from neocc.ir.builder import (
    Graph,
    Tensor,
    einsum,
    fused_attention,
    gather,
    iota,
    repeat,
    select,
)
from neocc.ir.errors import IRError, LayoutError, NeoccError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Program
from neocc.ir.text import parse_program, print_program
from neocc.ir.types import Dim, TensorType
from neocc.passes.autodiff import gradients
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.version import VERSION

if TYPE_CHECKING:
    from neocc.lower.jax import lower

__version__ = VERSION

__all__ = [
    "Chip",
    "Dim",
    "Graph",
    "IRError",
    "Layout",
    "LayoutError",
    "Mesh",
    "NeoccError",
    "Plan",
    "Program",
    "Tensor",
    "TensorType",
    "chip",
    "chip_of_file",
    "einsum",
    "fused_attention",
    "gather",
    "gradients",
    "iota",
    "lower",
    "make_plan",
    "parse_program",
    "print_program",
    "repeat",
    "select",
    "simplify",
]


def __getattr__(name: str) -> Any:
    """``lower`` brings JAX, which takes a second to import: only those who use it wait for it."""
    if name == "lower":
        from neocc.lower.jax import lower

        return lower
    raise AttributeError(f"module 'neocc' has no attribute {name!r}")
