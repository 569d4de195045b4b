"""Ring collectives of remote DMAs: equal to those of permutes, and no neighbour is overrun."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from neocc.backends.tpu import blocks, collectives, rings
from neocc.backends.tpu.ring import Slots
from neocc.ir.errors import LayoutError
from neocc.lower.collectives import COMBINE, Group, Move, axis_groups, grids
from tests.backends.tpu.interpreter import interpreted, on_mesh

KINDS = ("all_gather", "reduce_scatter", "all_reduce")


def by_permutes(kind: str, x: Any, group: Group, move: Move, ways: int) -> Any:
    combine = COMBINE[move.reduction]
    if kind == "all_gather":
        return grids.all_gather(x, (group,), move.at, ways)
    if kind == "reduce_scatter":
        return grids.reduce_scatter(x, (group,), move.at, combine, ways)
    return grids.all_reduce(x, (group,), combine, ways)


Case = tuple[str, str, tuple[int, ...], Move, int]  # kind, dtype, a device's shape, move, ways


def check(sizes: tuple[int, ...], cases: list[Case], mode: Any, exact: bool = False) -> None:
    """All cases in one program, one after the other; device 1 comes late to each."""
    (group,) = axis_groups("xyz"[len(sizes) - 1], (sizes[-1],))
    rng = np.random.default_rng(0)
    arrays = []
    for _, dtype, shape, _, _ in cases:
        x = rng.integers(-4, 5, (math.prod(sizes), *shape))
        if not exact and jnp.issubdtype(dtype, jnp.floating):
            x = x * np.exp(rng.normal(size=x.shape))
        arrays.append(x.astype(jnp.dtype(dtype)))

    def late(x: Any) -> Any:
        def wait(v: Any, device: Any) -> Any:
            time.sleep(0.02 * (int(device) == 1))
            return v

        return jax.pure_callback(wait, x, x, lax.axis_index(group.axis))

    def kernels(*xs: Any) -> Any:
        found = []
        for x, (kind, _, _, move, ways) in zip(xs, cases, strict=True):
            if found:  # in this order on every device
                x, _ = lax.optimization_barrier((x, found[-1]))
            found.append(collectives.run(kind, late(x), (group,), move, ways))
        return tuple(found)

    def permutes(*xs: Any) -> Any:
        return tuple(
            by_permutes(kind, x, group, move, ways)
            for x, (kind, _, _, move, ways) in zip(xs, cases, strict=True)
        )

    with interpreted(mode) as raced:
        found = jax.device_get(on_mesh(kernels, sizes)(*arrays))
        assert not raced()
    for case, a, b in zip(cases, found, on_mesh(permutes, sizes)(*arrays), strict=True):
        assert a.dtype == b.dtype
        wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if case[0] == "all_reduce" and not exact and case[3].reduction == "sum":
            # Which device begins an element's sum differs, so its rounding does.
            unit = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.floating) else 0
            sums = unit * sizes[-1] * 4 * math.e**3 * sizes[-1]
            np.testing.assert_allclose(*wide, rtol=0, atol=sums, err_msg=str(case))
        else:
            np.testing.assert_array_equal(*wide, err_msg=str(case))


FOUR: list[Case] = [
    ("all_gather", "bfloat16", (3, 5), Move(1), 2),
    ("all_gather", "float32", (6,), Move(0), 1),
    ("reduce_scatter", "bfloat16", (3, 20), Move(1), 2),
    ("reduce_scatter", "float32", (8, 2, 130), Move(0), 1),
    ("reduce_scatter", "int8", (4, 3), Move(0, reduction="max"), 2),
    ("all_reduce", "float32", (5, 7), Move(), 2),
]
EIGHT: list[Case] = [
    ("all_gather", "int8", (2, 33), Move(0), 2),
    ("reduce_scatter", "float32", (16, 3), Move(0), 2),
]


def test_on_four_devices_equal_to_permutes() -> None:
    check((4,), FOUR[::2], "eager")
    check((4,), FOUR[1::2], "on_wait")


def test_on_eight_devices_equal_to_permutes() -> None:
    check((8,), EIGHT, "on_wait")


@pytest.mark.slow
def test_on_one_axis_of_two() -> None:
    check((2, 4), FOUR, "on_wait")


def test_pieces_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that do not fit on chip: here with blocks of a tile."""
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    form = blocks.matrix_of((10, 384), jnp.float32)
    assert form.grid == (2, 1)
    check((3,), [("reduce_scatter", "float32", (30, 384), Move(0), 2)], "on_wait")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4,), (8,), (3, 2), (2, 2, 2), (7,)])
