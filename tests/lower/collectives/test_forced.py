"""A training step with every algorithm forced in turn: the numbers of the whole program."""

from __future__ import annotations

import numpy as np
import pytest

from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.mesh import Mesh
from neocc.lower.collectives import ALGORITHMS
from neocc.lower.jax import lower
from neocc.passes.partition import Partitioned, apply, verify_partitioned
from neocc.passes.plan import ways
from tests.lower.collectives.devices import QUICK
from tests.numpy_executor import run_numpy
from tests.passes.partition.samples import block_program, inputs_for, moves_program
from tests.random_assignments import random_assignment, seeded

EXACT = [
    key
    for key, a in ALGORITHMS.items()
    if not (a.formula.lossy or a.formula.kernel or a.formula.inside)
]


def cases(
    kind: str, name: str
) -> list[tuple[Partitioned, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    found = []
    for make, seed in ((block_program, 1), (moves_program, 3)):
        program, mesh = make(), Mesh.parse("2x4")
        inputs = inputs_for(program)
        cost = CostModel.of(chip("v5e"), mesh, collectives=Collectives(forced=((kind, name),)))
        decided = random_assignment(program, mesh, seeded(seed))
        partitioned = apply(program, mesh, decided, ways=ways(decided, cost))
        verify_partitioned(partitioned, program)
        found.append((partitioned, inputs, run_numpy(program, inputs)))
    return found


@pytest.mark.parametrize(("kind", "name"), EXACT, ids=map("-".join, EXACT))
def test_a_forced_algorithm_gives_the_same_numbers(x64: None, kind: str, name: str) -> None:
    runs = False
    for partitioned, inputs, wanted in cases(kind, name):
        ops = [op for op in partitioned.program.body.walk() if op.kind == kind]
        named = {op.attrs.get("algorithm") for op in ops}
        least = ALGORITHMS[kind, name].formula.rings[0]
        # An axis of two devices is no grid of two rings.
        assert all(
            op.attrs.get("algorithm") == (None if op.attrs["axis"] == "x" and least > 1 else name)
            for op in ops
        )
        lowered = lower(partitioned)
        text = str(lowered.function.lower(*lowered.shape_structs()).as_text())
        assert (name in named) == ("collective_permute" in text)
        runs |= name in named
        outputs = lowered.compile(QUICK)(*lowered.place(inputs))
        for output, array in zip(partitioned.program.outputs, outputs, strict=True):
            np.testing.assert_allclose(array, wanted[output], rtol=1e-9, atol=1e-11)
    assert runs
