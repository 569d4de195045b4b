"""Which algorithm runs a collective: the cheapest exact one, the one asked for, or a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.algorithms import FORMULAS, STANDARD
from neocc.cost.choice import Collectives, price
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.types import Dim, TensorType

SUM = Partial("sum")
ENDS = {
    "all_gather": ("a", None),
    "reduce_scatter": (SUM, "a"),
    "all_reduce": (SUM, None),
    "all_to_all": ("a", "b"),
}
KEYS = sorted((kind, f.name) for (kind, _), f in FORMULAS.items() if not f.inside)


def laid(mesh: Mesh, axis: int, place: object) -> Layout:
    return Layout(tuple(place if i == axis else None for i in range(len(mesh.sizes))))  # pyright: ignore


@given(
    st.sampled_from(["v5e", "v5p", "a100", "h100"]),
    st.sampled_from(["4", "8", "8x16", "4x4x8", "16x8"]),
    st.sampled_from(sorted(ENDS)),
    st.sampled_from(["bf16", "f32"]),
    st.integers(0, 14),
    st.data(),
)
def test_the_chosen_algorithm_is_the_cheapest_of_all_that_are_exact(
    target: str, text: str, kind: str, dtype: str, doubled: int, data: st.DataObject
) -> None:
    mesh = Mesh.parse(text)
    axis = data.draw(st.integers(0, len(mesh.sizes) - 1))
    type = TensorType((Dim("a", 128 << doubled), Dim("b", 128)), dtype)
    ends = tuple(laid(mesh, axis, place) for place in ENDS[kind])
    cost = CostModel.of(chip(target), mesh, collectives=Collectives(auto=True))
    way = cost.way(kind, axis, type, (ends[0], ends[1]))
    moved = max(type.local_bytes(mesh, end) for end in ends)
    every = [
        price(f, moved, type.itemsize, link, cost.chip)
        for f in FORMULAS.values()
        for link in cost.links[axis]
        if f.kind == kind and not (f.lossy or f.kernel) and f.fits(link)
    ]
    assert way.seconds == pytest.approx(min([way.standard, *every]), rel=1e-12)
    assert (way.algorithm == STANDARD) == (way.seconds == way.standard)
    plain = CostModel.of(chip(target), mesh).way(kind, axis, type, (ends[0], ends[1]))
    assert plain.seconds == plain.standard == way.standard and plain.algorithm == STANDARD


@pytest.mark.parametrize(("kind", "name"), KEYS, ids=map("-".join, KEYS))
def test_an_algorithm_that_is_asked_for_runs_wherever_it_can(kind: str, name: str) -> None:
    mesh = Mesh.parse("2x4")
    type = TensorType((Dim("a", 128), Dim("b", 128)), "f32")
    asked = Collectives.asked("standard", [f"{kind.replace('_', '-')} = {name}"])
    asked.check(mesh, chip("v5e"))
    cost = CostModel.of(chip("v5e"), mesh, collectives=asked)
    for axis, size in enumerate(mesh.sizes):
        ends = [laid(mesh, axis, place) for place in ENDS[kind]]
        way = cost.way(kind, axis, type, (ends[0], ends[1]))
        grid = FORMULAS[kind, name].rings[0]
        assert way.algorithm == (name if grid == 1 or size > 2 else STANDARD)
    other = next(k for k in ENDS if k != kind)
    ends = [laid(mesh, 1, place) for place in ENDS[other]]
    assert cost.way(other, 1, type, (ends[0], ends[1])).algorithm == STANDARD


@pytest.mark.parametrize(
    ("mode", "forced", "said"),
    [
        ("best", [], "collectives 'best'; one of auto, standard"),
        ("int8", [], "int8 rounds, so ask for it by name: all_reduce=int8"),
        ("auto", ["all_gather"], "write KIND=ALGORITHM"),
        ("auto", ["all_gather=ring", "all-gather=ring2"], "all_gather has ring already"),
        (
            "auto",
            ["all_gather=rings"],
            "no algorithm 'rings' for all_gather; one of standard, ring",
        ),
        ("auto", ["gather=ring"], "no collective 'gather' has algorithms; those that do"),
    ],
)
def test_what_is_not_known_is_refused_by_name(mode: str, forced: list[str], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        Collectives.asked(mode, forced)


def test_an_algorithm_that_no_axis_can_run_is_refused() -> None:
    asked = Collectives.asked("standard", ["all_reduce=torus"])
    with pytest.raises(LayoutError, match="sizes that are prime"):
        asked.check(Mesh.parse("2x3"), chip("v5e"))
    asked.check(Mesh.parse("2x4"), chip("v5e"))


def test_kernels_are_for_their_chips_dtypes_and_rings() -> None:
    asked = Collectives.asked("standard", ["all_gather=dma"])
    with pytest.raises(LayoutError, match=r"a kernel of TPUs, and h100 is a GPU: ring2"):
        CostModel.of(chip("h100"), Mesh.parse("8"), collectives=asked)
    with pytest.raises(LayoutError, match="a ring of at most 64 devices, and no axis of mesh"):
        asked.check(Mesh.parse("128"), chip("v5e"))
    mesh = Mesh.parse("2x128")
    cost = CostModel.of(chip("v5e"), mesh, collectives=asked)

    def runs(axis: int, dtype: str) -> str:
        type = TensorType((Dim("a", 128), Dim("b", 128)), dtype)
        ends = (laid(mesh, axis, "a"), laid(mesh, axis, None))
        return cost.way("all_gather", axis, type, ends).algorithm

    assert runs(0, "bf16") == "dma"
    assert runs(0, "f64") == runs(1, "bf16") == STANDARD
