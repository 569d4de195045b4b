"""Prices of collectives made of permutes: against the standard ones' formulas, and the laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.algorithms import FORMULAS, formula
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import chip, chip_names
from neocc.cost.rounds import Message, cut, factors, one_ring, rounds_seconds, wires
from neocc.cost.topology import AxisLink, Level, Ring, axis_links

KEYS = st.sampled_from(sorted(FORMULAS))
LINKS = st.builds(
    lambda name, mesh, axis: axis_links(chip(name), mesh)[axis % len(mesh)],
    st.sampled_from(chip_names()),
    st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=2).map(tuple),
    st.integers(0, 1),
)


def ring(n: int, wraps: bool = True) -> Ring:
    return Ring(n, 1e9, 0.0, wraps)


def link(*rings: Ring) -> AxisLink:
    return AxisLink((Level(rings),))


@pytest.mark.parametrize("n", [3, 5, 8, 16])
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_both_ways_round_a_ring_take_the_transfer_of_the_standard_one(kind: str, n: int) -> None:
    full, axis = n * 2e6, link(ring(n))
    standard = collective_time(kind, full, axis)  # n / 2 steps, also where n is odd
    expected = standard * (n // 2) / (n / 2)
    assert formula(kind, "ring2").seconds(full, axis) == pytest.approx(expected)
    one_way = formula(kind, "ring").seconds(full, axis)
    assert one_way == pytest.approx(standard * (n - 1) / (n / 2))


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_on_a_line_the_second_way_gains_nothing(kind: str) -> None:
    full, axis = 8e6, link(ring(8, wraps=False))
    standard = collective_time(kind, full, axis)
    assert formula(kind, "ring").seconds(full, axis) == pytest.approx(standard)
    assert formula(kind, "ring2").seconds(full, axis) >= standard


@pytest.mark.parametrize("rings", [(4, 4), (8, 8), (4, 4, 4)])
def test_a_torus_keeps_all_its_wires_busy(rings: tuple[int, ...]) -> None:
    """Each of k parts starts on another ring; later rings have less left to reduce."""
    n, k, full = rings[0], len(rings), 64 * 3 * 64e3
    axis = link(*map(ring, rings))
    whole = formula("all_reduce", "torus").seconds(full, axis)
    assert whole == pytest.approx(2 * full / k / 2 / 1e9 * sum(n**-i for i in range(k)))
    assert 1 < whole / collective_time("all_reduce", full, axis) < 4 / 3
    assert formula("all_reduce", "hierarchical").seconds(full, axis) == pytest.approx(k * whole)


def test_an_exchange_loads_the_middle_wire_as_the_standard_one_does() -> None:
    switch = Ring(8, 1e9, 0.0, switched=True)
    for axis in (link(ring(7)), link(ring(8, wraps=False)), link(switch)):
        full = 56e6
        standard = collective_time("all_to_all", full, axis)
        assert formula("all_to_all", "shifts").seconds(full, axis) == pytest.approx(standard)


def test_a_small_sum_over_many_gpus_does_not_go_through_one_ring() -> None:
    """A ring of 64 waits for 63 launches, a hierarchy for 4 and 4 both ways."""
    (axis,) = axis_links(chip("h100"), (64,))
    ring, tree = (formula("all_reduce", n) for n in ("ring", "hierarchical"))
    assert tree.seconds(1e3, axis) < 0.2 * ring.seconds(1e3, axis)
    assert [r.size for r in tree.grid(axis)] == [8, 8]


def test_the_slow_network_carries_an_inner_share() -> None:
    fast, slow = Ring(8, 400e9, 0.0, switched=True), Ring(4, 50e9, 0.0, switched=True)
    axis = AxisLink((Level((fast,)), Level((slow,))))
    full = 32 * 8e6
    inside = 2 * full * 7 / 8 / 400e9
    across = 2 * full / 8 * 3 / 4 / 50e9
    found = formula("all_reduce", "hierarchical").seconds(full, axis)
    assert found == pytest.approx(inside + across)


def test_a_byte_a_value_is_a_quarter_of_float32() -> None:
    axis, full = link(ring(8)), 8 * 256 * 4 * 100
    exact = formula("all_gather", "ring2").seconds(full, axis, 4)
    assert formula("all_gather", "int8").seconds(full, axis, 4) == pytest.approx(
        exact * (256 + 4) / (256 * 4)
    )


@given(key=KEYS, a=st.integers(0, 10**9), b=st.integers(0, 10**9), axis=LINKS)
def test_time_grows_with_bytes_and_one_device_sends_nothing(
    key: tuple[str, str], a: int, b: int, axis: AxisLink
) -> None:
    f = FORMULAS[key]
    assert f.seconds(min(a, b), axis) <= f.seconds(max(a, b), axis) * (1 + 1e-12)
    assert f.seconds(a, AxisLink((), 1.0)) == 0.0


@given(key=KEYS, axis=LINKS)
def test_a_grid_has_every_device_once(key: tuple[str, str], axis: AxisLink) -> None:
    f = FORMULAS[key]
    grid = f.grid(axis)
    total = 1
    for part in grid:
        total *= part.size
    assert total == axis.size
    assert axis.size == 1 or f.rings[0] <= len(grid) <= f.rings[1]


def crossings(n: int, by: int, wraps: bool) -> tuple[int, int]:
    """Messages over the busiest wire each way, counted one by one."""
    up, down = [0] * n, [0] * n
    for i in range(n):
        j = (i + by) % n
        k = by % n
        ahead = (k < n - k or (k == n - k and by > 0)) if wraps else j > i
        for wire in range(n):
            if ahead and (wire - i) % n < (j - i) % n:
                up[wire] += 1
            if not ahead and (wire - j) % n < (i - j) % n:
                down[wire] += 1
    return max(up), max(down)


@given(n=st.integers(2, 12), by=st.integers(-11, 11), wraps=st.booleans())
def test_loads_of_wires_are_those_that_counting_gives(n: int, by: int, wraps: bool) -> None:
    if by % n:
        assert wires(by, ring(n, wraps))[:2] == crossings(n, by, wraps)


def test_rings_of_one_axis_share_its_wires() -> None:
    outer, inner = cut(ring(8), (2, 4))
    assert (inner.bandwidth, outer.bandwidth) == (1e9, 1e9 / 4)
    assert (inner.wraps, outer.wraps) == (False, True)
    assert cut(ring(8), (8,)) == (ring(8),)
    assert (factors(16, 2), factors(12, 2), factors(7, 2), factors(64, 3)) == (
        (4, 4), (4, 3), (7, 1), (4, 4, 4),
    )  # fmt: skip
    assert one_ring([ring(4), ring(4)]).size == 16


def test_messages_on_rings_of_their_own_do_not_wait_for_each_other() -> None:
    grid = (ring(4), ring(4))
    together = [(Message(0, 1, 1000), Message(1, 1, 1000))]
    assert rounds_seconds(together, grid, 1.0) == pytest.approx(1.0 + 1e-6)
    alike = [(Message(0, 1, 1000), Message(0, 1, 1000))]
    assert rounds_seconds(alike, grid, 0.0) == pytest.approx(2e-6)


def test_an_unknown_algorithm_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no algorithm 'tree' for all_reduce; one of standard, "):
        formula("all_reduce", "tree")
    with pytest.raises(ValueError, match=r"no collective 'psum' has algorithms; .* all_gather"):
        formula("psum", "ring")
