"""The walk through a compiler's schedule: what it stands for, and what lies between permutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.collective_matmul import RESULTS, block
from benchmarks.schedule import schedule
from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.cost.products import step_seconds
from neocc.ir.mesh import Mesh
from neocc.lower.hlo import read_hlo
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.plan import Collective, Plan, make_plan

ROOT = Path(__file__).parents[2]
CLOCK = 1e9
UP, DOWN = "{{0,1},{1,2},{2,3},{3,0}}", "{{0,3},{1,0},{2,1},{3,2}}"
TEXT = """\
HloModule m, num_partitions=8

%multiply (p: f32[4]) -> f32[] {
  %p = f32[4] parameter(0)
  ROOT %m = f32[] dot(%p, %p), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %one = (f32[4], f32[4]) collective-permute-start(%x), source_target_pairs=UP, NAMED
  %two = (f32[4], f32[4]) collective-permute-start(%x), source_target_pairs=OTHER, NAMED
  %y = f32[] fusion(%x), kind=kOutput, calls=%multiply, ESTIMATED
  %one.done = f32[4] collective-permute-done(%one)
  %two.done = f32[4] collective-permute-done(%two)
  %three = (f32[4], f32[4]) collective-permute-start(%x), source_target_pairs=UP, NAMED
  ROOT %three.done = f32[4] collective-permute-done(%three)
}
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    mesh = Mesh.parse("2x4")
    asked = Collectives.asked(forced=["all_gather=products"])
    step, rules = gpt.train_step(gpt.PRESETS["tiny"]), tensor_parallel(mesh)[1].rules
    return make_plan(step, mesh, chip("v5e"), rules=rules, collectives=asked)


@pytest.mark.parametrize(("other", "alike"), [(UP, 2), (DOWN, 1)])
@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_a_direction_carries_one_block_at_a_time_behind_products(
    plan: Plan, other: str, alike: int, share: float
) -> None:
    row: Collective = next(c for c in plan.collectives if c.inside)
    taken = step_seconds(plan.problem.cost, 1, row.bytes, both=True)
    cycles = round(share * taken * CLOCK)
    named = f'metadata={{op_name="jit(f)/neocc.all_gather.{row.id}/ppermute"}}'
    text = TEXT.replace("OTHER", other).replace("UP", UP).replace("NAMED", named)
    estimated = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    text = text.replace("ESTIMATED", estimated)
    found = schedule(plan, read_hlo(text), text, lambda c: block(plan, c), CLOCK)
    assert (found.pairs, found.overlapped) == (3, 2)
    # The first two side by side or one behind the other; the third behind nothing.
    assert found.waited == pytest.approx(max(0.0, alike * taken - cycles / CLOCK) + taken, rel=1e-9)


def test_the_documents_show_what_was_found() -> None:
    rows = json.loads(RESULTS.read_text("utf-8"))
    heading = "## Collectives inside matrix products"
    table = (ROOT / "docs" / "measurements.md").read_text("utf-8").split(heading)[1]
    assert len(rows) >= 4
    for r in rows:
        case = r["case"]
        place = f"| {case['preset']} {case['target']} {case['mesh']}, {case['batch']} |"
        assert place in table
        for s in r["steps"].values():
            figures = ("step", "exposed", "cycles", "alone", "waited", "behind", "compiled")
            cells = " | ".join(f"{s[name]:.4f}" for name in figures)
            assert f"| {cells} | {s['overlapped']} of {s['pairs']} |" in table and s["as_planned"]
        before, after = (r["steps"].get(name) for name in ("standard", "products"))
        if after is not None:
            assert after["step"] < before["step"] and after["compiled"] < before["compiled"]
            assert after["exposed"] < before["exposed"] and after["overlapped"] > 0
            assert after["behind"] > before["behind"]
        else:
            assert r["steps"]["declined"]["step"] > before["step"]
            assert r["steps"]["declined"]["compiled"] > before["compiled"]
