"""Rings compiled for a TPU: each permute as planned, and sent while products run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ring_attention import CASES, MODES, causes, compiled, gathered_in, predicted
from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import pair
from neocc.lower.hlo import read_hlo
from neocc.passes.plan import make_plan


@pytest.mark.slow
def test_the_tpu_compiler_sends_while_products_run(tmp_path: Path) -> None:
    """Each turn's permutes have the tiles of that turn between start and end; the swaps, which
    nothing can hide, are what is left."""
    config = replace(gpt.PRESETS["tiny"], dtype="bf16", seq=2048, layers=2, batch=2)
    forced = Collectives.asked(forced=["attention=ring"])
    program = gpt.train_step(config)
    plan = make_plan(program, Mesh.parse("2x4"), chip("v5p"), "batch:x,seq:y", collectives=forced)
    assert all("memory" in kind for kind in predicted(plan).attention)
    made = compiled(plan, tmp_path / "step.txt")
    assert made.flops == plan.flops
    found = pair(plan, read_hlo((tmp_path / "step.txt").read_text("utf-8")))
    rings = [c for c in plan.collectives if c.pairs]
    sent = {f.planned for f in found if f.verdict == "by ring, as planned"}
    assert rings and set(rings) <= sent
    turns = [c for c in rings if c.within]
    assert made.pairs > made.overlapped >= len(turns)


def test_what_exposes_adds_up_and_the_same_layout_gathers_what_went_round() -> None:
    config = replace(gpt.PRESETS["tiny"], dtype="bf16", seq=2048, layers=2, batch=2)
    forced = Collectives.asked(forced=["attention=ring"])
    given = gpt.train_step(config), Mesh.parse("2x4"), chip("v5p"), "batch:x,seq:y"
    plan, standard = make_plan(*given, collectives=forced), make_plan(*given)
    gathered = gathered_in(plan, standard.ready)
    for one in (plan, gathered):
        assert sum(causes(one).values()) == pytest.approx(one.timeline.exposed)
    assert {"turns", "swaps"} == {*causes(plan)} - {*causes(gathered)}
    assert predicted(gathered).attention == predicted(standard).attention
    assert not any(c.pairs for c in gathered.collectives)


def test_cases_differ_in_nothing_but_rings() -> None:
    gathered, ring = MODES["gathered"], MODES["ring"]
    assert len(CASES) >= 4 and not ring.products
    assert ring.of("attention") is None and gathered.of("attention") == "standard"
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        assert gathered.of(kind) == ring.of(kind) == "standard"
