"""Where mesh axes lie: slice shapes, whole torus axes first, NVLink domains filled first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import HardwareError, chip, chip_names
from neocc.cost.topology import axis_links, default_slice, topology

MESHES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("name", "chips", "shape", "wraps"),
    [
        ("v5e", 128, (8, 16), (False, True)),
        ("v5e", 256, (16, 16), (True, True)),
        ("v5e", 8, (2, 4), (False, False)),
        ("v6e", 64, (8, 8), (False, False)),
        ("v5p", 128, (4, 4, 8), (True, True, True)),
        ("v5p", 512, (8, 8, 8), (True, True, True)),
        ("v5p", 8, (2, 2, 2), (False, False, False)),
        ("v4", 4, (2, 2, 1), (False, False, False)),
        ("v4", 4096, (16, 16, 16), (True, True, True)),
    ],
)
def test_default_slices_are_those_one_can_rent(
    name: str, chips: int, shape: tuple[int, ...], wraps: tuple[bool, ...]
):
    torus = chip(name).torus
    assert torus
    assert default_slice(torus, chips) == shape
    assert torus.wraps(shape) == wraps


def rings(name: str, mesh: tuple[int, ...]) -> list[list[tuple[int, bool]]]:
    return [
        [(ring.size, ring.wraps) for level in link.levels for ring in level.rings]
        for link in axis_links(chip(name), mesh)
    ]


def test_a_mesh_axis_takes_whole_torus_axes():
    assert rings("v5p", (8, 16)) == [[(8, True)], [(4, True), (4, True)]]
    assert rings("v5p", (4, 4, 8)) == [[(4, True)], [(4, True)], [(8, True)]]
    assert rings("v5p", (128,)) == [[(4, True), (4, True), (8, True)]]
    assert rings("v5e", (8, 16)) == [[(8, False)], [(16, True)]]
    assert topology(chip("v5p"), (8, 16)).name == "v5p:4x4x8"


def test_a_cut_torus_axis_shares_its_wires():
    torus = chip("v5e").torus
    assert torus
    x, y = axis_links(chip("v5e"), (4, 32))  # 8x16: y takes the 16 and pairs along the 8
    assert [ring.size for ring in y.levels[0].rings] == [2, 16]
    (ring,) = x.levels[0].rings
    assert (ring.size, ring.wraps) == (4, False)
    assert ring.bandwidth == torus.link.rate / 2  # two such lines lie on the same wires
    assert ring.latency == 2 * torus.link.latency


def test_gpus_fill_the_nvlink_domain_from_the_last_axis():
    h100 = chip("h100")
    assert h100.switch
    x, y = axis_links(h100, (8, 16))
    assert not x.hierarchical and y.hierarchical
    assert [level.size for level in y.levels] == [8, 2]
    assert x.levels[0].bandwidth == h100.network.rate
    assert y.levels[0].bandwidth == h100.switch.link.rate
    assert topology(h100, (8, 16)).name == "1x16x8"
    x, y = axis_links(h100, (4, 4))
    assert [level.size for level in x.levels] == [2, 2]
    assert [level.size for level in y.levels] == [4]


def test_two_devices_of_one_chip_pair_up_on_the_last_axis():
    topo = topology(chip("tpu7x"), (8, 16))
    assert topo.torus_shape == (4, 4, 4)
    assert [level.size for level in topo.links()[1].levels] == [2, 8]


def test_more_than_a_pod_goes_over_the_data_centre_network():
    x, y = axis_links(chip("v5e"), (4, 256))
    assert [level.size for level in x.levels] == [4]
    assert x.levels[0].bandwidth == chip("v5e").network.rate
    assert [ring.size for ring in y.levels[0].rings] == [16, 16]


def test_a_slice_shape_can_be_chosen():
    x, y = axis_links(chip("v5e"), (4, 8), (2, 16))
    assert (x.size, y.size) == (4, 8)
    with pytest.raises(HardwareError, match=r"slice of 3x5 chips does not hold a mesh of 4x8"):
        axis_links(chip("v5e"), (4, 8), (3, 5))


def test_impossible_sizes_are_refused():
    with pytest.raises(HardwareError, match="at least 1"):
        axis_links(chip("v5e"), (0, 4))
    with pytest.raises(HardwareError, match=r"no slice of 17 chips"):
        axis_links(chip("v5e"), (17,), None)


@given(name=st.sampled_from(chip_names()), mesh=MESHES)
def test_axes_keep_their_sizes_and_devices_their_places(name: str, mesh: tuple[int, ...]):
    try:
        topo = topology(chip(name), mesh)
    except HardwareError as error:
        assert "no slice of" in str(error)
        return
    assert tuple(link.size for link in topo.links()) == mesh
    where = topo.coordinates()
    assert where.shape == (*mesh, len(topo.shape))
    flat = where.reshape(-1, len(topo.shape))
    assert np.all(flat >= 0) and np.all(flat < np.array(topo.shape))
    assert len(np.unique(flat, axis=0)) == math.prod(mesh) == math.prod(topo.shape)


def test_coordinates_follow_the_mapping():
    where = topology(chip("v5p"), (8, 16)).coordinates()
    assert [tuple(c) for c in where[:3, 0, 1:4]] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert [tuple(c) for c in where[0, 3:6, 1:4]] == [(0, 3, 0), (1, 0, 0), (1, 1, 0)]


def test_pieces_of_several_torus_axes_make_one_ring_and_whole_ones_as_many():
    laid = topology(chip("v5p"), (8, 16))
    (plane,) = laid.links()[1].levels
    assert [ring.size for ring in plane.rings] == [4, 4] and not plane.one
    assert plane.bandwidth == 2 * sum(ring.bandwidth for ring in plane.rings)
    halves = topology(chip("v4"), (8, 8))
    for link in halves.links():
        (level,) = link.levels
        assert level.one and level.wraps and len(level.rings) == 2
        assert level.bandwidth == 2 * min(ring.bandwidth for ring in level.rings)
        assert level.latency == 4 * max(ring.latency for ring in level.rings)
