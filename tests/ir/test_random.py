"""Random numbers depend on seed, salt and global index alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.errors import IRError
from neocc.ir.ops import OPS, Context
from neocc.ir.ops.random import threefry
from neocc.ir.program import Op
from neocc.ir.types import Dim

SEED = np.uint32(17)


def noise(dims: list[Dim], distribution: str = "uniform", dtype: str = "f64", salt: int = 3) -> Op:
    g = Graph("noise")
    b.random(g.data("seed", (), "u32"), dims, salt, distribution, dtype)
    return g.ops[0]


def numbers(op: Op, ctx: Context, seed: Any = SEED) -> Any:
    return OPS["random"].evaluate(op, [seed], ctx)[0]


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_vectors(
    key: tuple[int, int], counter: tuple[int, int], words: tuple[int, int]
) -> None:
    """Known answers of threefry2x32 with 20 rounds from the authors' Random123 library."""
    k0, k1, c0, c1 = (np.array([n], np.uint32) for n in (*key, *counter))
    found = threefry((k0, k1), (c0, c1), np)
    assert tuple(int(w[0]) for w in found) == words


@given(
    st.lists(st.sampled_from([(1, 3), (2, 4), (2, 6), (3, 3), (1, 1)]), min_size=1, max_size=3),
    st.sampled_from(["uniform", "normal"]),
    st.data(),
)
@settings(max_examples=40)
def test_a_block_holds_the_numbers_of_the_whole(
    cuts: list[tuple[int, int]], distribution: str, data: st.DataObject
) -> None:
    dims = [Dim("abc"[i], parts * 2 if i else size) for i, (parts, size) in enumerate(cuts)]
    parts = {d.name: p if d.size % p == 0 else 1 for d, (p, _) in zip(dims, cuts, strict=True)}
    number = {n: data.draw(st.integers(0, p - 1)) for n, p in parts.items()}
    op = noise(dims, distribution)

    def block(name: str, size: int) -> tuple[int, int]:
        return size // parts[name], number[name] * (size // parts[name])

    whole = numbers(op, Context(np))
    sizes = [block(d.name, d.size) for d in dims]
    mine = whole[tuple(slice(start, start + local) for local, start in sizes)]
    np.testing.assert_array_equal(numbers(op, Context(np, block=block)), mine)


def test_numpy_and_jax_draw_the_same(x64: None) -> None:
    dims = [Dim("a", 30), Dim("b", 40)]
    for dtype in ("f32", "f64"):
        uniform = noise(dims, dtype=dtype)
        mine, theirs = numbers(uniform, Context(np)), numbers(uniform, Context(jnp), jnp.uint32(17))
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    normal = noise(dims, "normal")
    theirs = numbers(normal, Context(jnp), jnp.uint32(17))
    np.testing.assert_allclose(numbers(normal, Context(np)), theirs, rtol=1e-12, atol=1e-14)


def test_counters_above_2_to_the_32_do_not_wrap() -> None:
    """Blocks of tensors far too large to make, against the counters computed with integers."""
    high, low = Dim("high", 2**20), Dim("low", 2**16)
    starts = {"high": 2**20 - 2, "low": 2**15}

    def block(name: str, size: int) -> tuple[int, int]:
        return 2, starts[name]

    found = numbers(noise([high, low]), Context(np, block=block))
    rows = np.arange(2, dtype=np.uint32)[:, None] + np.uint32(2**20 - 2)
    columns = np.arange(2, dtype=np.uint32)[None] + np.uint32(2**15)
    word, _ = threefry((SEED, np.uint32(3)), (rows, columns), np)
    np.testing.assert_array_equal(found, (word >> np.uint32(8)) * 2.0**-24)
    assert len(np.unique(found)) == 4
    # One word holds exactly 2**32 elements, counted in row-major order.
    full = noise([Dim("high", 2**16), low])
    starts = {"high": 2**16 - 2, "low": 2**16 - 2}
    found = numbers(full, Context(np, block=block))
    index = np.array([[2**32 - 2**16 - 2, 2**32 - 2**16 - 1], [2**32 - 2, 2**32 - 1]], np.uint32)
    word, _ = threefry((SEED, np.uint32(3)), (np.zeros_like(index), index), np)
    np.testing.assert_array_equal(found, (word >> np.uint32(8)) * 2.0**-24)


def test_a_tensor_beyond_64_bits_of_counter_is_refused() -> None:
    with pytest.raises(IRError, match="too large"):
        noise([Dim(n, 2**30) for n in "abc"])


def test_counted_sizes_give_the_numbers_of_the_smaller_tensor() -> None:
    small = noise([Dim("a", 3), Dim("b", 5)])
    g = Graph("large")
    attrs = {**small.attrs, "dims": (Dim("a", 4), Dim("b", 8)), "counted": (3, 5)}
    g.emit("random", [g.data("seed", (), "u32")], **attrs)
    found = numbers(g.ops[0], Context(np))
    np.testing.assert_array_equal(found[:3, :5], numbers(small, Context(np)))


@pytest.mark.parametrize("counted", [(3,), (5, 5)])
def test_counted_sizes_fit_the_dims(counted: tuple[int, ...]) -> None:
    g = Graph("large")
    attrs = {**noise([Dim("a", 4), Dim("b", 8)]).attrs, "counted": counted}
    with pytest.raises(IRError, match="count"):
        g.emit("random", [g.data("seed", (), "u32")], **attrs)


def test_draws_have_the_moments_of_their_distributions() -> None:
    n = 40000
    dims = [Dim("n", n)]
    uniform, normal = (numbers(noise(dims, d), Context(np)) for d in ("uniform", "normal"))
    assert uniform.min() >= 0 and uniform.max() < 1
    for x, mean, std in ((uniform, 0.5, 12**-0.5), (normal, 0.0, 1.0)):
        assert abs(x.mean() - mean) < 5 * std / n**0.5  # five standard errors
        assert abs(x.std() - std) < 5 * std / n**0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / n) ** 0.5
    other = numbers(noise(dims, salt=4), Context(np))
    assert abs(np.corrcoef(uniform, other)[0, 1]) < 5 / n**0.5
