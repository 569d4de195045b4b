"""Elementwise work on the vector unit, against the TPU compiler's estimates for v5e."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.cost.vector import vector_time
from neocc.ir.builder import Graph, dot, einsum, exp, tanh
from neocc.ir.mesh import Mesh
from neocc.ir.types import Dim
from neocc.nn import softmax
from neocc.passes.layout.liveness import Fusion
from neocc.passes.plan import Plan, bodies, make_plan

A, B, C = Dim("a", 4096), Dim("b", 2048), Dim("c", 512)


def layer_seconds(plan: Plan) -> dict[str, float]:
    picked = plan.solution.picked.items()
    return {
        b.name: sum(c.seconds[i] for c, i in picked if c.region is b.region) / b.trips
        for b in bodies(plan.problem.program.body)
    }


# Cycles of a trip of each loop, summed from the compiler's text (libtpu 0.0.42), at 1.5 GHz.
@pytest.mark.parametrize(
    ("preset", "mesh", "layout", "fields", "cycles"),
    [
        ("gpt2-small", "4", "batch:x", {"batch": 64, "seq": 512}, (4_239_787, 7_323_497)),
        (
            "gpt3-xl",
            "2x4",
            "batch:x,batch:y",
            {"batch": 64, "layers": 4, "recompute": True},
            (35_123_117, 98_154_662),
        ),
    ],
)
def test_layers_with_stored_scores_take_what_the_compiler_estimates(
    preset: str, mesh: str, layout: str, fields: dict, cycles: tuple[int, int]
) -> None:
    fields = {"recompute": False, **fields, "attention_kernel": "unfused"}
    program = gpt.train_step(replace(gpt.PRESETS[preset], **fields))
    found = layer_seconds(make_plan(program, Mesh.parse(mesh), chip("v5e"), layout, None, 1e12))
    for name, count in zip(("layers forward", "layers backward"), cycles, strict=True):
        assert found[name] == pytest.approx(count / 1.5e9, rel=0.15)


def test_a_softmax_is_bound_by_the_vector_unit_and_a_sum_of_two_by_memory() -> None:
    g = Graph("p")
    x = g.data("x", (A, B), "f32")
    program = g.build({"y": softmax(x, "b"), "z": x + x})
    cost = CostModel.of(chip("v5e"), Mesh.parse("1"))
    ops = program.body.ops
    vector = cost.vector_seconds(ops[:-1], lambda dim: 1)
    moved = cost.traffic_seconds([x.value, x.value], lambda dim: 1)
    assert vector > 1.5 * moved
    assert cost.vector_seconds(ops[-1:], lambda dim: 1) < moved


def test_a_gpu_has_no_vector_bound() -> None:
    g = Graph("p")
    program = g.build({"y": exp(g.data("x", (A, B), "f32"))})
    assert vector_time(chip("h100"), [(op, A.size * B.size) for op in program.body.ops]) == 0


def test_what_elementwise_ops_alone_read_does_not_pass_through_memory_twice() -> None:
    g = Graph("p")
    x, w = g.data("x", (A, B), "f32"), g.parameter("w", (B, C))
    v, u = g.parameter("v", (C, B)), g.parameter("u", (C, B))
    h = dot(x, w, "b")
    narrow = tanh(h)
    y = einsum(narrow, v, "a b") + einsum(narrow, u, "a b")
    program = g.build({"y": y})
    fusion = Fusion.of(program.body)
    first, second, third = (op for op in program.body.ops if op.kind == "einsum")
    made = next(op for op in program.body.ops if op.kind == "tanh")
    assert h.value in fusion.unmoved_by(first)  # tanh reads it
    assert narrow.value in fusion.unmoved_by(second) & fusion.unmoved_by(third)
    assert fusion.again(made) == 1  # each of two products computes it
