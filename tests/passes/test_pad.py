"""Padding never reaches the valid part, whatever it holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.errors import IRError
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.ir.text import print_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.pad import Padding, pad_inputs, pad_program, unpad_outputs
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for, programs


def poisoned(padded: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs grown with NaN, and with integers that are often valid ids."""
    rng = np.random.default_rng(5)
    made = pad_inputs(padded, inputs)
    for name, array in made.items():
        valid = np.zeros(array.shape, bool)
        valid[tuple(slice(0, n) for n in inputs[name].shape)] = True
        floats = array.dtype.kind not in "iub"
        poison = np.nan if floats else rng.integers(0, 9, array.shape).astype(array.dtype)
        made[name] = np.where(valid, array, poison).astype(array.dtype)
    return made


def check(program: Program, sizes: Mapping[str, int]) -> Program:
    """Pads, and holds the valid parts of all outputs against the program as it was."""
    padded, _ = pad_program(program, sizes)
    verify(padded)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    outputs = run_numpy(padded, poisoned(padded, inputs))
    found = unpad_outputs(program, outputs)
    for name in program.outputs:
        assert_close(found[name], expected[name])
        if any(i.name == name for i in program.inputs):
            outside = outputs[name].copy()
            outside[tuple(slice(0, n) for n in expected[name].shape)] = 0
            assert not outside.any(), f"{name} replaces an input and its padding is not zero"
    return padded


@st.composite
def sizes_for(draw, program: Program) -> dict[str, int]:
    """Sizes that the program can be padded to, found by leaving out what is refused."""
    sizes: dict[str, int] = {}
    for name, d in program.dims.items():
        if not draw(st.booleans()):
            continue
        more = {**sizes, name: d.size + draw(st.integers(1, 5))}
        try:
            pad_program(program, more)
        except IRError:
            continue
        sizes = more
    return sizes


@given(st.data())
@settings(max_examples=150)
def test_valid_parts_are_what_they_were_whatever_the_padding_holds(data: st.DataObject) -> None:
    program = data.draw(programs(zero=data.draw(st.booleans())))
    sizes = data.draw(sizes_for(program))
    assume(sizes)
    check(program, sizes)
