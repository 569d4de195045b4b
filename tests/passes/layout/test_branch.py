"""Memory so short that loops cannot keep all: the search by sets of stacks against the program
with hard limits as it stands."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir.builder import Graph, Tensor, dot, einsum, exp, repeat, tanh
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import gradients
from neocc.passes.layout.branch import heavy_stacks, kept_sets, solve_apart
from neocc.passes.layout.memory import limit, peak, points
from neocc.passes.layout.problem import Problem
from neocc.passes.layout.solve import Infeasible, floor, solve
from neocc.passes.layout.within import PATIENCE
from tests.passes.layout.exhaustive import problem_of

BATCH, EMBD, LAYERS = Dim("batch", 64), Dim("embd", 12), Dim("layers", 6)


def trained(widths: list[int], bend: list[bool], residual: bool) -> Program:
    """The gradient of a loop whose steps make one product of each width, and one back."""
    g = Graph("trained")
    x = g.data("x", (BATCH, EMBD), "f32")
    dims = [Dim(f"wide{i}", width) for i, width in enumerate(widths)]
    weights = [g.parameter(f"w{i}", (LAYERS, EMBD, dim)) for i, dim in enumerate(dims)]

    def layer(x: Tensor, weights: list[Tensor]) -> Tensor:
        y = x
        for w, bent in zip(weights, bend, strict=True):
            h = dot(y, w, "embd")
            y = einsum(tanh(h) if bent else exp(h), w, ("batch", "embd"))
        return x + y if residual else y

    y = repeat(LAYERS, layer, x, weights, None)
    loss = (y * y).sum("batch", "embd")
    found = gradients(loss, weights)
    new = {f"w{i}": w - d * 0.1 for i, (w, d) in enumerate(zip(weights, found, strict=True))}
    return g.build({**new, "loss": loss})


def assert_short_memory_is_exact(problem: Problem, share: float, other: int = 0) -> None:
    """Limits at the point where the fastest assignment peaks, to a ``share`` of that, and at one
    other point."""
    fastest = solve(problem)
    memory, op = peak(problem, fastest)
    every = points(problem)
    chosen = [point for point in every if point.op is op] + [every[other % len(every)]]
    limits = [limit(problem, point, share * memory.peak) for point in chosen]
    enough = PATIENCE * fastest.objective
    relaxation = floor(problem, limits, enough)
    found = solve_apart(problem, limits, relaxation, enough, 60.0)
    try:
        whole = solve(problem, limits, prune=False)
    except Infeasible:
        assert found is None
        return
    if found is None:
        assert whole.objective >= enough * (1 - 1e-6)
    else:
        assert found.objective == pytest.approx(whole.objective, rel=1e-6, abs=2e-9)
        assert found.bound <= whole.objective * (1 + 1e-9)
        assert found.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.5, 0.4])
def test_what_is_kept_is_the_best_that_fits(share: float) -> None:
    program = trained([8, 24], [True, False], True)
    assert_short_memory_is_exact(problem_of(program, Mesh.parse("2")), share)


@given(
    st.lists(st.tuples(st.sampled_from([4, 8, 12, 24]), st.booleans()), min_size=1, max_size=2),
    st.booleans(),
    st.sampled_from(["2", "4"]),
    st.floats(0.35, 0.8),
    st.integers(0, 99),
)
@settings(max_examples=6)
def test_short_memory_is_exact(
    products: list[tuple[int, bool]], residual: bool, mesh: str, share: float, other: int
) -> None:
    program = trained([w for w, _ in products], [b for _, b in products], residual)
    assert_short_memory_is_exact(problem_of(program, Mesh.parse(mesh)), share, other)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from([4, 8, 12, 24]), st.booleans()), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["2", "4", "2x2"]),
    st.floats(0.35, 0.8),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_short_memory_is_exact_at_length(
    products: list[tuple[int, bool]], residual: bool, mesh: str, share: float, other: int
) -> None:
    program = trained([w for w, _ in products], [b for _, b in products], residual)
    assert_short_memory_is_exact(problem_of(program, Mesh.parse(mesh)), share, other)


def test_sets_of_stacks_are_largest_and_differ() -> None:
    problem = problem_of(trained([8, 4, 24], [True] * 3, True), Mesh.parse("2"))
    fastest = solve(problem)
    memory, op = peak(problem, fastest)
    (point,) = (p for p in points(problem) if p.op is op)
    limits = [limit(problem, point, 0.5 * memory.peak)]
    enough = PATIENCE * fastest.objective
    heavy, prices = heavy_stacks(problem, limits), floor(problem, limits, enough).prices
    sets = [set(only) for only in kept_sets(problem, limits, heavy, prices, enough)]
    assert len(sets) > 1
    assert all(all(choice.can_be_off for choice in off) for off in sets)
    assert not any(a < b for a in sets for b in sets)
