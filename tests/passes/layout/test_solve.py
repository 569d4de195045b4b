"""The solver against exhaustive search, and its objective against the program that comes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.builder import Graph, repeat
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.text import parse_program
from neocc.ir.types import Dim
from neocc.passes.layout.build import build
from neocc.passes.layout.problem import Problem, Rules
from neocc.passes.layout.solve import Solution, solve, solve_kept
from neocc.passes.partition import apply
from neocc.passes.plan import list_collectives, timeline
from neocc.passes.simplify import simplify
from tests.passes.layout import programs as made
from tests.passes.layout.exhaustive import Search, problem_of, ties
from tests.random_programs import meshes, programs

SMALL = [made.mlp, made.shared_input, made.residual, made.layers, made.side_output, made.embedding]
LARGE = [made.two_stacks, made.trained, made.kept_or_not]


def assert_optimal(problem: Problem, visits: float = 1e5) -> None:
    """The solution costs what it claims, and no decision for everything costs less."""
    solution = solve(problem)
    assert solution.gap == pytest.approx(0, abs=1e-9)
    search = Search(problem, visits)
    price = search.price(solution.picked)
    assert solution.objective == pytest.approx(price, rel=1e-9, abs=1e-9)
    assert solution.bound <= price * (1 + 1e-9) + 1e-9
    search.run(below=price * (1 - 1e-9) - 1e-9)
    assert not search.picked, f"{search.best} s beats the solver's {price} s"


@pytest.mark.parametrize(
    ("make", "mesh"),
    [
        *((make, mesh) for make in SMALL for mesh in ("2", "4", "3x2")),
        *((make, "2x2") for make in (made.mlp, made.residual, made.layers, made.embedding)),
        *((make, mesh) for make in LARGE for mesh in ("2", "4")),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_no_assignment_beats_the_solver(make: Callable[[], Program], mesh: str) -> None:
    assert_optimal(problem_of(make(), Mesh.parse(mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("mesh", ["2x4", "4x2", "4x3", "2x2x2"])
def test_no_assignment_beats_the_solver_on_more_devices(
    make: Callable[[], Program], mesh: str
) -> None:
    assert_optimal(problem_of(make(), Mesh.parse(mesh)), 1e6)


@given(st.data())
@settings(max_examples=60)
def test_no_assignment_of_a_random_program_beats_the_solver(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=6)))
    mesh = data.draw(meshes(max_axes=2, big=False))
    assert_optimal(problem_of(program, mesh), 1e4)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=600)
def test_no_assignment_of_a_random_program_beats_the_solver_at_length(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(min_ops=1, max_ops=12)))
    mesh = data.draw(meshes(max_axes=3, big=False))
    assert_optimal(problem_of(program, mesh), 1e5)


def assert_predicted(problem: Problem, mesh: Mesh) -> Solution:
    """The objective is the time of the partitioned program's own collectives and compute."""
    solution = solve(problem)
    program, assignment = problem.resolve(solution.picked, solution.assignment)
    partitioned = apply(program, mesh, assignment, lambda m, t: problem.move_seconds(m, t) + 1e-12)
    collectives = list_collectives(partitioned, problem.cost)
    step = timeline(problem, solution, collectives).step
    assert step == pytest.approx(solution.objective - ties(problem, solution), rel=1e-6, abs=1e-8)
    return solution


@pytest.mark.parametrize("make", [*SMALL, *LARGE])
@pytest.mark.parametrize("text", ["4", "2x2", "2x4"])
def test_the_objective_is_what_the_partitioned_program_takes(
    make: Callable[[], Program], text: str
) -> None:
    program, mesh = make(), Mesh.parse(text)
    assert_predicted(problem_of(program, mesh), mesh)


@given(st.data())
@settings(max_examples=80)
def test_the_objective_is_what_a_random_partitioned_program_takes(data: st.DataObject) -> None:
    program = simplify(data.draw(programs(max_ops=10)))
    mesh = data.draw(meshes(max_axes=2, big=False))
    assert_predicted(problem_of(program, mesh), mesh)


COPIED = """program copied {
  parameter %p: f64[b=8, a=6]
  %0: f64[b=8, a=6], %1: f64[b=8, a=6], %2: f64[n=2, b=8, a=6] = repeat(%p, %p)
      {dim=n=2, carries=2, stacked=0, reverse=false, recompute=false} (
      %0: f64[b=8, a=6], %1: f64[b=8, a=6],
    ) {
    %2: f64[] = constant() {value=0.5, dtype="f64"}
    %3: f64[b=8, a=6] = mul(%0, %2)
    %4: f64[b=8, a=6] = tanh(%1)
    %5: f64[b=8, a=6] = add(%3, %4)
    yield %5, %0, %1
  }
  %3: f64[n=2, b=8, a=6] = repeat(%2)
      {dim=n=2, carries=0, stacked=1, reverse=false, recompute=false} (%0: f64[b=8, a=6],) {
    yield %0
  }
  %y: f64[n=2, b=8, m=1] = slice(%3) {dim="a", start=0, to=m=1}
  return y=%y
}
"""


def test_the_objective_is_that_of_the_assignment_though_the_solver_was_given_a_start() -> None:
    """HiGHS 1.16 maps this start onto a better one, says what that costs and returns the start."""
    mesh = Mesh.parse("3")
    assert_predicted(problem_of(parse_program(COPIED), mesh), mesh)


def test_where_the_last_program_finds_nothing_in_time_the_one_before_answers_with_its_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = problem_of(made.trained(), Mesh.parse("4"))
    best = solve(problem)
    programs = []

    def late(*args):
        programs.append(args)
        if len(programs) > 1:
            raise NeoccError("the solver found no layout within 60 s")
        return solve_kept(*args)

    monkeypatch.setattr("neocc.passes.layout.solve.solve_kept", late)
    found = solve(problem)
    assert len(programs) == 2
    assert found.bound <= best.bound < best.objective * (1 + 1e-9) < found.objective
    assert found.gap > 0


def test_what_hides_is_decided_by_the_value_and_not_by_a_copy_on_its_way() -> None:
    """The product that the next step waits for is gathered over two axes for what is kept."""
    program, mesh = made.side_output(), Mesh.parse("2x2")
    first = next(op for op in program.body.walk() if op.kind == "einsum")

    def strategy(op, s) -> bool:
        if op.kind == "einsum":
            return s.axes == (("batch", "batch") if op is first else (None, None))
        return True

    problem = problem_of(program, mesh, Rules(strategy=strategy))
    solution = assert_predicted(problem, mesh)
    assert solution.assignment.moves is not None
    assert len(solution.assignment.moves[first.result]) > 1


def test_what_a_device_copies_itself_does_not_hide() -> None:
    """Weights cut into pieces that are not whole rows of lanes are gathered in a loop."""
    wide, mesh = Dim("embd", 256), Mesh.parse("4")
    g = Graph("lanes")
    x, w = g.data("x", (made.BATCH, wide), "f32"), g.parameter("w", (made.LAYERS, wide, made.MLP))
    program = g.build({"y": repeat(made.LAYERS, made.layer, x, w)})
    rules = Rules(stored=lambda info, type, layout: info.name != "w" or layout.cuts("embd") == (0,))
    problem = build(program, mesh, CostModel.of(chip("v5p"), mesh), rules)
    assert_predicted(problem, mesh)
    shares = {s for flow in problem.flows if flow.hideable for s in problem.hidden_share(flow)}
    assert any(0 < share < problem.cost.overlap for share in shares)
