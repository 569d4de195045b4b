"""Figures taken apart: the parts make the whole."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

import neocc
from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.alternatives import derived
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.names import program_names, resharded
from neocc.passes.plan import Plan, make_plan
from neocc.report import explained
from neocc.report.certificate import verdict
from neocc.report.derivation import FIGURES, Node, derivation, figure_sources
from neocc.report.explain import explain_tensor
from neocc.report.facts import traffic


@pytest.fixture(scope="module")
def plan() -> Plan:
    import dataclasses

    config = dataclasses.replace(gpt.PRESETS["gpt3-xl"], layers=2, batch=32, vocab=32000)
    step = neocc.simplify(gpt.train_step(config))
    return derived(make_plan(step, Mesh.parse("2x4"), chip("v5e")))


def check(n: Node) -> None:
    if n.parts and n.label != "mfu":
        assert math.isclose(n.value, sum(p.value for p in n.parts), rel_tol=1e-9, abs_tol=1e-15)
    for part in n.parts:
        check(part)


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_the_sum_of_its_parts(plan: Plan, figure: str):
    found = derivation(plan, figure)
    assert found.parts
    check(found)


def test_figures_are_the_plan_s(plan: Plan):
    wanted = {
        "step": plan.timeline.step,
        "compute": plan.timeline.compute,
        "exposed": plan.timeline.exposed,
        "hidden": plan.timeline.hidden,
        "mfu": plan.mfu,
        "memory": plan.memory.peak,
        "flops": plan.flops,
    }
    assert set(wanted) == set(FIGURES)
    for figure, value in wanted.items():
        assert math.isclose(derivation(plan, figure).value, value, rel_tol=1e-12)


def test_figures_of_a_step_with_collectives_inside_products_are_the_sums_of_theirs():
    mesh = Mesh.parse("2x4")
    rules = tensor_parallel(mesh)[1].rules
    asked = Collectives.asked(forced=["all_gather=products", "reduce_scatter=products"])
    step = gpt.train_step(gpt.PRESETS["tiny"])
    inside = derived(make_plan(step, mesh, chip("v5e"), rules=rules, collectives=asked))
    assert inside.overlaps
    for figure in ("step", "exposed", "hidden"):
        found = derivation(inside, figure)
        assert math.isclose(found.value, getattr(inside.timeline, figure), rel_tol=1e-12)
        check(found)
    (compute, _) = derivation(inside, "step").parts
    more = [g for region in compute.parts for g in region.parts if g.label.startswith("in blocks")]
    own = [c for c in inside.collectives if c.inside]
    assert len(more) == len(own) > 3 and all(g.formula for g in more)
    rows = [r for r in traffic(inside) if r.algorithm == "products"]
    assert math.isclose(sum(r.working for r in rows), sum(g.value for g in more), rel_tol=1e-9)
    assert all(r.waiting <= r.seconds and r.standard > 0 for r in rows)
    assert verdict(inside) == "as given: nothing is proved of it"
    # ``neocc explain`` says of a tensor that moves so what is waited for and what takes longer.
    moved = next(c for c in own if c.kind == "all_gather")
    value = next(
        v
        for v, op in resharded(inside.program, inside.partitioned.program)
        if op.attrs["id"] == moved.id
    )
    names = next(n for n in program_names(inside.program) if value in n.values.values())
    name = next(name for name, v in names.values.items() if v is value)
    told = explain_tensor(inside, inside, f"{names.body.name}: {name}", 0.0)
    row = next(m for where in told.where for m in where.moves if m.id == moved.id)
    assert row.algorithm == "products" and row.waiting and row.working
    assert math.isclose(row.working.value, moved.inside.working * moved.count, rel_tol=1e-9)
    console = Console(width=200, record=True, file=io.StringIO())
    for part in explained.tensor(told, inside.timeline.step, inside.memory.peak):
        console.print(part)
    assert "inside products: waits" in console.export_text()


def test_a_step_rests_on_fields_of_the_table_with_their_sources(plan: Plan):
    used = {s.field: s for s in figure_sources(plan, "step")}
    assert {"peak_flops.bf16", "hbm_bandwidth", "torus.link.bandwidth"} <= used.keys()
    assert used["peak_flops.bf16"].value == chip("v5e").peak_flops["bf16"]
    assert used["hbm_efficiency"].source.startswith("assumed")
    assert used["hbm_bandwidth"].source.startswith("http")


def test_bytes_of_a_tensor_are_worked_out(plan: Plan):
    kinds = derivation(plan, "memory").parts
    for tensor in (t for kind in kinds for t in kind.parts):
        terms = re.sub(r" \(.*?\)", "", tensor.numbers)
        terms = terms.replace(" B", "").replace("x", "*").replace("/", "//")
        assert eval(terms) == tensor.value


def test_figures_of_a_step_with_rings_are_the_sums_of_theirs():
    asked = Collectives.asked(forced=["attention=ring"])
    step = gpt.train_step(gpt.PRESETS["tiny"])
    rings = derived(
        make_plan(step, Mesh.parse("2x4"), chip("v5e"), "batch:x,seq:y", collectives=asked)
    )
    for figure in ("step", "compute", "exposed", "hidden"):
        found = derivation(rings, figure)
        assert math.isclose(found.value, getattr(rings.timeline, figure), rel_tol=1e-12)
        check(found)
    own = [c for c in rings.collectives if c.pairs]
    rows = [r for r in traffic(rings) if r.algorithm == "ring"]
    assert own and math.isclose(
        sum(r.within for r in rows), sum(c.within * c.count for c in own), rel_tol=1e-9
    )
    assert all(0 <= r.within <= r.seconds and r.standard > 0 for r in rows)
