"""Hold a partitioned program against the unpartitioned one, every intermediate included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from neocc.ir.mesh import Mesh
from neocc.ir.ops import COLLECTIVES
from neocc.ir.program import Op, Program, Value
from neocc.passes.layout.algebra import Assignment
from neocc.passes.partition import Partitioned, apply, simulate, verify_partitioned
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment
from tests.random_programs import assert_close

Inputs = Mapping[str, np.ndarray]


def traced(partitioned: Partitioned, inputs: Inputs) -> tuple[dict, list[tuple[Op, np.ndarray]]]:
    """Outputs, and each result of each op that is no collective, whole, in order of execution.

    A collective must not change the whole value.
    """
    seen: list[tuple[Op, np.ndarray]] = []
    latest: dict[Value, np.ndarray] = {}

    def watch(op: Op, value: Value, array: np.ndarray) -> None:
        latest[value] = array
        if op.kind not in COLLECTIVES:
            seen.append((op, array))
        elif op.operands[0] in latest:
            assert_close(array, latest[op.operands[0]])

    return simulate(partitioned, inputs, watch), seen


def unpartitioned(program: Program) -> Partitioned:
    """The program on the mesh with no axes: one device, plain NumPy."""
    none = Mesh(())
    return apply(program, none, random_assignment(program, none, lambda options: options[0]))


def check(program: Program, mesh: Mesh, assignment: Assignment, inputs: Inputs) -> Partitioned:
    """Asserts that the partitioned program verifies and computes the same, value for value."""
    partitioned = apply(program, mesh, assignment)
    verify_partitioned(partitioned, program)
    outputs, seen = traced(partitioned, inputs)
    _, expected = traced(unpartitioned(program), inputs)
    assert len(seen) == len(expected)
    for (op, array), (_, right) in zip(seen, expected, strict=True):
        try:
            assert_close(array, right)
        except AssertionError as error:
            raise AssertionError(f"{op!r}: {error}") from None
    for name, array in run_numpy(program, inputs).items():
        assert_close(outputs[name], array)
    return partitioned
