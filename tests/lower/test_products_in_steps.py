"""Collectives inside products, in whole programs: the numbers of the unpartitioned program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.algorithms import PRODUCTS
from neocc.ir.builder import Graph, dot, repeat
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Op, Program
from neocc.ir.types import Dim
from neocc.lower.jax import forced, lower, regions_of
from neocc.passes.autodiff import differentiate
from neocc.passes.partition import apply, verify_partitioned
from neocc.passes.partition.apply import marked
from neocc.passes.partition.groups import candidates
from tests.lower.collectives.devices import QUICK
from tests.numpy_executor import run_numpy
from tests.passes.partition.samples import block_program, inputs_for
from tests.random_assignments import random_assignment, seeded

INSIDE = {"all_gather": PRODUCTS, "reduce_scatter": PRODUCTS}


def step() -> Program:
    """Loss and gradients of layers whose products read one input, and that add up to one."""
    batch, embd, mlp = Dim("batch", 4), Dim("embd", 8), Dim("mlp", 8)
    layers = Dim("layers", 2)
    g = Graph("step")
    x = g.data("x", (batch, embd), "f64")
    w = [g.parameter(n, (layers, embd, mlp), "f64") for n in ("up", "gate")]
    back = g.parameter("down", (layers, mlp, embd), "f64")

    def body(x, w):
        both = dot(x, w["up"], "embd") * dot(x, w["gate"], "embd")
        return x + dot(both, w["down"], "mlp")

    y = repeat(layers, body, x, {"up": w[0], "gate": w[1], "down": back})
    return differentiate(g.build({"loss": (y * y).sum("batch", "embd")}))


def check(make: Callable[[], Program], mesh: Mesh, seed: int) -> int:
    """Runs a step with all that can be inside products; how many that were."""
    program = make()
    plain = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
    inside = replace(plain, program=forced(plain, INSIDE))
    verify_partitioned(inside, program)
    inputs = inputs_for(program)
    lowered = lower(inside)
    outputs = lowered.compile(QUICK)(*lowered.place(inputs))
    wanted = run_numpy(program, inputs)
    for output, array in zip(program.outputs, outputs, strict=True):
        np.testing.assert_allclose(array, wanted[output], rtol=1e-9, atol=1e-11)
    return sum(op.attrs.get("algorithm") == PRODUCTS for op in inside.program.body.walk())


@pytest.mark.parametrize(("make", "seed"), [(block_program, 4), (block_program, 3), (step, 0)])
def test_every_collective_that_can_be_runs_inside_products(x64: None, make, seed: int) -> None:
    assert check(make, Mesh.parse("2x4"), seed)


@pytest.mark.slow
@given(
    st.sampled_from([block_program, step]),
    st.sampled_from(["2x4", "4x2", "2x2x2", "8x1", "4x1", "2x2"]),
    st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_any_layout_gives_the_same_numbers(
    x64: None, make: Callable[[], Program], sizes: str, seed: int
) -> None:
    check(make, Mesh.parse(sizes), seed)


def test_a_collective_with_no_product_beside_it_is_refused() -> None:
    program, mesh = block_program(), Mesh.parse("2x4")
    plain = apply(program, mesh, random_assignment(program, mesh, seeded(4)))
    regions = [plain.program.body, *regions_of(plain.program.body)]
    able = {g.collective for region in regions for g in candidates(region)}
    alone = next(
        op for op in plain.program.body.walk() if op.kind == "all_gather" and op not in able
    )

    def attrs(op: Op) -> dict[str, object]:
        size = mesh.sizes[mesh.index(op.attrs["axis"])]
        return {"algorithm": PRODUCTS, "grid": (size,)} if op is alone else {}

    with pytest.raises(LayoutError, match="has none beside it"):
        verify_partitioned(replace(plain, program=marked(plain.program, attrs)))
