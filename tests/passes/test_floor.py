"""One solve bounds the plans of a mesh under all its mappings."""

from __future__ import annotations

import pytest

from neocc.cost.hardware import chip
from neocc.cost.mappings import mappings
from neocc.cost.model import CostModel
from neocc.ir.builder import Graph, dot, tanh
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import gradients
from neocc.passes.layout.build import build
from neocc.passes.layout.solve import solve


def trained_product() -> Program:
    """Weights and activations of like size: every cut has to be paid for."""
    batch, embd, mlp = Dim("batch", 2**12), Dim("embd", 2**12), Dim("mlp", 2**14)
    g = Graph("trained_product")
    x = g.data("x", (batch, embd), "f32")
    up, down = g.parameter("up", (embd, mlp)), g.parameter("down", (mlp, embd))
    y = dot(tanh(dot(x, up, "embd")), down, "mlp")
    loss = (y * y).sum("batch", "embd")
    a, b = gradients(loss, [up, down])
    return g.build({"up": up - a * 0.1, "down": down - b * 0.1, "loss": loss})


@pytest.mark.parametrize(("name", "text"), [("v5p", "2x8"), ("h100", "4x8"), ("v5e", "2x8")])
def test_no_mapping_has_a_plan_below_the_floor(name: str, text: str):
    program, mesh, c = trained_product(), Mesh.parse(text), chip(name)
    kept = mappings(c, mesh.sizes)
    assert len(kept) > 1

    def best(cost: CostModel) -> float:
        return solve(build(program, mesh, cost)).objective

    steps = [best(CostModel.of(c, mesh, laid)) for laid in kept]
    assert len(set(steps)) > 1, "a program for which the mapping makes no difference"
    floor = best(CostModel.floor(c, mesh, kept))
    assert floor <= min(steps) * (1 + 1e-9)
    assert floor == pytest.approx(min(steps), rel=0.5)  # near enough to rule others out
