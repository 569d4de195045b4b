"""A step with every algorithm forced in turn: what is compiled is what the algorithm says it sends.

FSDP gathers and scatters, Megatron's layout sums, experts exchange tokens; on simulated devices.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.algorithms import PRODUCTS
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import pair
from neocc.lower.collectives import ALGORITHMS
from neocc.lower.hlo import HloFacts, read_hlo
from neocc.lower.jax import lower
from neocc.nn import Experts
from neocc.passes.layout.rules import experts, tensor_parallel
from neocc.passes.plan import Plan, make_plan
from tests.lower.collectives.devices import QUICK

SMALL = replace(gpt.PRESETS["tiny"], dtype="f32", embd=64, batch=8, vocab=104, layers=2)
MOE = replace(SMALL, moe_layers=(1,), experts=Experts(8, 256, group=64), recompute=False)
SOON = {
    ("all_gather", "ring2"),
    ("all_gather", "products"),
    ("all_reduce", "torus"),
    ("all_to_all", "shifts"),
}
KEYS = [key for key, a in ALGORITHMS.items() if not a.formula.kernel]


def forced_to(kind: str, name: str) -> Collectives:
    """And what would take the kind's place is as slow."""
    beside = {"reduce_scatter": [f"all_reduce={name}"], "all_to_all": ["all_gather=ring"]}
    others = beside.get(kind, []) if name != PRODUCTS else []
    return Collectives.asked(forced=[f"{kind}={name}", *others])


RIVALS = {"all_gather": "FSDP", "reduce_scatter": "FSDP", "all_to_all": "GShard on y"}


def compiled(kind: str, name: str) -> tuple[Plan, HloFacts]:
    program = gpt.train_step(MOE if kind == "all_to_all" else SMALL)
    mesh = Mesh.parse("8" if RIVALS.get(kind) == "FSDP" and name != PRODUCTS else "2x4")
    # A chip for which f32 stays f32: the CPU has no bf16 permutes.
    target, forced = chip("a100"), forced_to(kind, name)
    if name == PRODUCTS:
        rules = tensor_parallel(mesh)[1].rules
        plan = make_plan(program, mesh, target, rules=rules, collectives=forced)
    elif kind in RIVALS:
        found = experts(mesh, program.dims)
        rules = next(e.rules for e in found if e.name == RIVALS[kind])
        plan = make_plan(program, mesh, target, rules=rules, collectives=forced)
    else:
        layout = "batch:x,heads:y,mlp:y,vocab:y"
        plan = make_plan(program, mesh, target, layout, collectives=forced)
    lowered = lower(plan.partitioned)
    program = lowered.function.lower(*lowered.shape_structs()).compile(QUICK)
    return plan, read_hlo(program.as_text() or "")


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*k, marks=() if k in SOON else pytest.mark.slow, id="-".join(k)) for k in KEYS],
)
def test_the_permutes_are_those_of_the_plan(kind: str, name: str) -> None:
    plan, facts = compiled(kind, name)
    asked = [c for c in plan.collectives if (c.kind, c.algorithm) == (kind, name)]
    assert asked
    found = pair(plan, facts)
    assert not [f for f in found if not f.ok]
    by = [f for f in found if f.planned in asked]
    assert len(by) == len(asked) and all(f.verdict.startswith(f"by {name}, ") for f in by)


def test_a_permute_that_is_missing_is_noticed() -> None:
    plan, facts = compiled("all_gather", "ring2")
    gone = next(c for c in facts.collectives if c.kind == "collective-permute")
    lacking = replace(facts, collectives=tuple(c for c in facts.collectives if c is not gone))
    verdicts = [f.verdict for f in pair(plan, lacking) if not f.ok]
    assert "removed" in verdicts or "added" in verdicts
