"""Composites against their formulas."""

from __future__ import annotations

import numpy as np

from neocc import nn
from neocc.ir.builder import Graph
from neocc.ir.types import Dim
from tests.numpy_executor import run_numpy
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
