"""Seconds of elementwise work on a TPU's vector unit, which bounds a softmax more than memory does.

A vector register holds 8 x 128 values of 32 bits, narrower ones are widened. ``CYCLES`` are those
that the TPU compiler's own estimates (``estimated_cycles``, libtpu 0.0.42, v5e) count per register
and op, read off fusions of two programs: softmax forward 16.5 to 21 (scale, mask, subtract, exp,
sum), division and cast 11 to 13, its gradient 24 to 28, Adam 49 to 65, a sum along the lanes 14
and along the sublanes 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from neocc.cost.hardware import Chip
from neocc.ir.program import Op

# A product with one row or one column, which is summed here: 14.4 and 14.6 a register of the larger
# operand in bf16, 18.7 in f32 (a query on 2048 keys of 128; 1024 on 1024 x 4096).
SINGLE_ROW = 15.0
REGISTER = 1024  # values of 32 bits
BASIC = 1.2
CYCLES = {
    "exp": 5.0,
    "log": 5.0,
    "tanh": 5.0,
    "sin": 10.0,
    "cos": 10.0,
    "erf": 12.0,  # not read off: a rational function of twelve products
    "pow": 12.0,
    "sqrt": 5.0,
    "rsqrt": 5.0,
    "div": 10.0,
    "reduce": 6.0,  # between a sum along sublanes and one along lanes
    "random": 30.0,
}
FREE = ("constant", "iota", "rename", "split", "merge", "broadcast", "detach", "either")


def vector_time(chip: Chip, ops: Iterable[tuple[Op, int]]) -> float:
    """Seconds of ops on so many local values each; 0 where the chip's rate is not known."""
    if chip.vector_clock is None:
        return 0.0
    cycles = sum(cycles_per_register(op) * math.ceil(size / REGISTER) for op, size in ops)
    return cycles / chip.vector_clock


def single_row_time(chip: Chip, multiplied: int) -> float:
    """Seconds of a product with one row or one column and so many multiply-adds."""
    if chip.vector_clock is None:
        return 0.0
    return SINGLE_ROW * math.ceil(multiplied / REGISTER) / chip.vector_clock


def cycles_per_register(op: Op) -> float:
    return 0.0 if op.kind in FREE else CYCLES.get(op.kind, BASIC)
