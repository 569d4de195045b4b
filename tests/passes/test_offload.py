"""What loops keep for the backward pass may lie on the hosts, where that pays."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from models import gpt
from neocc.cost.hardware import HardwareError, Link, chip
from neocc.cost.model import CostModel
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.text import parse_program, print_program
from neocc.passes.decisions import decisions
from neocc.passes.layout.algebra import moves
from neocc.passes.layout.notation import layout_text, parse_layout_text
from neocc.passes.partition.simulate import simulate
from neocc.passes.partition.verify import verify_partitioned
from neocc.passes.plan import Plan, make_plan, prepare
from neocc.passes.recost import recost
from neocc.passes.simplify import simplify
from tests.numpy_executor import run_numpy
from tests.random_programs import inputs_for

MESH = Mesh.parse("2")
FAST = replace(chip("v5e"), host=Link(1e15, 1.0, 0.0))
STEP = simplify(
    gpt.train_step(
        gpt.Config(
            "tiny", 4, 16, 2, vocab=32, seq=16, batch=8, dtype="f64", param_dtype="f64",
            recompute=False,
        )
    )
)  # fmt: skip


def kinds(plan: Plan) -> set[str]:
    return {c.kind for c in plan.collectives}


@pytest.fixture(scope="module")
def hosted() -> Plan:
    """A plan for nine tenths of the memory that the fastest one needs."""
    whole = make_plan(STEP, MESH, FAST, "batch:x", offload=True)
    return make_plan(
        STEP, MESH, FAST, "batch:x", memory_limit=0.9 * whole.memory.peak, offload=True
    )


def test_what_does_not_fit_goes_to_the_hosts(hosted: Plan) -> None:
    assert hosted.fits
    assert {"to_host", "to_device"} <= kinds(hosted)
    without = make_plan(STEP, MESH, FAST, "batch:x", memory_limit=hosted.memory_limit)
    assert not kinds(without) & {"to_host", "to_device"}
    assert not without.fits or without.timeline.step >= 0.999 * hosted.timeline.step


def test_it_means_the_same(hosted: Plan) -> None:
    verify_partitioned(hosted.partitioned, hosted.program)
    inputs = inputs_for(hosted.program, np.random.default_rng(0))
    found = simulate(hosted.partitioned, inputs)
    for name, array in run_numpy(hosted.program, inputs).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-10, atol=1e-12, err_msg=name)


def test_its_text_and_its_decisions_say_it_all(hosted: Plan) -> None:
    text = print_program(hosted.partitioned.program)
    assert " on host" in text
    assert print_program(parse_program(text)) == text
    given = decisions(hosted)
    assert given.offload
    ready = prepare(STEP, MESH, FAST, "batch:x", offload=given.offload)
    again = recost(ready, given, hosted.memory_limit).plan
    assert (again.timeline, again.memory) == (hosted.timeline, hosted.memory)


def test_a_slow_wire_is_not_used_where_there_is_room() -> None:
    plan = make_plan(STEP, MESH, chip("v5e"), "batch:x", offload=True)
    assert not kinds(plan) & {"to_host", "to_device"}


def test_a_layout_on_the_host_has_one_way_out_and_partial_sums_none_in() -> None:
    type = STEP.input_value("wte").type
    there = Layout(("vocab",), True)
    assert [(m.kind, m.target) for m in moves(there, type, MESH)] == [("to_device", there.moved)]
    assert parse_layout_text(layout_text(there, MESH), MESH) == there
    summed = parse_layout_text("+sum:x", MESH)
    assert "to_host" not in {m.kind for m in moves(summed, type, MESH)}


def test_a_chip_whose_way_to_the_host_is_not_known_says_so() -> None:
    with pytest.raises(HardwareError, match="no bandwidth from v5e to its host"):
        make_plan(STEP, MESH, replace(chip("v5e"), host=None), offload=True)


def test_there_is_no_way_to_a_host_whose_bandwidth_is_not_known() -> None:
    """A search for the shortest way may ask, also where nothing is offloaded."""
    cost = CostModel.of(replace(chip("v5e"), host=None), Mesh.parse("2"))
    assert cost.move_seconds("to_host", None, 8, 8) == math.inf
