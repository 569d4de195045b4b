"""A GPU's matrix products: whole tiles, whole waves, and k cut where tiles are few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import Multiprocessors
from neocc.cost.waves import wave_time

# 100 multiprocessors of 1 TFLOP/s; loads and the start of a tile cost nothing here.
FREE = Multiprocessors(100, 1, 1e30, 0.0, 1e12)
RATE = 1e14
SIZE = st.integers(1, 8192)


def test_full_waves_run_at_the_rate():
    # 1000 tiles of 256 x 128: ten waves.
    m, n, k = 256 * 10, 128 * 100, 4096
    assert wave_time(FREE, RATE, 1, m, n, k, 2) == pytest.approx(2 * m * n * k / RATE)


def test_one_more_tile_than_a_wave_holds_takes_another_wave():
    # k = 32 is one step, so that it cannot be cut. 101 x 4 tiles of 64 x 64 need 5 waves of 100.
    wave = 2 * 64 * 64 * 32 / (RATE / 100)
    assert wave_time(FREE, RATE, 1, 64 * 100, 64 * 4, 32, 2) == pytest.approx(4 * wave)
    assert wave_time(FREE, RATE, 1, 64 * 101, 64 * 4, 32, 2) == pytest.approx(5 * wave)


def test_few_tiles_are_cut_along_k():
    # One tile of 256 x 128: on one multiprocessor of 100; smaller tiles and 8 pieces of k use 64.
    whole = 2 * 256 * 128 * 4096 / (RATE / 100)
    assert wave_time(FREE, RATE, 1, 256, 128, 4096, 2) == pytest.approx(whole / 64)


def test_a_tile_that_loads_more_than_it_computes_waits():
    slow = Multiprocessors(100, 1, 1e10, 0.0, 1e12)
    m = n = k = 8192
    loads = (256 + 128) * k * 2 * (m // 256) * (n // 128)  # each tile its rows and columns
    assert wave_time(slow, 1e30, 1, m, n, k, 2) >= loads / 1e10
    # A pair of multiprocessors that share what they load has less of it.
    pair = Multiprocessors(100, 2, 1e10, 0.0, 1e12)
    assert wave_time(pair, 1e30, 1, m, n, k, 2) < wave_time(slow, 1e30, 1, m, n, k, 2)


@given(m=SIZE, n=SIZE, k=SIZE, batch=st.integers(1, 8), more=st.integers(0, 512))
def test_more_work_never_takes_less_time(m: int, n: int, k: int, batch: int, more: int):
    sm = Multiprocessors(108, 1, 7e12, 1e-6, 1e12)
    time = wave_time(sm, 3e14, batch, m, n, k, 2)
    assert time >= 2 * batch * m * n * k / 3e14
    assert time == wave_time(sm, 3e14, batch, n, m, k, 2)
    for bigger in ((m + more, n, k), (m, n + more, k), (m, n, k + more)):
        assert wave_time(sm, 3e14, batch, *bigger, 2) >= time * 0.999999
