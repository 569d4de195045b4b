"""Mappings of a mesh: each a bijection, none beaten by another, and none missing that could win."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neocc.cost.collectives import KINDS, collective_time
from neocc.cost.hardware import HardwareError, chip, chip_names
from neocc.cost.mappings import costs, mappings, mesh_shapes, skyline
from neocc.cost.model import CostModel
from neocc.cost.topology import AxisLink, Part, Topology, topology
from neocc.ir.mesh import Mesh

NAMES = st.sampled_from(chip_names())
MESHES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), min_size=1, max_size=3).map(tuple)
SMALL = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3).map(tuple)
BYTES = [1.0, 2.0**12, 2.0**20, 2.0**30]


def found(name: str, mesh: tuple[int, ...], every: bool = False) -> tuple[Topology, ...]:
    try:
        return mappings(chip(name), mesh, every_slice=every)
    except HardwareError as error:
        assert "no slice of" in str(error)
        assume(False)
        raise


def times(links: tuple[AxisLink, ...]) -> np.ndarray:
    """Seconds of each kind of collective at some sizes, on each mesh axis."""
    return np.array([collective_time(k, b, a) for a in links for k in KINDS for b in BYTES])


@settings(max_examples=30)
@given(name=NAMES, mesh=MESHES, every=st.booleans())
def test_every_mapping_gives_each_mesh_position_a_device_of_its_own(name, mesh, every):
    for laid in found(name, mesh, every):
        assert laid.mesh_sizes == mesh
        assert tuple(link.size for link in laid.links()) == mesh
        where = laid.coordinates()
        assert where.shape == (*mesh, len(laid.shape))
        flat = where.reshape(-1, len(laid.shape))
        assert np.all(flat >= 0) and np.all(flat < np.array(laid.shape))
        assert len(np.unique(flat, axis=0)) == math.prod(mesh) == math.prod(laid.shape)


@given(name=NAMES, mesh=MESHES, every=st.booleans())
def test_no_mapping_is_at_least_as_fast_as_another_at_everything(name, mesh, every):
    kept = found(name, mesh, every)
    assert len({laid.links() for laid in kept}) == len(kept)
    for a, b in itertools.permutations([costs(laid) for laid in kept], 2):
        assert any(x > y for x, y in zip(a, b, strict=True))


@given(name=NAMES, mesh=MESHES, every=st.booleans())
def test_the_default_comes_first_unless_another_beats_it(name, mesh, every):
    kept, default = found(name, mesh, every), topology(chip(name), mesh)
    if default not in kept:
        here = times(default.links())
        assert any(np.all(times(k.links()) <= here) and costs(k) != costs(default) for k in kept)
    else:
        assert kept[0] == default


@pytest.mark.parametrize("name", chip_names())
@pytest.mark.parametrize("chips", [16, 128, 256])
def test_the_default_of_a_sorted_mesh_comes_first(name: str, chips: int):
    if chip(name).devices_per_chip == 1:
        for mesh in mesh_shapes(chips):
            default = topology(chip(name), mesh)
            # Pieces of several torus axes make one ring, which others may beat.
            if not any(level.one for link in default.links() for level in link.levels):
                assert mappings(chip(name), mesh)[0] == default


def by_hand(name: str, shape: tuple[int, ...], mesh: tuple[int, ...]) -> Iterator[Topology]:
    """Every mapping on one slice, made in another way: each torus axis is a row of factors, each
    with the mesh axis that takes it."""

    def rows(size: int) -> Iterator[tuple[tuple[int, int], ...]]:
        for count in range(len(mesh) + 1):
            for owners in itertools.permutations(range(len(mesh)), count):
                for factors in itertools.product(range(2, size + 1), repeat=count):
                    if math.prod(factors) == size:
                        yield tuple(zip(owners, factors, strict=True))

    for choice in itertools.product(*map(rows, shape)):
        parts: list[list[Part]] = [[] for _ in mesh]
        for axis, row in enumerate(choice, start=1):
            stride = math.prod(shape[axis - 1 : axis])
            for owner, factor in row:
                stride //= factor
                parts[owner].append(Part(axis, factor, stride))
        if all(math.prod(p.size for p in ps) == n for ps, n in zip(parts, mesh, strict=True)):
            yield Topology(chip(name), (1, *shape, 1), tuple(map(tuple, parts)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e", (4, 4)),
        ("v5e", (2, 8)),
        ("v5e", (2, 16)),
        ("v5p", (2, 2, 4)),
        ("v5p", (4, 4, 4)),
        ("v4", (2, 4, 4)),
    ],
)
def test_no_mapping_by_hand_is_faster_than_those_kept(name: str, shape: tuple[int, ...]):
    for axes in (1, 2, 3):
        for mesh in mesh_shapes(math.prod(shape), axes, ordered=True):
            kept = [times(laid.links()) for laid in mappings(chip(name), mesh, shape)]
            tried = list(by_hand(name, shape, mesh))
            assert len(tried) >= len(kept)
            for laid in tried:
                here = times(laid.links())
                assert any(np.all(k <= here * (1 + 1e-9)) for k in kept), laid


@given(mesh=SMALL)
def test_on_gpus_every_way_to_fill_the_nvlink_domain_is_there(mesh: tuple[int, ...]):
    h100 = chip("h100")
    assert h100.switch
    size = h100.switch.size
    inside = {
        f
        for f in itertools.product(*(range(1, n + 1) for n in mesh))
        if all(n % i == 0 for n, i in zip(mesh, f, strict=True)) and math.prod(f) <= size
    }
    fullest = max(map(math.prod, inside))
    kept = {
        tuple(math.prod(p.size for p in parts if p.axis == 1) for parts in laid.parts)
        for laid in mappings(h100, mesh)
    }
    # None of them is dominated: an axis that has less of the domain is slower for it.
    assert kept == {f for f in inside if math.prod(f) == fullest}


@given(
    points=st.lists(
        st.tuples(*[st.integers(0, 3).map(float)] * 3), min_size=1, max_size=12, unique=True
    )
)
def test_the_skyline_is_what_nothing_dominates(points: list[tuple[float, ...]]):
    def beaten(p: tuple[float, ...]) -> bool:
        return any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)

    assert set(skyline(points)) == {p for p in points if not beaten(p)}


@settings(max_examples=50)
@given(name=NAMES, mesh=MESHES, kind=st.sampled_from(KINDS), bytes_=st.floats(0, 2.0**40))
def test_a_collectives_time_is_a_line_in_its_bytes(name, mesh, kind, bytes_):
    """What ``mappings`` concludes from two points of it."""
    for link in found(name, mesh)[-1].links():
        fixed, far = collective_time(kind, 0, link), collective_time(kind, 2.0**40, link)
        line = fixed + (far - fixed) * bytes_ / 2.0**40
        assert collective_time(kind, bytes_, link) == pytest.approx(line, rel=1e-9)


def test_either_axis_may_have_the_wires_of_its_choice():
    """x has the 8, or half of the plane, on v5p's 4x4x8."""
    laid = mappings(chip("v5p"), (8, 16))
    firsts = [
        sorted(ring.size for level in m.links()[0].levels for ring in level.rings) for m in laid
    ]
    assert firsts[0] == [8]
    # A cube would be one ring, no better than a row of two and four.
    assert [2, 4] in firsts and [2, 2, 2] not in firsts
    domains = [
        [[level.size for level in link.levels] for link in laid.links()]
        for laid in mappings(chip("h100"), (8, 16))
    ]
    assert domains == [[[8], [8, 2]], [[2, 4], [4, 4]], [[4, 2], [2, 8]], [[8], [16]]]


