"""Compute time: whole tiles, memory bound when thin, never worse when cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import chip, chip_names
from neocc.cost.roofline import elementwise_time, matmul_time, padded_mnk

CHIPS = st.sampled_from(chip_names()).map(chip)
SIZE = st.integers(1, 8192)


def test_a_large_product_reaches_the_efficiency():
    v5p = chip("v5p")
    flops = 2 * 8192**3
    assert matmul_time(v5p, 1, 8192, 8192, 8192, "bf16", 1.0) == pytest.approx(flops / 459e12)
    assert matmul_time(v5p, 1, 8192, 8192, 8192, "bf16") == pytest.approx(
        flops / 459e12 / v5p.matmul_efficiency
    )


@pytest.mark.parametrize("dim", ["m", "n", "k"])
@pytest.mark.parametrize(("name", "unit"), [("v5e", 128), ("v5p", 128), ("v6e", 256)])
def test_half_a_tile_costs_a_whole_one(name: str, unit: int, dim: str):
    sizes = {"m": 8192, "n": 8192, "k": 8192}
    half = padded_mnk(chip(name), **{**sizes, dim: unit // 2})
    assert half == padded_mnk(chip(name), **{**sizes, dim: unit})
    assert half == unit * 8192**2  # twice its FLOPs


def test_rows_stream_in_fine_steps():
    v5e = chip("v5e")
    assert padded_mnk(v5e, 136, 128, 128) == 136 * 128 * 128
    assert padded_mnk(v5e, 128, 136, 128) == 136 * 128 * 128


def test_a_thin_product_is_bound_by_memory():
    v5e = chip("v5e")
    moved = 2 * (8 * 8192 + 8192 * 8192 + 8 * 8192)
    assert matmul_time(v5e, 1, 8, 8192, 8192, "bf16") == pytest.approx(elementwise_time(v5e, moved))


def test_int8_weights_on_v5e_turn_compute_bound_near_the_published_batch():
    # Scaling book, roofs: int8[B, 4096] x int8[4096, 16384] on v5e is FLOPs-bound above B = 271,
    # at nominal rates: there FLOPs take as long as reading the operands and writing an i8 result.
    v5e = chip("v5e")
    compute = 2 * 271 * 4096 * 16384 / v5e.flops("i8")
    memory = (271 * 4096 + 4096 * 16384 + 271 * 16384) / v5e.hbm_bandwidth
    assert compute == pytest.approx(memory, rel=0.05)


@given(c=CHIPS, batch=st.integers(1, 8), m=SIZE, n=SIZE, k=SIZE, parts=st.integers(1, 16))
def test_a_shard_never_takes_longer_than_the_whole(
    c, batch: int, m: int, n: int, k: int, parts: int
):
    whole = matmul_time(c, batch, m * parts, n, k, "bf16")
    assert matmul_time(c, batch, m, n, k, "bf16") <= whole
    assert matmul_time(c, batch, m, n * parts, k, "bf16") >= matmul_time(c, batch, m, n, k, "bf16")
    assert matmul_time(c, batch, m, n, k * parts, "bf16") >= matmul_time(c, batch, m, n, k, "bf16")
    together = matmul_time(c, batch * parts, m, n, k, "bf16")
    one_by_one = parts * matmul_time(c, batch, m, n, k, "bf16")
    if c.sm is None:
        assert together == pytest.approx(one_by_one)
    else:  # a GPU fills its waves with tiles of any product
        assert together <= one_by_one * 1.000001


@given(c=CHIPS, m=SIZE, n=SIZE, k=SIZE)
def test_time_is_at_least_the_useful_flops_and_blind_to_transposition(c, m: int, n: int, k: int):
    seconds = matmul_time(c, 1, m, n, k, "bf16")
    assert seconds >= 2 * m * n * k / c.flops("bf16")
    assert seconds == matmul_time(c, 1, n, m, k, "bf16")


@given(c=CHIPS, a=st.floats(0, 1e12), b=st.floats(0, 1e12))
def test_elementwise_time_is_linear_in_bytes(c, a: float, b: float):
    assert elementwise_time(c, a + b) == pytest.approx(
        elementwise_time(c, a) + elementwise_time(c, b)
    )
