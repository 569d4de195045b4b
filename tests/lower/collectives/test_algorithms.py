"""Every algorithm against NumPy and against what its formula says that it sends."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from neocc.cost.algorithms import FORMULAS
from neocc.lower.collectives import ALGORITHMS, Groups, Move, all_reduce_together, axis_groups
from neocc.lower.collectives.quantised import FORMATS
from tests.lower.collectives.devices import (
    along,
    grids_on_meshes,
    mapped,
    on_devices,
    permutes,
    quick,
    splits,
)

EXACT = sorted(key for key, f in FORMULAS.items() if not f.lossy)
DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int8")
REDUCE: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def reference(kind: str, x: np.ndarray, move: Move) -> np.ndarray:
    """What each of n devices should have; x[others, n, ...]; sums in float64."""
    n = x.shape[1]
    if kind == "all_gather":
        whole = np.concatenate([x[:, i] for i in range(n)], axis=1 + move.at)
        return np.stack([whole] * n, 1)
    if kind == "all_to_all":
        sent = np.stack(np.split(x, n, axis=2 + move.to), 2)  # others, from, to, ...
        joined = [np.concatenate([sent[:, s, d] for s in range(n)], 1 + move.at) for d in range(n)]
        return np.stack(joined, 1)
    wide = x if x.dtype.kind == "i" else x.astype(np.float64)
    total = REDUCE[move.reduction].reduce(wide, axis=1)
    if kind == "all_reduce":
        return np.stack([total] * n, 1)
    return np.stack(np.split(total, n, axis=1 + move.at), 1)


def rounding(kind: str, x: np.ndarray, move: Move, dtype: Any) -> np.ndarray:
    """The most that n - 1 sums in the dtype may round off, in any order."""
    n = x.shape[1]
    unit = float(jnp.finfo(dtype).eps) / 2
    share = (n - 1) * unit / max(1e-9, 1 - (n - 1) * unit)
    return 1.01 * share * reference(kind, np.abs(x), Move(move.at, move.to, "sum"))


def check_random(data: st.DataObject, most: int) -> None:
    kind, name = data.draw(st.sampled_from(EXACT))
    algorithm = ALGORITHMS[kind, name]
    mesh, axes, groups = data.draw(grids_on_meshes(algorithm.formula.rings, most))
    n = math.prod(group.size for group in groups)
    dtype = jnp.dtype(data.draw(st.sampled_from(DTYPES)))
    local = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    at, to = (data.draw(st.integers(0, len(local) - 1)) for _ in range(2))
    reductions = ("sum", "max", "min") if "reduce" in kind else ("sum",)
    move = Move(at, to, data.draw(st.sampled_from(reductions)))
    if kind in ("reduce_scatter", "all_to_all"):
        local[at if kind == "reduce_scatter" else to] *= n
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    shape = (*mesh, *local)
    whole = data.draw(st.booleans()) or dtype.kind == "i"
    if whole:  # sums are exact, so every order gives the same
        x = rng.integers(-2, 3, shape).astype(dtype)
    else:
        x = (rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))).astype(dtype)
    with jax.enable_x64(True):
        out = np.asarray(on_devices(lambda v: algorithm.run(v, groups, move), len(mesh), x))
    assert out.dtype == dtype
    terms = along(x, mesh, axes)
    found, right = along(out, mesh, axes), reference(kind, terms, move)
    assert found.shape == right.shape
    if whole or move.reduction != "sum" or "reduce" not in kind or n <= 2:
        assert (found == right.astype(dtype)).all()
    else:
        wide = found.astype(np.float64)
        assert (np.abs(wide - right) <= rounding(kind, terms, move, dtype)).all()


@given(st.data())
@settings(max_examples=12)
def test_random_meshes_shapes_and_dtypes(data: st.DataObject) -> None:
    check_random(data, 12)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=600)
def test_random_meshes_shapes_and_dtypes_at_length(data: st.DataObject) -> None:
    check_random(data, 64)


def standard(kind: str, x: Any, move: Move) -> Any:
    """XLA's own on the axis ``x``."""
    if kind == "all_reduce":
        return lax.psum(x, "x")
    if kind == "all_gather":
        return lax.all_gather(x, "x", axis=move.at, tiled=True)
    if kind == "reduce_scatter":
        return lax.psum_scatter(x, "x", scatter_dimension=move.at, tiled=True)
    return lax.all_to_all(x, "x", move.to, move.at, tiled=True)


def form(kind: str, name: str, n: int) -> tuple[int, ...]:
    count = FORMULAS[kind, name].rings[0]
    return splits(n, count)[count - 1]  # of 6: (6,), (2, 3)


