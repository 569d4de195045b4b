"""Fused attention under shard_map: the same numbers in many tiles, and the FLOPs of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neocc.ir.mesh import Mesh, Strategy
from neocc.ir.ops import attention_tiles
from neocc.lower.hlo import read_hlo
from neocc.lower.jax import lower
from neocc.passes.layout.algebra import Assignment
from neocc.passes.partition import Partitioned, apply
from neocc.passes.plan import local_flops
from tests.numpy_executor import run_numpy
from tests.passes.partition.test_attention import grouped
from tests.random_assignments import random_assignment
from tests.random_programs import assert_close, inputs_for


def cut_along(dim: str | None, mesh: Mesh) -> Partitioned:
    """Attention and its gradient cut along one dim, all else on every device."""
    program = grouped()
    found = random_assignment(program, mesh, lambda options: options[0])
    strategies = dict(found.strategies)
    for op in program.body.ops:
        if op.kind in ("attention", "attention_grad"):
            strategies[op] = Strategy((dim,))
    return apply(program, mesh, Assignment(strategies, found.boundaries))


@pytest.mark.parametrize("dim, tiles", [(None, 9), ("batch", 9 / 2), ("seq", 8), ("kv", 9 / 2)])
def test_compiled_flops_are_those_of_the_plan(
    x64: None, monkeypatch: Any, dim: str | None, tiles: float
) -> None:
    """Of 4 x 4 tiles of 2 x 2 scores, causality and the window leave 9; a device that has half of
    ``seq`` runs each of its 8."""
    monkeypatch.setattr(attention_tiles, "BLOCK", 2)
    mesh = Mesh.parse("2")
    partitioned = cut_along(dim, mesh)
    lowered = lower(partitioned)
    compiled = lowered.compile()
    planned = local_flops(partitioned.program.body, mesh)
    rows = 4 * 4 * 2  # batch, kv, group
    assert planned == (2 + 5) * 2 * rows * (2 * 2) * 3 * tiles
    assert read_hlo(compiled.as_text() or "").flops == planned
    inputs = inputs_for(partitioned.program, np.random.default_rng(0))
    outputs = dict(zip(partitioned.program.outputs, compiled(*lowered.place(inputs)), strict=True))
    for name, array in run_numpy(grouped(), inputs).items():
        assert_close(outputs[name], array)
