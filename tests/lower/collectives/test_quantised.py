"""Quantised collectives stay within the bounds that they state, and feedback keeps sums true."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.algorithms import FORMULAS
from neocc.lower.collectives import ALGORITHMS, Move, axis_groups
from neocc.lower.collectives import quantised as q
from tests.lower.collectives.devices import mapped, on_devices, quick

LOSSY = sorted(key for key, f in FORMULAS.items() if f.lossy)
DTYPES = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float64": 0.0}


def check_random(data: st.DataObject, most: int) -> None:
    kind, name = data.draw(st.sampled_from(LOSSY))
    form, n = q.FORMATS[name], data.draw(st.integers(1, most))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    rows = data.draw(st.integers(1, 5)) * (n if kind == "reduce_scatter" else 1)
    local = (rows, data.draw(st.sampled_from([1, 3, 100, 300])))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    # Magnitudes from subnormal to huge, unlike within and between blocks; some rows all zero.
    spread = 10.0 ** rng.uniform(-42, 30, (n, rows, 1)) * rng.integers(0, 2, (n, rows, 1))
    x = (rng.normal(size=(n, *local)) * spread).astype(jnp.dtype(dtype))
    run, groups = ALGORITHMS[kind, name].run, axis_groups("x", (n,))
    with jax.enable_x64(True):
        out, bound = quick(
            lambda v: (mapped(lambda b: run(b, groups, Move(0)), 1)(v), stated(kind, v, form))
        )(x)
    assert out.dtype == x.dtype
    wide = x.astype(np.float64)
    if kind == "all_gather":
        true = np.repeat(wide.reshape(1, -1), n, 0)
    else:
        true = wide.sum(0)
        true = np.repeat(true.reshape(1, -1), n, 0) if kind == "all_reduce" else true
    found, bound = (np.asarray(a).astype(np.float64).reshape(true.shape) for a in (out, bound))
    last = DTYPES[dtype] * (np.abs(true) + bound) + q.TINY  # the cast back
    assert (np.abs(found - true) <= bound + last).all()


def stated(kind: str, x: Any, form: q.Format) -> Any:
    """By how much each device may miss each value."""
    n = x.shape[0]
    flat = x.reshape(n, -1)
    if kind == "all_gather":
        return jnp.repeat(q.bound(flat, form).reshape(1, -1), n, 0)
    if kind == "all_reduce":
        return jnp.repeat(q.all_reduce_bound(flat, form)[None], n, 0)
    pieces = flat.reshape(n, n, -1)  # a device's pieces have blocks of their own
    return q.bound(pieces, form).sum(0) + n * q.F32 * jnp.abs(pieces.astype(jnp.float32)).sum(0)


@given(st.data())
@settings(max_examples=5)
def test_errors_are_within_the_bound(data: st.DataObject) -> None:
    check_random(data, 5)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300)
def test_errors_are_within_the_bound_at_length(data: st.DataObject) -> None:
    check_random(data, 16)


@pytest.mark.parametrize("form", q.FORMATS.values(), ids=q.FORMATS)
def test_with_feedback_the_error_of_a_sum_over_steps_does_not_grow(form: q.Format) -> None:
    n, steps = 2, 40
    (group,) = axis_groups("x", (n,))
    rng = np.random.default_rng(2)
    # The same every step, so that without feedback every step loses the same again.
    x = rng.normal(size=(n, 50)).astype(np.float32)

    def total(v: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            lost, kept, plain = carry
            out, lost = q.all_reduce_with_feedback(v, group, form, lost)
            return (lost, kept + out, plain + q.all_reduce(v, group, form)), None

        first = (q.no_feedback(v, group), jnp.zeros_like(v), jnp.zeros_like(v))
        return jax.lax.scan(step, first, None, length=steps)[0][1:]

    kept, plain = on_devices(total, 1, x)
    true = steps * x.astype(np.float64).sum(0)
    # What feedback carries is at most what one step of such terms, and of it, may lose.
    once = np.asarray(q.all_reduce_bound(jnp.asarray(2 * x), form))
    adding = steps * 2.0**-22 * np.abs(true)
    assert (np.abs(kept - true) <= once + adding).all()
    assert np.abs(plain - true).max() > 5 * np.abs(kept - true).max()


@pytest.mark.parametrize("form", q.FORMATS.values(), ids=q.FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_come_out_finite(form: q.Format, bad: float) -> None:
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    (group,) = axis_groups("x", (3,))
    out = on_devices(lambda v: q.all_reduce(v, group, form), 1, x)
    assert not np.isfinite(np.asarray(out)[:, 2]).any()


def test_values_that_a_format_holds_come_through_unchanged() -> None:
    x = np.array([[127.0, -64.0, 3.0, 0.0]], np.float32)
    (group,) = axis_groups("x", (1,))
    out = mapped(lambda v: q.all_gather(v, group, 0, q.FORMATS["int8"]), 1)(x)
    np.testing.assert_array_equal(out, x)
