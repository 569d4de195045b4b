"""Collective times against published worked examples, measurements, and the laws they obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.collectives import KINDS, collective_time
from neocc.cost.hardware import chip, chip_names
from neocc.cost.topology import AxisLink, Level, Ring, axis_links

BYTES = st.floats(0, 1e12)
LINKS = st.builds(
    lambda name, mesh, axis: axis_links(chip(name), mesh)[axis % len(mesh)],
    st.sampled_from(chip_names()),
    st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=2).map(tuple),
    st.integers(0, 1),
)


def link(*rings: Ring, overhead: float = 0.0) -> AxisLink:
    return AxisLink((Level(rings),), overhead)


def v4(latency: float = 0.0) -> Ring:
    return Ring(4, 45e9, latency, wraps=True)


def v5e(latency: float = 0.0) -> Ring:
    return Ring(4, 45e9, latency)


# Worked examples of https://jax-ml.github.io/scaling-book (sharding, gpus): nominal rates.


def test_gather_over_a_ring_of_v4():
    full = 2 * 1024 * 4096 / 4  # bf16[1024, 4096], its columns cut by Y
    assert collective_time("all_gather", full, link(v4())) == pytest.approx(23e-6, rel=0.02)


def test_gather_over_a_plane_of_v4():
    full = 2 * 1024 * 4096
    assert collective_time("all_gather", full, link(v4(), v4())) == pytest.approx(46e-6, rel=0.02)


def test_small_gathers_cost_their_hops():
    assert collective_time("all_gather", 256, link(v4(1e-6))) == pytest.approx(2e-6, rel=0.01)
    lone = collective_time("all_gather", 2 * 256 * 256, link(v5e(1e-6)))
    assert 3e-6 < lone < 8e-6  # the book takes 3 us of hops alone; 8 us profiled


def test_gather_along_a_line_of_v5e():
    full = 2 * 2048 * 8192
    assert collective_time("all_gather", full, link(v5e())) == pytest.approx(560e-6, rel=0.01)
    ring = Ring(4, 45e9, 0.0, wraps=True)
    assert collective_time("all_gather", full, link(ring)) == pytest.approx(377e-6, rel=0.02)


def test_gather_over_8_h100s():
    node = link(Ring(8, 450e9, 0.0, switched=True))
    assert collective_time("all_gather", 2 * 4096 * 65536, node) == pytest.approx(1.04e-3, rel=0.01)
    assert collective_time("all_gather", 2 * 1024 * 16384, node) == pytest.approx(65e-6, rel=0.01)


# Measurements, with the table's efficiencies and latencies.


def test_profiled_gathers_on_v5e():
    (_, y) = axis_links(chip("v5e"), (8, 4))
    assert collective_time("all_gather", 2 * 2048 * 8192, y) == pytest.approx(680e-6, rel=0.03)
    small = collective_time("all_gather", 2 * 256 * 256, y)
    assert small == pytest.approx(8e-6, rel=0.35)


@pytest.mark.parametrize("bytes_", [2**20, 2**24, 2**28, 2**32])
def test_all_reduce_on_8_a100s_fits_the_measured_line(bytes_: int):
    (node,) = axis_links(chip("a100"), (8,))
    measured = 79e-6 + 2 * 7 / 8 * bytes_ / 227e9
    assert collective_time("all_reduce", bytes_, node) == pytest.approx(measured, rel=0.018)


def test_h100_all_reduce_reaches_the_measured_bus_bandwidth():
    (node,) = axis_links(chip("h100"), (8,))
    busbw = 2 * 7 / 8 * 2**33 / collective_time("all_reduce", 2**33, node)
    assert busbw == pytest.approx(370e9, rel=0.02)


# Formulas.


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_all_to_all_is_a_quarter_of_a_gather_on_a_ring_and_half_on_a_line(n: int):
    local = 1e9  # bytes of a device; the gather makes n times as much
    ring, line = link(Ring(n, 1e9, 0.0, wraps=True)), link(Ring(n, 1e9, 0.0))
    gather = collective_time("all_gather", n * local, ring)
    assert collective_time("all_to_all", local, ring) == pytest.approx(gather / 4)
    # Both ways of a line are of use, so its middle wire carries n/4 of a device's bytes.
    assert collective_time("all_to_all", local, line) == pytest.approx(local * n / 4 / 1e9)


def test_a_hierarchical_gather_is_paced_by_its_slower_level():
    fast, slow = Ring(8, 400e9, 0.0, switched=True), Ring(4, 50e9, 0.0, switched=True)
    both = AxisLink((Level((fast,)), Level((slow,))))
    full = 1e9
    # The 8 devices of a node bring an eighth of the other nodes' data each, at 8 x 50 GB/s.
    assert collective_time("all_gather", full, both) == pytest.approx(full * 7 / 8 / 400e9)
    slower = AxisLink((Level((fast,)), Level((Ring(4, 10e9, 0.0, switched=True),))))
    assert collective_time("all_gather", full, slower) == pytest.approx(full / 8 * 3 / 4 / 10e9)
    assert collective_time("all_to_all", full, both) == pytest.approx(full * 3 / 4 / 50e9)


def test_permute_pays_the_way_back_of_a_line():
    assert collective_time("permute", 1e6, link(Ring(8, 1e9, 1e-6, wraps=True))) == 1e-3 + 1e-6
    assert collective_time("permute", 1e6, link(Ring(8, 1e9, 1e-6))) == 1e-3 + 7e-6


def test_unknown_kinds_and_negative_bytes_are_refused():
    with pytest.raises(ValueError, match="unknown collective 'gather'; known: all_gather"):
        collective_time("gather", 1.0, link(v4()))
    with pytest.raises(ValueError, match="negative"):
        collective_time("all_gather", -1.0, link(v4()))


# Laws.


@given(kind=st.sampled_from(KINDS), bytes_=BYTES)
def test_one_device_has_nothing_to_send(kind: str, bytes_: float):
    assert collective_time(kind, bytes_, AxisLink((), 1.0)) == 0.0


@given(kind=st.sampled_from(KINDS), a=BYTES, b=BYTES, axis=LINKS)
def test_time_grows_with_bytes_and_merging_never_loses(
    kind: str, a: float, b: float, axis: AxisLink
):
    def time(x: float) -> float:
        return collective_time(kind, x, axis)

    assert time(min(a, b)) <= time(max(a, b))
    assert time(a + b) <= (time(a) + time(b)) * (1 + 1e-9)


@given(
    kind=st.sampled_from(KINDS), bytes_=st.floats(1, 1e12), factor=st.integers(2, 64), axis=LINKS
)
def test_the_transfer_term_is_linear(kind: str, bytes_: float, factor: int, axis: AxisLink):
    fixed = collective_time(kind, 0.0, axis)
    once = collective_time(kind, bytes_, axis) - fixed
    assert collective_time(kind, factor * bytes_, axis) - fixed == pytest.approx(
        factor * once, rel=1e-6, abs=1e-12
    )


@given(bytes_=BYTES, axis=LINKS)
def test_scatter_then_gather_is_an_all_reduce_with_one_launch_less(bytes_: float, axis: AxisLink):
    parts = collective_time("reduce_scatter", bytes_, axis) + collective_time(
        "all_gather", bytes_, axis
    )
    parts -= axis.overhead * (axis.size > 1)
    whole = collective_time("all_reduce", bytes_, axis)
    if any(ring.nodes for level in axis.levels for ring in level.rings):
        assert whole <= parts * (1 + 1e-9)  # between GPU nodes a tree may be faster
    else:
        assert whole == pytest.approx(parts)


def test_a_ring_over_many_gpus_waits_for_each_of_them_and_a_tree_does_not():
    h100 = chip("h100")
    few, many = (axis_links(h100, (n,))[0] for n in (16, 1024))
    switch, network = h100.switch.link.latency, h100.network.latency
    assert collective_time("all_gather", 0, few) == pytest.approx(
        h100.collective_overhead + 15 * network
    )
    assert collective_time("all_gather", 0, many) == pytest.approx(
        h100.collective_overhead + 1023 * network
    )
    assert collective_time("all_reduce", 0, many) == pytest.approx(
        h100.collective_overhead + 2 * (7 * network + 7 * switch)
    )


@given(
    bytes_=st.floats(1, 1e12),
    sizes=st.lists(st.integers(2, 16), min_size=1, max_size=3),
    bandwidth=st.floats(1e9, 1e12),
    wraps=st.booleans(),
)
def test_no_gather_beats_the_wires_into_a_device(
    bytes_: float, sizes: list[int], bandwidth: float, wraps: bool
):
    level = Level(tuple(Ring(n, bandwidth, 0.0, wraps) for n in sizes))
    n = math.prod(sizes)
    wires = len(sizes) * (2 if wraps else 1)
    least = bytes_ * (n - 1) / n / (wires * bandwidth)
    assert collective_time("all_gather", bytes_, AxisLink((level,))) >= least * (1 - 1e-12)


@given(bytes_=st.floats(1, 1e12), n=st.integers(2, 64), bandwidth=st.floats(1e9, 1e12))
def test_wrapping_and_bandwidth_never_slow_a_collective(bytes_: float, n: int, bandwidth: float):
    for kind in KINDS:
        line = collective_time(kind, bytes_, link(Ring(n, bandwidth, 1e-6)))
        ring = collective_time(kind, bytes_, link(Ring(n, bandwidth, 1e-6, wraps=True)))
        fast = collective_time(kind, bytes_, link(Ring(n, 2 * bandwidth, 1e-6)))
        assert ring <= line * (1 + 1e-12)
        assert fast <= line
