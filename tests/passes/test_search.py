"""The search over meshes, mappings and microbatches against trying every one of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.hardware import Chip, chip
from neocc.cost.mappings import mappings
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.plan import Plan, make_plan
from neocc.passes.search import Searched, meshes_of, parts_of, search
from neocc.passes.simplify import simplify
from neocc.runtime import Row, frontier
from neocc.runtime.sweep import one_of_each

# Sizes at which time is spent on work, not on latencies: plans of toys are all nearly equal.
SMALL = replace(gpt.PRESETS["gpt3-xl"], layers=4, batch=16, vocab=2048, recompute=True)
STEP = simplify(gpt.train_step(SMALL))


def every_plan(target: Chip, meshes: list[Mesh], parts: list[int], limit: float) -> list[Plan]:
    return [
        make_plan(STEP, mesh, target, "", None, limit, topology, count)
        for mesh in meshes
        for topology in mappings(target, mesh.sizes)
        for count in parts
    ]


@pytest.fixture(scope="module")
def searched() -> Searched:
    target = chip("v5e")
    return search(STEP, target, meshes_of(target, 4), [1, 2])


def test_no_combination_beats_what_is_found(searched: Searched) -> None:
    target = chip("v5e")
    assert searched.best is not None and searched.best.fits
    plans = every_plan(target, meshes_of(target, 4), [1, 2], searched.best.memory_limit)
    least = min(p.solution.objective for p in plans if p.fits)
    assert searched.best.solution.objective == pytest.approx(least, rel=max(searched.gap, 1e-6))
    assert searched.bound <= least * (1 + 1e-9)


@pytest.mark.parametrize(
    ("count", "share"), [(1, 0.85), pytest.param(2, 0.75, marks=pytest.mark.slow)]
)
def test_what_bounds_drop_holds_nothing_better(count: int, share: float) -> None:
    """Memory is short, so that numbers of parts are dropped by what they cost within it."""
    target, parts = chip("v5e"), [1, 2]
    meshes = meshes_of(target, 4)[:count]
    program = simplify(gpt.train_step(replace(SMALL, layers=2, batch=64)))
    whole = make_plan(program, meshes[0], target, "batch:x")
    limit = share * whole.memory.peak
    found = search(program, target, meshes, parts, "batch:x", limit, every=True)
    assert {(t.mesh, t.microbatches) for t in found.tried if t.plan is None}
    for t in found.tried:
        plans = [
            make_plan(program, t.mesh, target, "batch:x", None, limit, topology, t.microbatches)
            for topology in mappings(target, t.mesh.sizes)
        ]
        steps = [p.solution.objective for p in plans if p.fits]
        assert all(step >= t.bound * (1 - 1e-6) for step in steps)
        if t.plan is None and t.reason.startswith("no layout"):
            rivals = [o.plan for o in found.tried if o.mesh == t.mesh and o.plan is not None]
            best = min(p.solution.objective for p in rivals if p.fits)
            assert all(step >= best * (1 - 1e-6) for step in steps)


def test_a_batch_is_split_where_memory_asks_for_it_and_only_there(searched: Searched) -> None:
    assert searched.best is not None and searched.best.ready.microbatches == 1
    target, mesh = chip("v5e"), Mesh.parse("4")
    program = simplify(gpt.train_step(replace(SMALL, layers=1, batch=128)))
    whole = make_plan(program, mesh, target, "batch:x")
    found = search(program, target, [mesh], [1, 4, 8], "batch:x", 0.5 * whole.memory.peak)
    assert found.best is not None and found.best.fits
    assert found.best.ready.microbatches > 1
    assert found.best.timeline.step >= whole.timeline.step


def test_every_mesh_of_a_number_of_devices_is_tried() -> None:
    shapes = {m.sizes for m in meshes_of(chip("v5e"), 16)}
    assert shapes == {(16,), (2, 8), (4, 4), (2, 2, 4)}


def test_parts_divide_the_batch() -> None:
    assert parts_of(STEP) == [1, 2, 4, 8, 16]
    assert parts_of(simplify(gpt.train_step(replace(SMALL, batch=12)))) == [1, 2, 4]


def test_a_frontier_holds_what_nothing_beats(searched: Searched) -> None:
    rows = [Row(4, None, 1, t) for t in one_of_each(searched.tried)]
    best = frontier(rows)
    assert best and all(row.plan is not None for row in best)
    fastest = min((r for r in rows if r.plan), key=lambda r: r.plan.timeline.step)  # pyright: ignore
    assert fastest in best
    assert all(math.isfinite(t.bound) for t in searched.tried)


def test_an_unknown_program_dim_leaves_the_batch_whole() -> None:
    body = Program("empty", (), (), type(STEP.body)((), (), ()))
    assert parts_of(body) == [1]
