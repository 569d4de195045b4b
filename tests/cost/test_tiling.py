"""Padding of the TPU's tiled layouts, against buffers that the compiler made."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.cost.tiling import stored_bytes, tiled_bytes
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.types import Dim, TensorType


@pytest.mark.parametrize(
    ("shape", "itemsize", "padded"),
    [
        ((25, 6400), 4, 32 * 6400 * 4),  # a slice of f32[48,25,6400]{2,1,0:T(8,128)}
        ((12, 16, 512, 12, 64), 2, 150_994_944),  # {2,4,3,1,0}: 64 by 512, nothing padded
        ((512, 12565), 4, 512 * 12568 * 4),  # a slice of f32[64,512,12565]{1,2,0}
        ((24, 32), 4, 24 * 128 * 4),
        ((4, 2048), 4, 4 * 2048 * 4),  # T(4,128)
        ((768,), 4, 4096),  # f32[768]{0:T(1024)}
    ],
)
def test_sizes_are_those_of_compiled_buffers(shape, itemsize: int, padded: int) -> None:
    assert tiled_bytes(shape, itemsize) == padded


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
def test_padding_only_adds_and_whole_tiles_have_none(shape: list[int], itemsize: int) -> None:
    size = math.prod(shape) * itemsize
    assert stored_bytes(chip("h100"), shape, itemsize) == size
    assert stored_bytes(chip("v5e"), shape, itemsize) >= size
    assert tiled_bytes((*shape, 16, 128), itemsize) == size * 16 * 128


def test_an_array_of_no_elements_takes_nothing() -> None:
    assert tiled_bytes((8, 0, 128), 4) == 0


def test_the_order_of_dims_does_not_matter() -> None:
    assert tiled_bytes((25, 1600, 64), 2) == tiled_bytes((64, 25, 1600), 2)


def heads(mesh: Mesh) -> Callable[[str, str], float]:
    """Seconds of copying where a weight cut along a dim is gathered."""
    type = TensorType((Dim("embd", 2560), Dim("heads", 32), Dim("head_dim", 80)), "bf16")
    cost = CostModel.of(chip("v5p"), mesh)
    whole = Layout((None,) * len(mesh))
    return lambda kind, dim: cost.copy_seconds(kind, (dim,), type, (Layout((dim,)), whole))


def test_a_gather_along_the_lanes_of_pieces_that_are_not_whole_rows_copies() -> None:
    """By the TPU compiler (v5p, gpt3-2.7b): a copy of 113470 cycles at 1.75 GHz along embd."""
    copying = heads(Mesh.parse("16"))
    assert copying("all_gather", "embd") == pytest.approx(113470 / 1.75e9, rel=0.1)
    assert copying("all_gather", "heads") == copying("all_gather", "head_dim") == 0.0
    assert copying("slice", "embd") == 0.0


def test_whole_rows_of_lanes_are_not_copied() -> None:
    assert heads(Mesh.parse("4"))("all_gather", "embd") == 0.0  # pieces of 640
