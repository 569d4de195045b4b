"""Narrowing casts of stacked operands move out of their loops, and nothing changes."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_array_equal

from neocc.ir.builder import Graph, Tensor, dot, repeat, tanh
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.autodiff import gradients
from neocc.passes.hoist import hoist_casts
from neocc.passes.simplify import simplify

BATCH, EMBD, LAYERS = Dim("batch", 4), Dim("embd", 8), Dim("layers", 3)


def stack(read: str = "bf16") -> Program:
    g = Graph("stack")
    x = g.data("x", (BATCH, EMBD), "f32")
    w = g.parameter("w", (LAYERS, EMBD, Dim("mlp", 8)))

    def layer(x: Tensor, w: Tensor) -> Tensor:
        narrow = w.cast(read)
        h = dot(x.cast(read), narrow, "embd").cast("f32")
        return x + tanh(h).rename(mlp="embd")

    loss = repeat(LAYERS, layer, x, w, recompute=True).sum("batch", "embd")
    return g.build({"loss": loss, "dw": gradients(loss, [w])[0]})


def loops(program: Program) -> list:
    return [op for op in program.body.ops if op.kind == "repeat"]


def test_forward_and_backward_loops_read_one_narrow_copy_of_the_stack():
    program = simplify(hoist_casts(stack()))
    verify(program)
    casts = [op for op in program.body.ops if op.kind == "cast" and op.operands[0].name == "w"]
    assert len(casts) == 1 and casts[0].result.type.names == ("layers", "embd", "mlp")
    forward, backward = loops(program)
    assert casts[0].result in forward.operands and casts[0].result in backward.operands
    assert all(a.type.dtype != "f32" or a.name != "w" for a in forward.regions[0].args)


def test_hoisting_changes_no_number():
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(4, 8)).astype("f4"),
        "w": rng.normal(size=(3, 8, 8)).astype("f4"),
    }
    before, after = run_program(stack(), inputs), run_program(hoist_casts(stack()), inputs)
    for name, value in before.items():
        assert_array_equal(np.asarray(value), np.asarray(after[name]))


def test_a_widening_cast_stays_in_its_loop():
    program = hoist_casts(stack("f64"))
    assert not any(op.kind == "cast" and op.operands[0].name == "w" for op in program.body.ops)
