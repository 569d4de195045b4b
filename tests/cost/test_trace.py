"""The cost model run on traced numbers: the same seconds, and where they come from."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.collectives import KINDS
from neocc.cost.hardware import chip, chip_names
from neocc.cost.model import CostModel
from neocc.cost.roofline import matmul_time
from neocc.cost.trace import Traced, chip_fields, evaluate, formula, traced, traced_cost
from neocc.ir.mesh import Mesh

MESHES = [Mesh.parse(text) for text in ("2x2", "4x8", "2x4x2")]


@given(
    st.sampled_from(chip_names()),
    st.sampled_from(MESHES),
    st.sampled_from([k for k in KINDS if k != "permute"] + ["slice"]),
    st.integers(0, 1),
    st.integers(1, 2**34),
)
def test_traced_seconds_are_the_seconds(
    name: str, mesh: Mesh, kind: str, axis: int, size: int
) -> None:
    cost = CostModel.of(chip(name), mesh)
    plain = cost.move_seconds(kind, axis, size, size)
    found = traced_cost(cost).move_seconds(kind, axis, size, size)
    assert found == plain
    assert isinstance(found, Traced)
    # Worked out again from nothing but the leaves and signs that are shown.
    assert evaluate(found) == plain
    assert all(f.source for f in chip_fields(found))


@given(st.sampled_from(chip_names()), *[st.integers(1, 5000)] * 3)
def test_traced_products_are_the_products(name: str, m: int, n: int, k: int) -> None:
    plain = matmul_time(chip(name), 1, m, n, k, "bf16")
    found = matmul_time(traced(chip(name)), 1, m, n, k, "bf16")
    assert found == plain
    assert evaluate(found) == plain
    assert chip_fields(found)


def test_the_formula_is_arithmetic_that_gives_the_figure():
    cost = traced_cost(CostModel.of(chip("v5e"), Mesh.parse("8x16")))
    found = cost.move_seconds("all_reduce", 1, 2**20, 2**20)
    names, numbers = formula(found), formula(found, names=False)
    assert "torus.link.bandwidth x torus.link.efficiency" in names
    assert "collective_overhead" in names
    assert not re.search(r"[a-z]{2}", numbers)
    worked_out = eval(numbers.replace(" x ", " * ").replace(",", ""))
    assert math.isclose(worked_out, found, rel_tol=1e-5)


def test_a_difference_and_a_quotient_keep_their_brackets():
    link = traced(chip("v5e")).network
    a, b = link.bandwidth, link.latency
    assert formula(1 - (a - b)) == "1 - (network.bandwidth - network.latency)"
    assert formula(a / (b * 2)) == "network.bandwidth / (network.latency x 2)"
    assert formula((a + b) * 3) == "(network.bandwidth + network.latency) x 3"


@pytest.mark.parametrize("name", chip_names())
def test_every_assumption_of_the_table_is_found_for_its_field(name: str):
    made = traced(chip(name))
    figures = chip_fields(sum([made.matmul_efficiency, made.hbm_efficiency, made.network.latency]))
    for field in figures:
        word = chip(name).assumptions.get(field.path)
        assert field.source == (f"assumed: {word}" if word else field.source)
    assert {f.path for f in figures} == {"matmul_efficiency", "hbm_efficiency", "network.latency"}


def test_a_long_sum_is_no_deep_recursion():
    total = sum([traced(chip("v5e")).hbm_bandwidth * 2 for _ in range(5000)])
    assert len(chip_fields(total)) == 1
