"""What clusters cost by what is kept: an open problem counts what the decided one does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.layout.build import build
from neocc.passes.layout.compute import View
from neocc.passes.layout.problem import Choice, Problem
from neocc.passes.layout.solve import Solution, solve
from neocc.passes.recost import options
from neocc.passes.remat import decide, droppable, open_values
from neocc.passes.simplify import simplify

SMALL = replace(gpt.TINY, embd=64, heads=4, seq=32, vocab=128)
STEP = simplify(gpt.train_step(SMALL))
# Two kinds of layers in one loop, so that more is open than every combination of is looked at.
TWICE = simplify(gpt.train_step(replace(SMALL, attention=((("global", "local"), 1),))))


def problem_of(program: Program, mesh: Mesh, target: str) -> Problem:
    return build(program, mesh, CostModel.of(chip(target), mesh))


def compute(picked: dict[Choice, int]) -> float:
    return sum(choice.seconds[i] for choice, i in picked.items())


def solved(problem: Problem, again: frozenset[int]) -> Solution:
    """The best assignment in which these open values are computed again, and no others."""
    own = {choice: choice.seconds for choice in problem.choices}
    for i, op in enumerate(open_values(problem.program).values()):
        (end,) = problem.sources[op.operands[0 if i in again else 1]]
        ends = zip(end.choice.seconds, end.layouts, strict=True)
        end.choice.seconds = [s + (layout is not None) for s, layout in ends]
    solution = solve(problem)
    for choice, seconds in own.items():
        choice.seconds = seconds
    return solution


@pytest.mark.parametrize("step", [STEP, TWICE], ids=["one kind of layer", "two"])
@given(again=st.frozensets(st.integers(0, 11)), target=st.sampled_from(["v5e", "h100"]))
@settings(max_examples=4)
def test_an_open_problem_counts_the_compute_of_the_decided_one(
    step: Program, again: frozenset[int], target: str
) -> None:
    mesh = Mesh.parse("4")
    problem = problem_of(step, mesh, target)
    solution = solved(problem, again)
    recomputes = [problem.recomputes(solution.picked, op) for op in open_values(step).values()]
    assert recomputes == [i in again for i in range(len(recomputes))]
    program, assignment = problem.resolve(solution.picked, solution.assignment)
    decided = problem_of(program, mesh, target)
    picked, missing = options(decided, assignment)
    assert missing is None and not decided.agreements
    assert compute(solution.picked) == pytest.approx(compute(picked), rel=1e-12)


def test_on_a_tpu_what_is_kept_changes_what_compute_takes() -> None:
    """So the property above says something."""
    problem = problem_of(STEP, Mesh.parse("4"), "v5e")
    assert any(a.b.name.startswith("traffic") and max(a.b.seconds) > 0 for a in problem.agreements)


@pytest.mark.parametrize("again", list(itertools.product((False, True), repeat=2)))
def test_a_view_is_the_region_of_the_decided_program(again: tuple[bool, bool]) -> None:
    names = list(open_values(STEP))
    saved = dict.fromkeys(names, "keep")
    for name, on in zip(names[:2], again, strict=True):
        saved[name] = "recompute" if on else "keep"
    spare, eithers = droppable(STEP), open_values(STEP)
    makers = {v: op for op in STEP.body.walk() for v in op.results}
    off = frozenset(makers[eithers[n].operands[1]] for n in names if saved[n] == "keep")
    assert off <= spare.ops
    (backward,) = (
        r for op in STEP.body.ops for r in op.regions if any(o in r.ops for o in spare.ops)
    )
    (decided,) = (
        op.regions[0] for op in decide(STEP, saved).body.ops if op.regions and op.attrs["reverse"]
    )
    found = View.of(backward, off).region
    kinds = [op.kind for op in found.ops]
    assert kinds == [op.kind for op in decided.ops]
