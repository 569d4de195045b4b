"""Ring attention: what attention over whole keys and values gives, and as much work each step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.lower.collectives import axis_groups
from neocc.lower.collectives.attention import from_zigzag, ring_attention, to_zigzag
from tests.lower.collectives.devices import mapped, on_devices, permutes, quick


def attention(np: Any, q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
    """Of whole sequences; ``np`` is NumPy or jax.numpy."""
    scores = scale * np.einsum("...sd,...md->...sm", q, k)
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1)[..., None])
    return np.einsum("...sm,...me->...se", weights / weights.sum(-1)[..., None], v)


def shards(np: Any, x: Any, n: int) -> Any:
    """[..., seq, d] to [n, ..., seq / n, d]."""
    return np.stack(np.split(x, n, -2))


def whole(np: Any, x: Any) -> Any:
    return np.concatenate(list(x), -2)


def operands(n: int, local: int, memory: int, heads: int, groups: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    lead = [(groups, heads), (groups, 1), (groups, 1)]  # query heads share keys and values
    sizes = [(n * local, 4), (n * memory, 4), (n * memory, 3)]
    return [2 * rng.normal(size=(*a, *b)) for a, b in zip(lead, sizes, strict=True)]


def check(data: st.DataObject, most: int) -> None:
    n, causal = data.draw(st.integers(1, most)), data.draw(st.booleans())
    local = 2 * data.draw(st.integers(1, 3))
    memory = local if causal else data.draw(st.integers(1, 5))
    heads, seed = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99))
    (group,) = axis_groups("x", (n,))
    with jax.enable_x64(True):
        q, k, v = operands(n, local, memory, heads, 2, seed)
        cut = (shards(np, x, n) for x in (q, k, v))
        out = on_devices(lambda *o: ring_attention(*o, group, causal, 0.5), 1, *cut)
    right = attention(np, q, k, v, causal, 0.5)
    np.testing.assert_allclose(whole(np, out), right, rtol=1e-11, atol=1e-12)


@given(st.data())
@settings(max_examples=3)
def test_equals_attention_over_whole_keys_and_values(data: st.DataObject) -> None:
    check(data, 6)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150)
def test_equals_attention_over_whole_keys_and_values_at_length(data: st.DataObject) -> None:
    check(data, 16)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_attention(x64: None, causal: bool) -> None:
    n = 2
    (group,) = axis_groups("x", (n,))
    given = operands(n, 4, 4, 2, 1, 0)

    def ring(*o: Any) -> Any:
        run = mapped(lambda *b: ring_attention(*b, group, causal, 0.5), 1)
        return jnp.sin(whole(jnp, run(*(shards(jnp, x, n) for x in o)))).sum()

    def plain(*o: Any) -> Any:
        return jnp.sin(attention(jnp, *o, causal, 0.5)).sum()

    found, right = quick(lambda o: [jax.grad(f, (0, 1, 2))(*o) for f in (ring, plain)])(given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, right)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_zigzag_gives_every_device_an_early_and_a_late_half_and_back(n: int) -> None:
    (group,) = axis_groups("x", (n,))
    x = np.arange(4 * n).reshape(n, 4)
    zigzag = np.asarray(mapped(lambda v: to_zigzag(v, group, 0), 1)(x))
    halves = x.reshape(2 * n, 2)
    right = [np.concatenate([halves[r], halves[2 * n - 1 - r]]) for r in range(n)]
    np.testing.assert_array_equal(zigzag, right)
    back = mapped(lambda v: from_zigzag(v, group, 0), 1)(zigzag)
    np.testing.assert_array_equal(back, x)


def score_products(jaxpr: Any) -> int:
    """Multiply-adds of the products in a traced function."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((lhs, _), _) = eqn.params["dimension_numbers"]
            summed = np.prod([eqn.invars[0].aval.shape[i] for i in lhs])
            total += int(np.prod(eqn.outvars[0].aval.shape) * summed)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += score_products(inner)
    return total


def test_a_causal_mask_halves_the_work_of_every_device() -> None:
    """Of 4 n^2 pairs of half blocks a device takes 2 n + 1 of 4 n, and keys move n - 1 times."""
    n, block = 8, jax.ShapeDtypeStruct((1, 4, 4), "float32")
    (group,) = axis_groups("x", (n,))

    def traced(causal: bool) -> Any:
        def run(q: Any, k: Any, v: Any) -> Any:
            return ring_attention(q, k, v, group, causal)

        return jax.make_jaxpr(run, axis_env=[("x", n)])(block, block, block).jaxpr

    masked, full = traced(True), traced(False)
    assert score_products(masked) * 4 * n == score_products(full) * (2 * n + 1)
    assert len(list(permutes(full))) == 2 * (n - 1)
    assert len(list(permutes(masked))) == 2 * (n - 1) + 2 * 4  # and to zig-zag order and back


def test_large_scores_do_not_overflow() -> None:
    n = 2
    (group,) = axis_groups("x", (n,))
    q, k, v = (np.full((n, 2, 4), s, np.float32) for s in (100.0, 100.0, 3.0))
    out = on_devices(lambda *o: ring_attention(*o, group), 1, q, k, v)
    np.testing.assert_allclose(out, v, rtol=1e-6)
