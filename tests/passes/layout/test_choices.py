"""What plans choose: gathers shared, partial sums added first, memory kept to."""

from __future__ import annotations

import itertools

import pytest

from neocc.cost.hardware import chip
from neocc.ir.builder import Graph, Tensor, dot, einsum, repeat, tanh
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import gradients
from neocc.passes.layout.problem import Rules
from neocc.passes.plan import make_plan

BATCH, EMBD, MLP = Dim("batch", 64), Dim("embd", 256), Dim("mlp", 512)


def perceptron() -> Program:
    g = Graph("perceptron")
    x = g.data("x", (BATCH, EMBD), "bf16")
    w, v = g.parameter("w", (EMBD, MLP), "bf16"), g.parameter("v", (MLP, EMBD), "bf16")
    return g.build({"y": x + dot(tanh(dot(x, w, "embd")), v, "mlp")})


def shared_input() -> Program:
    """One tensor read by three products, which should share one gather."""
    g = Graph("shared")
    x = g.data("x", (BATCH, EMBD), "bf16")
    h = tanh(x)
    ws = [g.parameter(n, (EMBD, Dim(f"out_{n}", 33)), "bf16") for n in "abc"]
    return g.build({f"y{i}": dot(h, w, "embd") for i, w in enumerate(ws)})


def sum_of_products() -> Program:
    """Partial sums are better added before they are reduced."""
    g = Graph("sums")
    xs = [g.data(n, (BATCH, MLP), "bf16") for n in ("x1", "x2")]
    ws = [g.parameter(n, (MLP, EMBD), "bf16") for n in "vw"]
    a, b = (dot(x, w, "mlp") for x, w in zip(xs, ws, strict=True))
    return g.build({"y": tanh(a + b)})


def layers() -> Program:
    g = Graph("layers")
    depth = Dim("layers", 4)
    x = g.data("x", (BATCH, EMBD), "bf16")
    w = g.parameter("w", (depth, EMBD, MLP), "bf16")

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return x + einsum(tanh(dot(x, w, "embd")), w, ("batch", "embd"))

    return g.build({"y": repeat(depth, layer, x, w)})


def gradient() -> Program:
    g = Graph("gradient")
    x, w = g.data("x", (BATCH, EMBD), "f32"), g.parameter("w", (EMBD, MLP))
    y = dot(x, w, "embd")
    loss = (y * y).sum("batch", "mlp")
    return g.build({"w": w - gradients(loss, [w])[0], "loss": loss})


def test_three_products_of_one_input_share_one_gather():
    rules = Rules(
        strategy=lambda op, s: op.kind != "einsum" or s.axes == (None,),
        stored=lambda info, type, layout: info.name != "x" or layout.axes == ("batch",),
    )
    plan = make_plan(shared_input(), Mesh.parse("4"), chip("v5e"), rules=rules)
    assert [c.kind for c in plan.collectives if c.kind != "slice"] == ["all_gather"]


def test_partial_sums_are_added_before_they_are_reduced():
    plan = make_plan(sum_of_products(), Mesh.parse("4"), chip("v5e"), "mlp:x")
    assert [c.kind for c in plan.collectives if c.kind != "slice"] == ["all_reduce"]


@pytest.mark.parametrize("make", [perceptron, layers, gradient])
def test_less_memory_is_kept_to_and_never_faster(make):
    mesh, target = Mesh.parse("2x4"), chip("v5e")
    free = make_plan(make(), mesh, target)
    limits = [free.memory.peak * share for share in (0.9, 0.7, 0.5)]
    plans = [make_plan(make(), mesh, target, memory_limit=limit) for limit in limits]
    # The solver's own measure: a step of a microsecond is also a matter of ties.
    steps = [free.solution.objective]
    for plan, limit in zip(plans, limits, strict=True):
        assert plan.fits == (plan.memory.peak <= limit)
        if plan.fits:
            assert plan.solution.bound <= plan.solution.objective + 1e-12
            steps.append(plan.solution.objective)
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(steps))


def test_what_cannot_fit_is_told():
    plan = make_plan(perceptron(), Mesh.parse("2"), chip("v5e"), memory_limit=1000)
    assert not plan.fits and plan.memory.peak > 1000
