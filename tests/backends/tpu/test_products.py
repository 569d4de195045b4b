"""Products that hide their gather or scatter, in one kernel: equal to those of permutes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neocc.backends.tpu import products
from neocc.ir.errors import LayoutError
from neocc.lower.collectives import axis_groups
from neocc.lower.collectives import products as portable
from tests.backends.tpu.interpreter import interpreted, on_mesh

# spec, dim, sizes by letter, dtype, ways; small integers, so that sums are exact
Case = tuple[str, str, dict[str, int], str, int]


def check(n: int, cases: list[Case], mode: Any) -> None:
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(0)
    arrays = []
    for spec, dim, sizes, dtype, _ in cases:
        a, b, _ = portable.subscripts(spec)
        for letters, more in ((a, 1), (a, n), (b, 1)):
            shape = [sizes[c] * (more if c == dim else 1) for c in letters]
            arrays.append(rng.integers(-2, 3, (n, *shape)).astype(jnp.dtype(dtype)))

    def run(gather: Any, scatter: Any) -> Any:
        def body(*xs: Any) -> Any:
            found = []
            for i, (spec, dim, _, _, ways) in enumerate(cases):
                x, y, w = xs[3 * i : 3 * i + 3]
                if found:
                    (x, y), _ = jax.lax.optimization_barrier(((x, y), found[-1]))
                found.append(gather(spec, x, w, dim, group, ways))
                y, _ = jax.lax.optimization_barrier((y, found[-1]))
                found.append(scatter(spec, y, w, dim, group, ways))
            return tuple(found)

        return jax.device_get(on_mesh(body, (n,))(*arrays))

    with interpreted(mode) as raced:
        found = run(products.gather_product, products.scatter_product)
        assert not raced()
    for a, b in zip(found, run(portable.gather_product, portable.scatter_product), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


ROWS: Case = ("ab,bc->ac", "a", {"a": 3, "b": 7, "c": 5}, "float32", 2)
INNER: Case = ("dab,bc->adc", "a", {"a": 2, "b": 5, "c": 130, "d": 2}, "bfloat16", 1)


def test_on_four_devices_equal_to_permutes() -> None:
    check(4, [ROWS, INNER], "on_wait")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_at_length(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several blocks of rows, columns and sums."""
    monkeypatch.setattr(products, "BLOCK", 128)
    big = {"a": 140, "b": 200, "c": 260}
    for mode in ("eager", "on_wait"):
        for ways in (1, 2):
            blocks = ("ab,bc->ac", "a", big, "bfloat16", ways)
            check(n, [(*ROWS[:4], ways), (*INNER[:4], ways), blocks], mode)


def test_gradients_are_those_of_permutes() -> None:
    n, spec = 2, "ab,bc->ac"
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-3, 4, (n, *s)).astype(np.float32) for s in ((4, 3), (3, 2)))
    gathered, scattered = (
        rng.integers(-3, 4, (n, *s)).astype(np.float32) for s in ((8, 2), (2, 2))
    )

    def pulled(gather: Any, scatter: Any) -> Any:
        def body(*a: Any) -> Any:
            first = jax.vjp(lambda x, w: gather(spec, x, w, "a", group), *a[:2])[1](a[2])
            return *first, *jax.vjp(lambda x, w: scatter(spec, x, w, "a", group), *a[:2])[1](a[3])

        return jax.device_get(on_mesh(body, (n,))(x, w, gathered, scattered))

    with interpreted() as raced:
        found = pulled(products.gather_product, products.scatter_product)
        assert not raced()
    right = pulled(portable.gather_product, portable.scatter_product)
    jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.parametrize(
    ("spec", "dim", "dtype", "reason"),
    [
        ("ab,bc->ac", "b", "float32", "b is not among the rows of ab,bc->ac"),
        ("ab,bc->ac", "c", "float32", "c is not among the rows"),
        ("eab,ebc->eac", "a", "float32", "a batch of products"),
        ("ab,bc->ac", "a", "int8", "a product of int8 and int8"),
    ],
)
def test_other_products_are_refused_with_the_reason(spec, dim, dtype, reason) -> None:
    (group,) = axis_groups("x", (4,))
    x, w = (np.zeros([2] * len(s), dtype) for s in portable.subscripts(spec)[:2])
    assert reason in str(products.refused(spec, dim, x, w, group))
    with pytest.raises(LayoutError, match=reason):
        products.gather_product(spec, x, w, dim, group)
