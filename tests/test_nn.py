"""Composites against their formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neocc import nn
from neocc.ir.builder import Graph, iota
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.types import Dim
from neocc.nn.activations import ACTIVATIONS, ALONG
from neocc.passes.autodiff import differentiate, gradients
from neocc.passes.partition import apply, simulate
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment, seeded
from tests.random_programs import assert_close

A, B = Dim("a", 200), Dim("b", 50)


def test_softmax_and_logsumexp_stand_large_numbers() -> None:
    g = Graph("soft")
    x = g.data("x", (B,), "f64")
    program = g.build({"p": nn.softmax(x, "b"), "z": nn.logsumexp(x, B)})
    values = np.linspace(990.0, 1000.0, 50)
    out = run_numpy(program, {"x": values})
    small = np.exp(values - 1000.0)
    assert_close(out["p"], small / small.sum())
    assert_close(out["z"], 1000.0 + np.log(small.sum()))


def test_cross_entropy_picks_the_label_and_adds_the_squared_partition() -> None:
    g = Graph("loss")
    x, labels = g.data("x", (A, B), "f64"), g.data("labels", (A,))
    program = g.build({"loss": nn.cross_entropy(x, labels, B, 0.25)})
    rng = np.random.default_rng(0)
    values, picks = rng.standard_normal((200, 50)), rng.integers(0, 50, 200).astype(np.int32)
    z = np.log(np.exp(values).sum(1))
    expected = z - values[np.arange(200), picks] + 0.25 * z**2
    assert_close(run_numpy(program, {"x": values, "labels": picks})["loss"], expected)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    g = Graph("drop")
    x, seed = g.data("x", (A, B), "f32"), g.data("seed", (), "u32")
    outs = {f"salt{s}": nn.dropout(x, 0.25, seed, s) for s in (1, 2)}
    assert nn.dropout(x, 0.0, seed, 1) is x and nn.dropout(x, 0.5, None, 1) is x
    program = g.build(outs)
    ones = np.ones((200, 50), np.float32)
    first = run_numpy(program, {"x": ones, "seed": np.uint32(7)})
    again = run_numpy(program, {"x": ones, "seed": np.uint32(7)})
    other = run_numpy(program, {"x": ones, "seed": np.uint32(8)})
    y = first["salt1"]
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / y.size) ** 0.5
    np.testing.assert_array_equal(y, again["salt1"])
    assert (y != first["salt2"]).mean() > 0.3 and (y != other["salt1"]).mean() > 0.3


@pytest.mark.parametrize("name", [*ACTIVATIONS, *ALONG])
def test_activations_are_those_of_jax_and_gpt_neo_and_so_are_their_slopes(
    x64: None, name: str
) -> None:
    g = Graph("activation")
    x = g.data("x", (B,), "f64")
    y = nn.activate(name, x, "b")
    weights = iota(x, B, "f64") * 0.1 + 1.0
    program = g.build({"y": y, "slope": gradients((y * weights).sum("b"), [x])[0]})
    points = np.concatenate([np.linspace(-7.9, 8.1, 47), [0.0, 1.0, -1.0]])
    got = run_numpy(program, {"x": points})
    function = plain_activation(name)
    assert_close(got["y"], function(points))
    weigh = 0.1 * np.arange(50) + 1.0
    slope = jax.grad(lambda p: (function(p) * weigh).sum())(points)
    # Where two pieces meet, any slope between theirs is one.
    kinks = 47 if name in ("maxtanh", "minsin", "abs", "sign", *CORNERS) else 50
    assert_close(got["slope"][:kinks], slope[:kinks])


CORNERS = ("hard_tanh", "hard_sigmoid", "hard_silu", "hard_swish", "sparse_sigmoid", "sparse_plus")


def plain_activation(name: str) -> Any:
    """JAX's where it has one of the name, else GPT-Neo's formula (models/activations.py)."""
    exact: dict[str, Any] = {
        "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_new": jax.nn.gelu,
        "gelu_tanh": jax.nn.gelu,
        "abs": jnp.abs,
        "sin": jnp.sin,
        "cos": jnp.cos,
        "sign": jnp.sign,
        "lrelu001": lambda x: jax.nn.leaky_relu(x, 0.01),
        "lrelu020": lambda x: jax.nn.leaky_relu(x, 0.2),
        "id": lambda x: x,
        "softsign": jax.nn.soft_sign,
        "triangle_relax": lambda x: sum(
            s * jnp.sin(n * x) / n**2 for n, s in ((1, 1), (3, -1), (5, 1), (7, -1))
        ),
        "square_relax": lambda x: sum(
            s * jnp.cos(n * x) / n for n, s in ((1, 1), (3, -1), (5, 1), (7, -1))
        ),
        "spike": lambda x: 1 / (1 + x**2),
        "spike2": lambda x: jnp.exp(-(x**2)),
        "tanhshrink": lambda x: x - jnp.tanh(x),
        "bipolarsigmoid": lambda x: 2 * jax.nn.sigmoid(x) - 1,
        "elish": lambda x: jnp.where(x > 0, x, jnp.expm1(x)) * jax.nn.sigmoid(x),
        "arcsinh": jnp.arcsinh,
        "maxsig": lambda x: jnp.maximum(x, jax.nn.sigmoid(x)),
        "cosid": lambda x: jnp.cos(x) - x,
        "minsin": lambda x: jnp.minimum(x, jnp.sin(x)),
        "maxtanh": lambda x: jnp.maximum(x, jnp.tanh(x)),
        "tanhexp": lambda x: x * jnp.tanh(jnp.exp(x)),
        "lisht": lambda x: x * jnp.tanh(x),
        "seagull": lambda x: jnp.log(1 + x**2),
        "snake": lambda x: x + jnp.sin(x) ** 2,
        "roottanh": lambda x: jnp.cbrt(x**2 + 1) * jnp.tanh(x),
        "softplusmone": lambda x: jax.nn.softplus(x) - 1,
        "logsoftmax": jax.nn.log_softmax,
    }
    return exact.get(name) or getattr(jax.nn, name)


def test_gradients_of_activations_are_finite_where_exp_is_not() -> None:
    for name in ACTIVATIONS:
        g = Graph("large")
        x = g.data("x", (B,), "f32")
        y = nn.activate(name, x, "b")
        program = g.build({"y": y, "slope": gradients(y.sum("b"), [x])[0]})
        points = np.concatenate([np.full(25, -500.0), np.full(25, 500.0)]).astype(np.float32)
        out = run_numpy(program, {"x": points})
        assert np.isfinite(out["y"]).all() and np.isfinite(out["slope"]).all(), name


def test_unknown_and_unrepeatable_activations_are_refused_by_name() -> None:
    x = Graph("bad").data("x", (B,), "f32")
    with pytest.raises(NeoccError, match=r"unknown activation 'gelus'; the nearest .* 'gelu'"):
        nn.activate("gelus", x, "b")
    with pytest.raises(NeoccError, match=r"'prelu' has a slope or parameters .* at random"):
        nn.activate("prelu", x, "b")


LINEAR = tuple(Dim(n, s) for n, s in (("batch", 2), ("seq", 12), ("heads", 3), ("head_dim", 4)))


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 12])
def test_linear_attention_is_the_weighted_mean_of_what_went_before(x64: None, chunk: int) -> None:
    g = Graph("linear")
    q, k, v = (g.parameter(n, LINEAR, "f64") for n in "qkv")
    keys = [t.rename(seq="memory") for t in (k, v)]
    out = nn.linear_attention(q, *keys, True, "f64", chunk)
    program = differentiate(g.build({"out": out, "loss": (out * out).sum(*LINEAR)}))
    rng = np.random.default_rng(2)
    values = {n: rng.standard_normal((2, 12, 3, 4)) for n in "qkv"}

    def plain(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("bihd,bjhd->bhij", jax.nn.softmax(q), jnp.exp(k))
        scores = jnp.tril(scores)
        return jnp.einsum("bhij,bjhd->bihd", scores / (scores.sum(-1, keepdims=True) + 1e-6), v)

    got = run_numpy(program, values)
    assert_close(got["out"], plain(**values))
    slopes = jax.grad(lambda w: (plain(**w) ** 2).sum())(values)
    for n, slope in slopes.items():
        assert_close(got[f"d_{n}"], slope)
    for seed in range(3):
        mesh = Mesh.parse("2x2")
        made = apply(program, mesh, random_assignment(program, mesh, seeded(seed)))
        for n, x in simulate(made, values).items():
            assert_close(x, got[n])


def test_entmax_sums_to_one_and_leaves_the_small_ones_out(x64: None) -> None:
    g = Graph("entmax")
    x, labels = g.parameter("x", (A, B), "f64"), g.data("labels", (A,))
    loss = nn.entmax_loss(x, labels, B)
    program = g.build({"p": nn.entmax(x, B), "loss": loss})
    rng = np.random.default_rng(0)
    values = {"x": 3 * rng.standard_normal((200, 50)), "labels": rng.integers(0, 50, 200)}
    values["labels"] = values["labels"].astype(np.int32)
    values["x"][0, 7], values["labels"][0] = 40.0, 7
    out = run_numpy(program, values)
    p = out["p"]
    assert_close(p.sum(1), np.ones(200))
    assert p.min() == 0.0 and 5 < (p > 0).sum(1).mean() < 45
    # Its condition of optimality: (p ** 0.3 - 1) / 0.3 is x less a number, wherever p is above 0.
    for row, q in zip(values["x"], p, strict=True):
        left = row[q > 0] - q[q > 0] ** 0.3 / 0.3
        assert np.ptp(left) < 1e-9
        assert (row[q == 0] <= left[0] + 1e-9).all()
    assert out["loss"].min() >= -1e-12 and out["loss"][0] == pytest.approx(0.0, abs=1e-12)
    grads = run_numpy(differentiate(g.build({"loss": loss.sum(A)})), values)["d_x"]
    onehot = np.eye(50)[values["labels"]]
    assert_close(grads, p - onehot)


TOKENS = (Dim("batch", 64), Dim("seq", 100))


def masked(m: nn.Masking, seed: int = 1, vocab: int = 50) -> tuple[np.ndarray, ...]:
    g = Graph("mask")
    tokens, key = g.data("tokens", TOKENS), g.data("key", (), "u32")
    seen, labels = nn.mask_tokens(tokens, m, key, vocab)
    program = g.build({"seen": seen, "labels": labels})
    values = np.random.default_rng(0).integers(0, vocab, (64, 100)).astype(np.int32)
    out = run_numpy(program, {"tokens": values, "key": np.uint32(seed)})
    return values, out["seen"], out["labels"]


def test_masking_chooses_its_share_and_hides_most_of_it() -> None:
    tokens, seen, labels = masked(nn.Masking(mask=49, rate=0.3, same=0.2, random=0.3, ignore=(5,)))
    chosen = labels != 0
    allowed = (tokens != 0) & (tokens != 5)
    np.testing.assert_array_equal(seen[~chosen], tokens[~chosen])
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    assert not chosen[~allowed].any()
    assert chosen[allowed].mean() == pytest.approx(0.3, abs=0.03)
    now, was = seen[chosen], tokens[chosen]
    assert (now == 49).mean() == pytest.approx(0.5, abs=0.06)
    assert (now == was).mean() == pytest.approx(0.2, abs=0.06)
    other = (now != 49) & (now != was)
    assert other.mean() == pytest.approx(0.3, abs=0.06)
    assert not np.isin(now[other], (0, 5)).any() and len(np.unique(now[other])) > 40
    assert not np.array_equal(masked(nn.Masking(mask=49, rate=0.3), 2)[1], seen)


def test_masking_puts_the_class_token_in_front_and_never_hides_it() -> None:
    tokens, seen, labels = masked(nn.Masking(mask=49, rate=0.9, same=0.0, cls=48))
    assert (seen[:, 0] == 48).all() and (labels[:, 0] == 0).all()
    chosen = labels != 0
    np.testing.assert_array_equal(labels[chosen], np.roll(tokens, 1, 1)[chosen])
    assert (seen[chosen] == 49).all()