def test_either_axis_may_cross_between_slices():
    outer = {
        tuple(math.prod(p.size for p in parts if p.axis == 0) for parts in laid.parts)
        for laid in mappings(chip("v5e"), (32, 32))
    }
    assert outer == {(4, 1), (2, 2), (1, 4)}


def test_other_slices_are_tried_when_asked_for():
    v3 = chip("v3")  # a chip is two devices; only an axis of 32 is a ring
    assert {laid.torus_shape for laid in mappings(v3, (2, 128))} == {(8, 16)}
    assert (4, 32) in {laid.torus_shape for laid in mappings(v3, (2, 128), every_slice=True)}
    assert {laid.torus_shape for laid in mappings(chip("v5p"), (4, 8), (1, 4, 8))} == {(1, 4, 8)}


def test_a_slice_that_does_not_hold_the_mesh_is_refused():
    with pytest.raises(HardwareError, match="3x5 chips does not hold a mesh of 4x8"):
        mappings(chip("v5e"), (4, 8), (3, 5))
    with pytest.raises(HardwareError, match="a slice has 2 axes, not 3"):
        mappings(chip("v5e"), (4, 8), (2, 4, 4))
    with pytest.raises(HardwareError, match="h100 has no slices"):
        mappings(chip("h100"), (4, 8), (4, 8))


