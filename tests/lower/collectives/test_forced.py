"""A training step with every algorithm forced in turn: the numbers of the whole program."""

from __future__ import annotations

import numpy as np
import pytest

from neocc.ir.errors import IRError
from neocc.ir.mesh import Mesh
from neocc.lower.collectives import ALGORITHMS
from neocc.lower.jax import lower
from neocc.passes.partition import Partitioned, apply
from tests.lower.collectives.devices import QUICK
from tests.numpy_executor import run_numpy
from tests.passes.partition.samples import block_program, inputs_for, moves_program
from tests.random_assignments import random_assignment, seeded

EXACT = [key for key, a in ALGORITHMS.items() if not a.formula.lossy]


def cases() -> list[tuple[Partitioned, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    found = []
    for make, seed in ((block_program, 1), (moves_program, 3)):
        program, mesh = make(), Mesh.parse("2x4")
        inputs = inputs_for(program)
        partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
        found.append((partitioned, inputs, run_numpy(program, inputs)))
    return found


@pytest.mark.parametrize(("kind", "name"), EXACT, ids=map("-".join, EXACT))
def test_a_forced_algorithm_gives_the_same_numbers(x64: None, kind: str, name: str) -> None:
    runs = False
    for partitioned, inputs, wanted in cases():
        here = any(op.kind == kind for op in partitioned.program.body.walk())
        lowered = lower(partitioned, algorithms={kind: name})
        text = str(lowered.function.lower(*lowered.shape_structs()).as_text())
        assert here == ("collective_permute" in text)
        runs |= here
        outputs = lowered.compile(QUICK)(*lowered.place(inputs))
        for output, array in zip(partitioned.program.outputs, outputs, strict=True):
            np.testing.assert_allclose(array, wanted[output], rtol=1e-9, atol=1e-11)
    assert runs


def test_an_algorithm_that_there_is_not_is_refused_by_name() -> None:
    partitioned, _, _ = cases()[0]
    with pytest.raises(IRError, match=r"all_gather=rign; there are .*all_gather=ring2"):
        lower(partitioned, algorithms={"all_gather": "rign"})
