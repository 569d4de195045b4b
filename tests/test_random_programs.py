"""The strategies that other property tests stand on do what they say."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from neocc.ir.ops import COLLECTIVES, OPS
from neocc.ir.reference import run_program
from tests.numpy_executor import run_numpy
from tests.random_programs import LIMIT, assert_close, inputs_for, meshes, programs


@given(st.data())
@settings(max_examples=120)
def test_random_programs_run_and_stay_finite(data: st.DataObject) -> None:
    program = data.draw(programs(zero=data.draw(st.booleans())))
    outputs = run_numpy(program, inputs_for(program, np.random.default_rng(0)))
    for name, value in zip(program.outputs, program.body.outputs, strict=True):
        array = outputs[name]
        assert (array.shape, array.dtype.itemsize) == (value.type.shape, value.type.itemsize)
        if value.type.is_float:
            assert np.all(np.abs(array) <= 4 * LIMIT), f"{name} is large or not finite"


@given(programs(max_ops=6))
@settings(max_examples=5)
def test_jax_and_numpy_agree_on_random_programs(x64: None, program) -> None:
    inputs = inputs_for(program, np.random.default_rng(1))
    expected = run_numpy(program, inputs)
    for name, array in run_program(program, inputs).items():
        assert_close(array, expected[name])


@given(programs(differentiable=True))
@settings(max_examples=50)
def test_differentiable_programs_have_one_scalar_loss_that_needs_a_parameter(program) -> None:
    assert program.outputs == ("loss",)
    assert program.output_value("loss").type.shape == ()
    inputs = inputs_for(program, np.random.default_rng(2))
    names = [i.name for i in program.inputs if i.role == "parameter"]
    assert names
    before = run_numpy(program, inputs)["loss"]
    moved = {n: x + 0.1 if n in names else x for n, x in inputs.items()}
    assert np.isfinite(before) and run_numpy(program, moved)["loss"] != before


def test_random_programs_reach_every_op() -> None:
    seen: set[str] = set()

    @given(programs())
    @settings(
        max_examples=500,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def draw(program) -> None:
        seen.update(op.kind for op in program.body.walk())

    draw()
    # Only differentiation writes an either: tests/passes/test_remat.py.
    assert set(OPS) - seen - COLLECTIVES == {"either"}


@given(meshes())
@settings(max_examples=20)
def test_meshes_are_small_or_8x16(mesh) -> None:
    assert max(mesh.sizes) <= 4 or mesh.sizes == (8, 16)