def test_on_eight_devices_under_shard_map_each_gives_what_the_standard_one_gives() -> None:
    """One program of all of them."""
    x = np.random.default_rng(0).integers(-9, 10, (16, 24)).astype(np.float32)
    move = Move(1, 1)

    def body(v: Any) -> tuple[Any, ...]:
        return tuple(
            jnp.stack([ALGORITHMS[key](v, "x", grid(*key), move), standard(key[0], v, move)])
            for key in EXACT
        )

    def grid(kind: str, name: str) -> tuple[int, ...]:
        return {1: (8,), 2: (4, 2)}[FORMULAS[kind, name].rings[0]]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("x",))
    outs = [P(None, "x")] * len(EXACT)
    f = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=tuple(outs), check_vma=False)
    for key, both in zip(EXACT, quick(f)(x), strict=True):
        np.testing.assert_array_equal(both[0], both[1], err_msg=str(key))


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FORMULAS}))
def test_gradients_are_those_of_the_standard_collective(x64: None, kind: str, n: int) -> None:
    """Quantised ones too: rounding has no gradient of its own. All of a kind in one program."""
    move = Move(0, 1)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, n, 2 * n))
    names = [name for (k, name), f in FORMULAS.items() if k == kind and (f.rings[0] == 1 or n == 6)]
    right = jax.eval_shape(mapped(lambda v: standard(kind, v, move), 1), x)
    weights = rng.normal(size=right.shape)

    def through(run: Any) -> Any:
        return jax.grad(lambda v: (weights * mapped(run, 1)(v)).sum())

    def every(v: Any) -> list[Any]:
        runs = [
            lambda b, name=name: ALGORITHMS[kind, name](b, "x", form(kind, name, n), move)
            for name in names
        ]
        return [through(run)(v) for run in (lambda b: standard(kind, b, move), *runs)]

    expected, *found = quick(every)(x)
    for name, gradient in zip(names, found, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def sent(run: Any, groups: Groups, block: Any) -> Counter[tuple[int, int, int]]:
    """(ring, places on, bytes) of each permute that a traced algorithm makes."""
    (axis, total), *_ = {(g.axis, g.total) for g in groups}
    moves = {}
    for i, group in enumerate(groups):
        for by in range(1, group.size):
            place = [d // group.stride % group.size for d in range(total)]
            to = [d + ((p + by) % group.size - p) * group.stride for d, p in enumerate(place)]
            moves[tuple(enumerate(to))] = (i, by)
    found: Counter[tuple[int, int, int]] = Counter()
    for eqn in permutes(jax.make_jaxpr(run, axis_env=[(axis, total)])(block).jaxpr):
        shape = eqn.invars[0].aval
        ring, by = moves[tuple(sorted(map(tuple, eqn.params["perm"])))]
        found[ring, by, shape.size * shape.dtype.itemsize] += 1
    return found


@given(st.data())
@settings(max_examples=20)
def test_each_sends_what_its_formula_says(data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(sorted(FORMULAS)))
    formula = FORMULAS[kind, name]
    count = data.draw(st.integers(formula.rings[0], min(3, formula.rings[1])))
    n = data.draw(st.integers(2, 16))
    sizes = data.draw(st.sampled_from(splits(n, count)))
    local = [data.draw(st.integers(1, 600)), n]
    groups = axis_groups("x", sizes)
    block = jax.ShapeDtypeStruct(local, jnp.float32)
    run = ALGORITHMS[kind, name].run
    found = sent(lambda v: run(v, groups, Move(1, 1)), groups, block)
    items = math.prod(local) * (n if kind == "all_gather" else 1)
    planned: Counter[tuple[int, int, int]] = Counter()
    for message in (m for r in formula.rounds(items, 4, sizes) for m in r):
        planned[message.ring, message.by % sizes[message.ring], message.bytes] += 1
    assert found == planned


def test_a_bucket_of_sums_is_one_sum() -> None:
    groups = axis_groups("x", (4,))
    rng = np.random.default_rng(0)
    shapes, dtypes = [(3,), (2, 5), (), (7,)], ["float32", "float32", "float32", "int32"]
    xs = [rng.integers(-9, 9, (4, *s)).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
    outs = on_devices(lambda *v: all_reduce_together(v, groups), 1, *xs)
    for x, out in zip(xs, outs, strict=True):
        assert out.dtype == x.dtype
        np.testing.assert_array_equal(out, np.stack([x.sum(0)] * 4))
    blocks = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    env = [("x", 4)]
    traced = jax.make_jaxpr(lambda *v: all_reduce_together(v, groups), axis_env=env)(*blocks)
    one = jax.make_jaxpr(lambda v: all_reduce_together([v], groups), axis_env=env)(blocks[0])
    assert len(list(permutes(traced.jaxpr))) == 2 * len(list(permutes(one.jaxpr)))  # two dtypes


def test_the_library_has_every_format() -> None:
    assert {f.name for f in FORMULAS.values() if f.lossy} == set(FORMATS)
