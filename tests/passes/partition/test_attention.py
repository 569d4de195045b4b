"""Fused attention on any layout: masks know the global index, gradients of keys are partial."""

from __future__ import annotations

import numpy as np
import pytest

from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.mesh import Layout, Mesh, Partial, Strategy
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import differentiate
from neocc.passes.layout.algebra import op_layouts, strategies
from tests.passes.partition.checking import check
from tests.random_assignments import random_assignment, seeded
from tests.random_programs import inputs_for


def grouped(causal: bool = True, window: int | None = 5) -> Program:
    """Loss and gradients of attention whose queries share keys in pairs."""
    batch, seq, memory, kv_heads = Dim("batch", 4), Dim("seq", 8), Dim("memory", 8), Dim("kv", 4)
    group, head_dim = Dim("group", 2), Dim("head_dim", 3)
    g = Graph("grouped")
    x = g.parameter("x", (batch, seq, kv_heads, group, head_dim), "f64")
    y = g.parameter("y", (batch, kv_heads, memory, head_dim), "f64")
    z = g.parameter("z", (memory, batch, kv_heads, head_dim), "f64")
    out, _ = b.fused_attention(x, y, z, seq, memory, head_dim, causal, window, 0.5)
    return differentiate(g.build({"loss": (out * b.sin(x)).sum(*x.dims), "out": out}))


@pytest.mark.parametrize("text", ["2", "2x2", "2x4", "2x2x2"])
@pytest.mark.parametrize("causal, window", [(True, None), (True, 5), (False, 3)])
def test_any_layout_computes_the_same(causal: bool, window: int | None, text: str) -> None:
    program, mesh = grouped(causal, window), Mesh.parse(text)
    for seed in range(4):
        inputs = inputs_for(program, np.random.default_rng(seed))
        check(program, mesh, random_assignment(program, mesh, seeded(seed)), inputs)


def test_what_each_cut_makes_of_the_gradients() -> None:
    program, mesh = grouped(), Mesh.parse("2x2")
    (op,) = (o for o in program.body.ops if o.kind == "attention_grad")
    axes = {a for s in strategies(op, mesh) for a in s.axes}
    assert axes == {None, "batch", "seq", "kv", "group", "memory"}

    def made(*axes: str | None) -> tuple[Layout, ...]:
        return op_layouts(op, Strategy(axes))[1]

    total = Partial("sum")
    assert made("seq", "batch") == (
        Layout(("seq", "batch")),
        Layout((total, "batch")),
        Layout((total, "batch")),
    )
    assert made("group", None)[1] == Layout((total, None))
    assert made("kv", None)[1] == Layout(("kv", None))
    operands = op_layouts(op, Strategy(("seq", None)))[0]
    assert [lay.axes[0] for lay in operands] == ["seq", None, None, "seq", "seq", "seq"]
    # Keys that go round: each device has its own block of them, and of what is made for them.
    operands, results = op_layouts(op, Strategy(("memory", "group")))
    assert [lay.axes[0] for lay in operands] == ["seq", "memory", "memory", "seq", "seq", "seq"]
    assert results == (
        Layout(("seq", "group")),
        Layout(("memory", total)),
        Layout(("memory", total)),
    )