def test_each_kind_dtype_and_way_at_length(sizes: tuple[int, ...]) -> None:
    n = sizes[-1]
    for dtype in ("float32", "bfloat16", "int8", "int32"):
        for ways in (1, 2):
            shapes = [(n, 5), (2, n, 130), (3, 40 * n, 256)]
            cases = [
                (kind, dtype, shape, Move(len(shape) - 2 if len(shape) > 2 else 0, 0, r), ways)
                for kind in KINDS
                for shape in shapes
                for r in ("sum", "min")
            ]
            check(sizes, cases, "eager" if ways == 1 else "on_wait")


@pytest.mark.slow
@given(st.data())
@settings(max_examples=25)
def test_random_shapes(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 8))
    cases: list[Case] = []
    for _ in range(3):
        kind = data.draw(st.sampled_from(KINDS))
        shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        at = data.draw(st.integers(0, len(shape) - 1))
        if kind == "reduce_scatter":
            shape[at] *= n
        dtype = data.draw(st.sampled_from(collectives.NAMES))
        reduction = "sum" if kind == "all_gather" else data.draw(st.sampled_from([*COMBINE]))
        ways = data.draw(st.integers(1, 2))
        cases.append((kind, dtype, tuple(shape), Move(at, 0, reduction), ways))
    check((n,), cases, data.draw(st.sampled_from(["eager", "on_wait"])), exact=True)


def test_a_buffer_that_is_sent_to_before_it_is_free_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The detector that these tests rely on finds what the semaphores are there to prevent."""

    def careless(self: Slots, way: Any, t: int, source: Any = None) -> None:
        self.copy(way, t, self.slot(way, t - 1) if source is None else source).start()

    def silent(self: Slots, way: Any, t: int) -> None:
        self.copy(way, t, self.slot(way, t - 1)).wait_send()

    monkeypatch.setattr(Slots, "send", careless)
    monkeypatch.setattr(Slots, "leave", silent)
    (group,) = axis_groups("x", (6,))
    x = np.zeros((6, 6, 8, 128), np.float32)
    with interpreted() as raced:
        jax.device_get(on_mesh(lambda v: (rings.scatter(v, group, 1, 0),), (6,))(x))
        assert raced()


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
def test_gradients_are_those_of_permutes(kind: str) -> None:
    n, move = 3, Move(0)
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 4, (n, 2 * n, 3)).astype(np.float32)
    shapes = {"all_gather": (2 * n * n, 3), "reduce_scatter": (2, 3), "all_reduce": (2 * n, 3)}
    out = rng.integers(-3, 4, (n, *shapes[kind])).astype(np.float32)

    def pulled(run: Any) -> Any:
        return lambda v, d: jax.vjp(run, v)[1](d)

    with interpreted() as raced:
        run = pulled(lambda v: collectives.run(kind, v, (group,), move))
        found = jax.device_get(on_mesh(run, (n,))(x, out))
        assert not raced()
    right = on_mesh(pulled(lambda v: by_permutes(kind, v, group, move, 2)), (n,))(x, out)
    np.testing.assert_array_equal(found[0], right[0])


def test_what_no_kernel_takes_is_refused_with_the_reason() -> None:
    (small,), (large,) = axis_groups("x", (4,)), axis_groups("x", (128,))
    assert collectives.refused(jnp.bfloat16, small) is None
    assert "float64 is not among float32, bfloat16" in str(collectives.refused("float64", small))
    assert "a ring of 128 devices; kernels are for at most 64" in str(
        collectives.refused(jnp.bfloat16, large)
    )
    with pytest.raises(LayoutError, match="float16 is not among"):
        collectives.run("all_gather", jnp.zeros((2, 2), jnp.float16), (small,), Move())


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    st.sampled_from(["float32", "bfloat16", "int8"]),
)
@settings(max_examples=30)
def test_blocks_are_whole_tiles_that_cover_a_piece_with_little_more(
    shape: list[int], dtype: str
) -> None:
    form = blocks.matrix_of(tuple(shape), dtype)
    (rows, columns), (height, width) = form.shape, form.block
    itemsize = jnp.dtype(dtype).itemsize
    assert (rows % height, columns % width, width % 128) == (0, 0, 0)
    assert height % blocks.sublanes(dtype) == 0
    assert height * width * itemsize <= blocks.BLOCK
    size = math.prod(shape)
    assert size <= rows * columns < size + columns + height * columns
    if size < 2**12:
        x = np.arange(size).reshape(shape)
        matrix = blocks.as_matrices(x, 0, form.shape)
        np.testing.assert_array_equal(blocks.from_matrices(matrix, 0, tuple(shape)), x)
