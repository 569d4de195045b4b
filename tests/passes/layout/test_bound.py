"""Bounds against exhaustive search: none is above what any assignment costs, and what they rule
out is in no better one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.layout.bound import Prices, Relaxation
from neocc.passes.layout.memory import limit, peak, points
from neocc.passes.layout.objective import MICRO
from neocc.passes.layout.problem import Problem
from neocc.passes.layout.prune import everything, keep
from neocc.passes.layout.solve import Infeasible, solve
from neocc.passes.layout.within import PATIENCE, solve_within
from neocc.passes.simplify import simplify
from tests.passes.layout import programs as made
from tests.passes.layout.exhaustive import Search, problem_of
from tests.random_programs import meshes, programs

HANDMADE = [
    made.mlp,
    made.shared_input,
    made.residual,
    made.layers,
    made.side_output,
    made.embedding,
    made.two_stacks,
    made.trained,
    made.kept_or_not,
]


def assignments(problem: Problem, most: int) -> Iterator[tuple[int, ...]]:
    """Options of all choices: every combination where there are few, else some of them."""
    counts = [len(c.options) for c in problem.choices]
    if math.prod(counts) <= most:
        yield from itertools.product(*map(range, counts))
        return
    rng = np.random.default_rng(math.prod(counts) % 2**32)
    for _ in range(most):
        yield tuple(int(rng.integers(n)) for n in counts)


def prices_of(problem: Problem, data: st.DataObject) -> Prices:
    return Prices({region: data.draw(st.floats(0, 1)) for region in problem.boundaries})


def assert_bounds(problem: Problem, relaxation: Relaxation, most: int) -> None:
    """Every assignment costs at least the bound and what each of its options adds."""
    bound = relaxation.settle()
    search = Search(problem)
    for options in assignments(problem, most):
        cost = search.price(dict(zip(problem.choices, options, strict=True))) * MICRO
        adds = max(relaxation.slack(c)[x] for c, x in zip(problem.choices, options, strict=True))
        assert bound + adds <= cost * (1 + 1e-9) + 1e-6 or cost == math.inf


def assert_pruning_changes_nothing(problem: Problem) -> None:
    pruned, whole = solve(problem), solve(problem, prune=False)
    assert pruned.objective == pytest.approx(whole.objective, rel=1e-9, abs=2e-9)
    assert pruned.bound <= whole.objective * (1 + 1e-9) + 1e-9
    assert pruned.gap == pytest.approx(0, abs=1e-9)
    assert pruned.left.options <= pruned.whole.options == whole.left.options
    assert pruned.left.columns <= pruned.whole.columns == whole.left.columns


@pytest.mark.parametrize("make", HANDMADE)
@pytest.mark.parametrize("mesh", ["2", "2x2", "3x2"])
def test_the_bound_is_below_the_optimum(make: Callable[[], Program], mesh: str) -> None:
    problem = problem_of(make(), Mesh.parse(mesh))
    best = solve(problem, prune=False)
    relaxation = Relaxation(problem)
    assert relaxation.settle() <= best.objective * MICRO * (1 + 1e-9)
    for choice, i in best.picked.items():
        cost = relaxation.bound + relaxation.slack(choice)[i]
        assert cost <= best.objective * MICRO * (1 + 1e-9) + 1e-6


@given(st.data())
@settings(max_examples=60)
def test_no_assignment_costs_less_than_its_bound(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=6)))
    problem = problem_of(program, data.draw(meshes(max_axes=2, big=False)))
    assert_bounds(problem, Relaxation(problem, (), prices_of(problem, data)), 300)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=500)
def test_no_assignment_costs_less_than_its_bound_at_length(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=12)))
    problem = problem_of(program, data.draw(meshes(max_axes=3, big=False)))
    assert_bounds(problem, Relaxation(problem, (), prices_of(problem, data)), 3000)


@pytest.mark.parametrize("make", HANDMADE)
@pytest.mark.parametrize("mesh", ["4", "2x2", "2x4"])
def test_pruning_changes_no_optimum(make: Callable[[], Program], mesh: str) -> None:
    assert_pruning_changes_nothing(problem_of(make(), Mesh.parse(mesh)))


@given(st.data())
@settings(max_examples=60)
def test_pruning_changes_no_optimum_of_a_random_program(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=10)))
    mesh = data.draw(meshes(max_axes=2, big=False))
    assert_pruning_changes_nothing(problem_of(program, mesh))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=400)
def test_pruning_changes_no_optimum_of_a_random_program_at_length(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=16)))
    mesh = data.draw(meshes(max_axes=3, big=False))
    assert_pruning_changes_nothing(problem_of(program, mesh))


def test_little_is_left_of_a_deep_program() -> None:
    problem = problem_of(made.trained(), Mesh.parse("2x4"))
    relaxation = Relaxation(problem)
    bound, cost = relaxation.settle(), solve(problem).objective * MICRO
    assert bound > 0.9 * cost
    left = keep(relaxation, cost - bound, 1e-3)
    assert left.columns < 0.5 * everything(problem).columns


@pytest.mark.parametrize("make", [made.mlp, made.layers, made.kept_or_not])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_short_memory_has_the_optimum_of_the_whole_program(
    make: Callable[[], Program], share: float
) -> None:
    problem = problem_of(make(), Mesh.parse("4"))
    peak_bytes = peak(problem, solve(problem))[0].peak
    found, memory = solve_within(problem, share * peak_bytes, 60.0)
    limits = [limit(problem, point, share * peak_bytes) for point in points(problem)]
    try:
        whole = solve(problem, limits, prune=False)
    except Infeasible:
        assert memory.peak > share * peak_bytes
        return
    if memory.peak <= share * peak_bytes:
        assert found.objective == pytest.approx(whole.objective, rel=1e-6, abs=2e-9)
        assert found.bound <= whole.objective * (1 + 1e-9)
    else:
        assert whole.objective > PATIENCE * solve(problem).objective


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
def test_no_time_still_finds_what_fits(share: float) -> None:
    """Prices of memory end at what is so dear that whatever fits is taken; its bound holds."""
    problem = problem_of(made.kept_or_not(), Mesh.parse("4"))
    available = share * peak(problem, solve(problem))[0].peak
    best, held = solve_within(problem, available, 60.0)
    assert held.peak <= available
    found, memory = solve_within(problem, available, 0.0)
    assert memory.peak <= available
    assert found.bound <= best.objective * (1 + 1e-9) <= found.objective * (1 + 2e-9)
