"""Random programs x random meshes x random legal layouts compute what one device computes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gpt import Config, train_step
from neocc.ir.mesh import Mesh
from neocc.ir.ops import COLLECTIVES, HOST_MOVES
from neocc.passes.partition import apply
from tests.passes.partition.checking import check
from tests.passes.partition.samples import block_program, moves_program
from tests.passes.partition.samples import inputs_for as sample_inputs
from tests.random_assignments import drawn, random_assignment, seeded
from tests.random_programs import inputs_for, meshes, programs


def check_random(data: st.DataObject, max_ops: int) -> None:
    program = data.draw(programs(zero=data.draw(st.booleans()), max_ops=max_ops))
    mesh = data.draw(meshes())
    assignment = random_assignment(program, mesh, drawn(data))
    check(program, mesh, assignment, inputs_for(program, np.random.default_rng(0)))


@given(st.data())
@settings(max_examples=150)
def test_any_legal_layout_computes_the_same_numbers(data: st.DataObject) -> None:
    check_random(data, 10)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=2000)
def test_any_legal_layout_computes_the_same_numbers_at_length(data: st.DataObject) -> None:
    check_random(data, 20)


@pytest.mark.parametrize("text", ["1", "4", "2x2", "4x2", "2x2x2", "2x1x4"])
@pytest.mark.parametrize("make", [block_program, moves_program])
def test_a_language_model_and_index_ops_on_random_layouts(make, text: str) -> None:
    program, mesh = make(), Mesh.parse(text)
    for seed in range(4):
        inputs = sample_inputs(program, seed)
        check(program, mesh, random_assignment(program, mesh, seeded(seed)), inputs)


@pytest.mark.parametrize("text", ["2x2", "8x16"])
def test_a_whole_training_step_on_random_layouts(text: str) -> None:
    """Forward, backward with recomputation, clipping and Adam: over a thousand ops."""
    config = Config(
        name="tiny",
        layers=2,
        embd=8,
        heads=4,
        vocab=16,
        seq=8,
        batch=4,
        window=4,
        attention=((("global", "local"), 1),),
        attn_dropout=0.1,
        dtype="f64",
        param_dtype="f64",
        recompute=True,
    )
    program, mesh = train_step(config), Mesh.parse(text)
    inputs = inputs_for(program, np.random.default_rng(0))
    # Second moments, like all that a root is taken of, are not negative.
    inputs |= {n: np.abs(x) for n, x in inputs.items() if n.endswith(".v")}
    check(program, mesh, random_assignment(program, mesh, seeded(0)), inputs)


def test_random_layouts_reach_every_collective_and_pass_partial_values_on() -> None:
    program, mesh = block_program(), Mesh.parse("2x4")
    kinds: set[str] = set()
    takes_partial: set[str] = set()
    for seed in range(20):
        partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
        kinds.update(op.kind for op, _ in partitioned.collectives())
        for op in partitioned.program.body.walk():
            if any(v.type.layout.partial_axes for v in op.operands):
                takes_partial.add(op.kind)
    assert kinds == COLLECTIVES - HOST_MOVES
    assert {"mul", "einsum", "all_reduce", "reduce_scatter", "reduce"} <= takes_partial