def test_the_cost_model_prices_the_mapping_that_it_is_given():
    v5p, mesh = chip("v5p"), Mesh.parse("8x16")
    default, other = mappings(v5p, mesh.sizes)[:2]
    assert CostModel.of(v5p, mesh).links == tuple((link,) for link in default.links())
    assert CostModel.of(v5p, mesh, other).links == tuple((link,) for link in other.links())
    assert other.links() != default.links()
    with pytest.raises(HardwareError, match="8x16 on v5p is none of mesh x:16,y:8 on v5p"):
        CostModel.of(v5p, Mesh.parse("16x8"), default)
    with pytest.raises(HardwareError, match="8x16 on v5p is none of mesh x:8,y:16 on v4"):
        CostModel.of(chip("v4"), mesh, default)


@given(name=NAMES, mesh=SMALL, kind=st.sampled_from(KINDS), size=st.sampled_from(BYTES))
def test_a_floor_prices_each_collective_as_the_fastest_mapping_does(name, mesh, kind, size):
    c, grid, kept = chip(name), Mesh(tuple(zip("xyz", mesh, strict=False))), found(name, mesh)
    floor = CostModel.floor(c, grid, kept)
    each = [CostModel.of(c, grid, laid) for laid in kept]
    for axis in range(len(mesh)):
        prices = [model.move_seconds(kind, axis, int(size), int(size)) for model in each]
        assert floor.move_seconds(kind, axis, int(size), int(size)) == min(prices)


def test_a_floor_needs_a_mapping():
    with pytest.raises(HardwareError, match="no mapping of mesh x:2,y:8"):
        CostModel.floor(chip("v5p"), Mesh.parse("2x8"), ())


# Shapes of meshes.


@given(chips=st.integers(1, 600), axes=st.integers(1, 3))
def test_mesh_shapes_are_all_factorings_once(chips: int, axes: int):
    divisors = [d for d in range(2, chips + 1) if chips % d == 0]
    expected = {
        f
        for count in range(1, axes + 1)
        for f in itertools.combinations_with_replacement(divisors, count)
        if math.prod(f) == chips
    }
    shapes = mesh_shapes(chips, axes)
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == (expected if chips > 1 else {(1,)})
    every = mesh_shapes(chips, axes, ordered=True)
    assert len(every) == len(set(every))
    assert set(every) == {p for s in shapes for p in itertools.permutations(s)}


def test_mesh_shapes_come_with_few_axes_and_even_ones_first():
    assert mesh_shapes(16) == ((16,), (4, 4), (2, 8), (2, 2, 4))
    assert mesh_shapes(7) == ((7,),)
    with pytest.raises(HardwareError, match="at least 1"):
        mesh_shapes(0)
