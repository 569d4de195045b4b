"""Collective matrix products: equal to gathering first, or to scattering after."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from neocc.lower.collectives import axis_groups
from neocc.lower.collectives.products import gather_product, scatter_product
from tests.lower.collectives.devices import mapped, on_devices, permutes, quick, splits

GATHERED = [("ab,bc->ac", "a"), ("ab,bc->ac", "b"), ("ba,bc->ac", "b"), ("eab,ebc->eac", "e")]
SCATTERED = [("ab,bc->ac", "a"), ("ab,bc->ac", "c"), ("sab,sbc->asc", "s")]


def sizes_for(spec: str, rng: np.random.Generator) -> dict[str, int]:
    return {c: int(rng.integers(1, 6)) for c in spec if c.isalpha()}


def check_gather(data: st.DataObject, most: int) -> None:
    spec, dim = data.draw(st.sampled_from(GATHERED))
    n, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 99))
    ways, chunks = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 4))
    grid = data.draw(st.sampled_from(splits(n, 2)))
    (_, group) = axis_groups("x", grid)  # also rings of part of an axis
    rng = np.random.default_rng(seed)
    sizes = sizes_for(spec, rng)
    a, b = spec.split("->")[0].split(",")
    m = group.size
    x = rng.integers(-3, 4, (n, *(sizes[c] for c in a))).astype(np.float32)
    whole = {**sizes, dim: sizes[dim] * m}
    w = rng.integers(-3, 4, [whole[c] for c in b]).astype(np.float32)
    out = on_devices(lambda v: gather_product(spec, v, w, dim, group, ways, chunks), 1, x)
    for device in range(n):
        ring = range(device // m * m, device // m * m + m)
        gathered = np.concatenate([x[d] for d in ring], a.index(dim))
        np.testing.assert_array_equal(out[device], np.einsum(spec, gathered, w))


def check_scatter(data: st.DataObject, most: int) -> None:
    spec, dim = data.draw(st.sampled_from(SCATTERED))
    n, seed = data.draw(st.integers(1, most)), data.draw(st.integers(0, 99))
    ways, chunks = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 4))
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(seed)
    sizes = sizes_for(spec, rng)
    sizes[dim] *= n
    operands, names = spec.split("->")
    x, w = (
        rng.integers(-3, 4, (n, *(sizes[c] for c in part))).astype(np.float32)
        for part in operands.split(",")
    )
    out = on_devices(lambda v, u: scatter_product(spec, v, u, dim, group, ways, chunks), 1, x, w)
    total = sum(np.einsum(spec, x[d], w[d]) for d in range(n))
    right = np.split(np.asarray(total), n, names.index(dim))
    np.testing.assert_array_equal(out, np.stack(right))


@given(st.data())
@settings(max_examples=4)
def test_a_product_of_what_is_gathered(data: st.DataObject) -> None:
    check_gather(data, 8)


@given(st.data())
@settings(max_examples=4)
def test_a_product_that_is_scattered(data: st.DataObject) -> None:
    check_scatter(data, 6)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300)
def test_products_at_length(data: st.DataObject) -> None:
    check_gather(data, 16)
    check_scatter(data, 16)


def test_gradients_are_those_of_the_standard_collectives(x64: None) -> None:
    n = 5
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(n, 4, 3)), rng.normal(size=(n, 3, 2))
    y, u = rng.normal(size=(n, 4 * n, 3)), rng.normal(size=(n, 3, 2))

    def loss(f: Any) -> Any:
        return jax.grad(lambda a, b: (jnp.sin(mapped(f, 1)(a, b))).sum(), (0, 1))

    def every() -> Any:
        spec = "ab,bc->ac"
        yield (
            loss(lambda a, b: gather_product(spec, a, b, "a", group, 2, 2))(x, w),
            loss(lambda a, b: lax.all_gather(a, "x", tiled=True) @ b)(x, w),
        )
        yield (
            loss(lambda a, b: scatter_product(spec, a, b, "a", group, 2, 2))(y, u),
            loss(lambda a, b: lax.psum_scatter(a @ b, "x", tiled=True))(y, u),
        )

    for found, right in quick(lambda: list(every()))():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, right)


def test_narrow_sums_over_a_gathered_dim_add_up_in_float32() -> None:
    n = 4
    (group,) = axis_groups("x", (n,))
    # 256 + 1 is 256 in bfloat16: added one by one, three ones would be lost.
    x = jnp.array([256, 1, 1, 2], jnp.bfloat16).reshape(n, 1, 1)
    w = jnp.ones((n, 1), jnp.bfloat16)
    out = mapped(lambda v: gather_product("ab,bc->ac", v, w, "b", group), 1)(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32).ravel(), [260.0] * n)


@pytest.mark.parametrize(("ways", "chunks", "count"), [(1, 1, 7), (2, 1, 7), (2, 2, 14)])
def test_no_permute_carries_more_than_a_shard(ways: int, chunks: int, count: int) -> None:
    (group,) = axis_groups("x", (8,))
    x, w = jax.ShapeDtypeStruct((6, 5), "float32"), np.ones((5, 2), np.float32)
    traced = jax.make_jaxpr(
        lambda v: gather_product("ab,bc->ac", v, w, "a", group, ways, chunks),
        axis_env=[("x", 8)],
    )(x)
    found = list(permutes(traced.jaxpr))
    assert len(found) == count
    assert {eqn.invars[0].aval.shape for eqn in found} == {(6 // chunks, 5)}
