"""What is kept and what is computed again changes no number, and memory decides it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.verify import verify
from neocc.passes.layout.build import build
from neocc.passes.layout.memory import limit, peak, points
from neocc.passes.layout.solve import solve
from neocc.passes.partition import apply, simulate, verify_partitioned
from neocc.passes.plan import Plan, make_plan
from neocc.passes.remat import Droppable, droppable, resolve
from neocc.passes.simplify import dead_code, simplify
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for

TINY = replace(gpt.TINY, dtype="f64", param_dtype="f64", embd=16, heads=2, seq=8, vocab=31)
STEP = simplify(gpt.train_step(TINY))


def stacks(program: Program) -> int:
    """Results of loops that are neither carried nor parameters' gradients."""
    loops = [op for op in program.body.ops if op.kind == "repeat"]
    return sum(len(op.results) - op.attrs["carries"] for op in loops)


def test_products_of_the_forward_pass_are_open_and_nothing_else() -> None:
    eithers = [op for op in STEP.body.walk() if op.kind == "either"]
    again = {r: op for op in STEP.body.walk() if not op.regions for r in op.results}
    assert len(eithers) == 6  # q, k, v, attention's first, o, fc; what proj makes, none asks for
    assert all(again[op.operands[1]].attrs["recomputed"] for op in eithers)
    spare = droppable(STEP)
    assert {op.operands[0] for op in eithers} == spare.args
    assert {op.kind for op in spare.ops} == {"einsum", "attention"}


@given(st.sets(st.integers(0, 5)))
@settings(max_examples=20)
def test_whatever_is_recomputed_the_program_means_the_same(numbers: set[int]) -> None:
    eithers = [op for op in STEP.body.walk() if op.kind == "either"]
    chosen = {eithers[i] for i in numbers}
    none = Droppable(frozenset(), frozenset(), {r: frozenset() for r in droppable(STEP).outputs})
    decided = dead_code(resolve(STEP, none, chosen.__contains__).program)
    verify(decided)
    assert not any(op.kind == "either" for op in decided.body.walk())
    assert stacks(STEP) - stacks(decided) == len(numbers)
    inputs = inputs_for(STEP, np.random.default_rng(0))
    expected = run_numpy(STEP, inputs)
    for name, value in run_numpy(decided, inputs).items():
        assert_close(value, expected[name])


def planned(memory: float) -> Plan:
    config = replace(gpt.PRESETS["gpt3-xl"], layers=12, batch=32, vocab=2048)
    program, given = gpt.train_step(config), "batch:x"
    return make_plan(program, Mesh.parse("4"), chip("v5e"), given, memory_limit=memory)


def again(plan: Plan) -> int:
    marked = (op.attrs.get("recomputed") for op in plan.program.body.walk())
    return sum(map(bool, marked))


def test_less_memory_is_paid_for_with_computing_again() -> None:
    ample = planned(1e15)
    assert again(ample) == 0
    tight = planned(0.8 * ample.memory.peak)
    assert tight.fits and again(tight) > 0
    assert tight.timeline.step > ample.timeline.step
    for plan in (ample, tight):
        assert plan.program is not plan.ready.program
        weight = sum(1 + len(op.operands) for op in plan.program.body.walk())
        assert weight == sum(1 + len(op.operands) for op in dead_code(plan.program).body.walk())


def test_a_program_of_recomputation_computes_the_same_cut() -> None:
    mesh = Mesh.parse("2")
    problem = build(STEP, mesh, CostModel.of(chip("v5e"), mesh))
    _, op = peak(problem, solve(problem))
    point = next(p for p in points(problem) if p.op is op)
    solution = solve(problem, [limit(problem, point, 1.0)], memory_price=1.0)
    program, assignment = problem.resolve(solution.picked, solution.assignment)
    assert any(op.attrs.get("recomputed") for op in program.body.walk())
    partitioned = apply(program, mesh, assignment)
    verify_partitioned(partitioned, program)
    inputs = inputs_for(STEP, np.random.default_rng(0))
    expected = run_numpy(STEP, inputs)
    for name, value in simulate(partitioned, inputs).items():
        assert_close(value, expected[name])
