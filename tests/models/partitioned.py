"""A program cut anyhow over a simulated mesh against the same program whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.partition import apply, simulate, verify_partitioned
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment, seeded


def assert_partitioned_equals_whole(
    program: Program,
    given: Mapping[str, Any],
    mesh: Mesh,
    seeds: Iterable[int] = (1, 2),
    tolerance: float = 1e-9,
) -> None:
    """In one random layout for each seed; every output."""
    values = {i.name: given[i.name] for i in program.inputs}
    expected = run_numpy(program, values)
    for seed in seeds:
        partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
        verify_partitioned(partitioned, program)
        got = simulate(partitioned, values)
        for n, x in expected.items():
            np.testing.assert_allclose(
                got[n], x, rtol=100 * tolerance, atol=tolerance, err_msg=f"{n} {seed}"
            )
