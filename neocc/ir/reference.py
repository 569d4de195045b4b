"""Run an unpartitioned program with JAX: what every partitioned one is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from neocc.ir.errors import IRError
from neocc.ir.ops import OPS, Context
from neocc.ir.program import Op, Program, Region

CONTEXT = Context(jnp)


def run_region(region: Region, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(region.args, args, strict=True))
    for op in region.ops:
        operands = [env[v] for v in op.operands]
        if op.kind == "repeat":
            results = scan_repeat(op, operands, run_region)
        else:
            results = OPS[op.kind].evaluate(op, operands, CONTEXT)
        env.update(zip(op.results, results, strict=True))
    return [env[v] for v in region.outputs]


def scan_repeat(op: Op, operands: Sequence[Any], run: Any) -> list[Any]:
    """``repeat`` as ``jax.lax.scan``; ``run(region, arguments)`` runs the body."""
    carries, stacked = op.attrs["carries"], op.attrs["stacked"]
    dim, region = op.attrs["dim"], op.regions[0]
    xs = []
    for v, x in zip(op.operands[carries:], operands[carries : carries + stacked], strict=False):
        xs.append(jnp.moveaxis(x, v.type.names.index(dim.name), 0))
    consts = operands[carries + stacked :]

    def step(carry: Any, slices: Any) -> Any:
        out = run(region, [*carry, *slices, *consts])
        return tuple(out[:carries]), tuple(out[carries:])

    carry, ys = jax.lax.scan(
        step, tuple(operands[:carries]), tuple(xs), length=dim.size, reverse=op.attrs["reverse"]
    )
    return [*carry, *ys]


def run_program(program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name from inputs by name (arrays of the inputs' global shapes).

    Raises:
        IRError: an input is missing or has the wrong shape.
    """
    args = []
    for info, value in program.named_inputs:
        if info.name not in inputs:
            raise IRError(f"program {program.name!r} needs the input {info.name!r}")
        array = jnp.asarray(inputs[info.name])
        if array.shape != value.type.shape:
            raise IRError(f"input {info.name!r} has shape {array.shape}, not {value.type.shape}")
        args.append(array)
    return dict(zip(program.outputs, run_region(program.body, args), strict=True))
