"""The reference executor in NumPy: no compilation, so thousands of small programs a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neocc.ir.ops import OPS, Context
from neocc.ir.program import Op, Program, Region
from neocc.ir.types import DTYPES

CONTEXT = Context(np)


def run_numpy(program: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name from inputs by name; what ``run_program`` computes with JAX."""
    args = [np.asarray(inputs[i.name]) for i in program.inputs]
    with np.errstate(all="ignore"):
        return dict(zip(program.outputs, run_region(program.body, args), strict=True))


def run_region(region: Region, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(region.args, args, strict=True))
    for op in region.ops:
        operands = [env[v] for v in op.operands]
        if op.kind == "repeat":
            results = run_repeat(op, operands)
        else:
            results = OPS[op.kind].evaluate(op, operands, CONTEXT)
        env.update(zip(op.results, map(np.asarray, results), strict=True))
    return [env[v] for v in region.outputs]


def run_repeat(op: Op, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
    carries, stacked, dim = op.attrs["carries"], op.attrs["stacked"], op.attrs["dim"]
    carry, consts = list(operands[:carries]), operands[carries + stacked :]
    pairs = list(zip(op.operands, operands, strict=True))[carries : carries + stacked]
    stacks = [np.moveaxis(x, v.type.names.index(dim.name), 0) for v, x in pairs]
    made: list[list[np.ndarray]] = [[] for _ in op.results[carries:]]
    steps = range(dim.size)
    for i in reversed(steps) if op.attrs["reverse"] else steps:
        out = run_region(op.regions[0], [*carry, *(s[i] for s in stacks), *consts])
        carry = out[:carries]
        for slices, x in zip(made, out[carries:], strict=True):
            slices.append(x)
    for value, slices in zip(op.results[carries:], made, strict=True):
        slices = slices[::-1] if op.attrs["reverse"] else slices
        empty = np.zeros(value.type.shape, DTYPES[value.type.dtype])
        carry.append(np.stack(slices) if slices else empty)
    return carry
