"""Fused attention is einsum, softmax, einsum: under NumPy, and under JAX in one tile or many."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Graph, Tensor
from neocc.ir.errors import IRError
from neocc.ir.ops import attention_tiles
from neocc.ir.ops.attention_tiles import tiles
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.ir.text import parse_program, print_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.autodiff import differentiate, gradients
from neocc.passes.partition.verify import first_difference
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for

NOWHERE = -1e30


def dims(**sizes: int) -> dict[str, Dim]:
    known = {"batch": 2, "seq": 8, "memory": 8, "heads": 2, "group": 1, "head_dim": 3} | sizes
    return {n: Dim(n, s) for n, s in known.items()}


def unfused(
    q: Tensor, k: Tensor, v: Tensor, seq: Dim, memory: Dim, causal: bool, window: int | None
) -> Tensor:
    """Where a query sees nothing its softmax is uniform: those are masked away at the end."""
    scores = b.einsum(q, k, [n for n in q.type.names if n != "head_dim"] + ["memory"]) * 0.5
    i, j = b.iota(q, seq), b.iota(q, memory)
    seen = (j <= i) if causal else (j >= 0)
    if window is not None:
        seen = seen & (i < j + window) & (j < i + window)
    scores = b.select(seen, scores, NOWHERE)
    p = b.exp(scores - b.detach(scores.max(memory)))
    any_seen = b.select(seen, 1.0 + 0.0 * scores, 0.0).max(memory)
    return b.einsum(p / p.sum(memory), v, q.type.names) * any_seen


def program(
    fused: bool, d: dict[str, Dim], causal: bool, window: int | None, dtype: str = "f64"
) -> Program:
    """A loss that weighs every element of the output; ``group`` shares keys."""
    g = Graph("attention")
    rows = [d[n] for n in ("batch", "seq", "heads", "group", "head_dim")]
    columns = [d[n] for n in ("batch", "memory", "heads", "head_dim")]
    q, k = g.parameter("q", rows, dtype), g.parameter("k", columns, dtype)
    v = g.parameter("v", columns[::-1], dtype)
    if fused:
        out, _ = b.fused_attention(q, k, v, "seq", "memory", "head_dim", causal, window, 0.5)
    else:
        out = unfused(q, k, v, d["seq"], d["memory"], causal, window)
    weight = g.data("weight", rows, dtype)
    return g.build({"loss": (out * weight).sum(*rows), "out": out})


SIZES = st.integers(1, 9)
WINDOWS = st.sampled_from((None, 1, 2, 4))


@given(SIZES, SIZES, st.integers(1, 3), st.booleans(), WINDOWS)
@settings(max_examples=60)
def test_output_and_gradients_equal_the_unfused_form(
    seq: int, memory: int, group: int, causal: bool, window: int | None
) -> None:
    d = dims(seq=seq, memory=memory, group=group)
    fused, plain = (differentiate(program(f, d, causal, window)) for f in (True, False))
    verify(fused)
    inputs = inputs_for(fused, np.random.default_rng(seq))
    got, expected = run_numpy(fused, inputs), run_numpy(plain, inputs)
    for name, array in expected.items():
        assert_close(got[name], array)


@pytest.mark.parametrize(
    "seq, memory, causal, window",
    [(13, 13, True, None), (7, 10, False, None), (10, 7, True, 2)],
)
def test_jax_computes_it_tile_by_tile(
    x64: None, monkeypatch: Any, seq: int, memory: int, causal: bool, window: int | None
) -> None:
    """With 4 x 4 scores a tile and those of a third of the batch and heads at once; also what
    jax.grad makes of the forward loop."""
    monkeypatch.setattr(attention_tiles, "BLOCK", 4)
    monkeypatch.setattr(attention_tiles, "SCORES", 2 * 2 * 4 * 4)
    d = dims(batch=3, seq=seq, memory=memory, group=2)
    fused = program(True, d, causal, window)
    both = differentiate(fused)
    inputs = inputs_for(both, np.random.default_rng(0))
    expected = run_numpy(differentiate(program(False, d, causal, window)), inputs)
    got = jax.jit(lambda x: run_program(both, x))(inputs)
    grads = jax.jit(jax.grad(lambda w: run_program(fused, inputs | w)["loss"]))(
        {n: inputs[n] for n in "qkv"}
    )
    for name, array in expected.items():
        assert_close(got[name], array)
    for n in "qkv":
        assert_close(grads[n], expected[f"d_{n}"])


def test_no_whole_scores_are_made_where_they_are_large() -> None:
    """The largest array of the traced program, forward and backward."""
    d = dims(batch=1, heads=1, seq=2048, memory=2048, head_dim=8)
    both = differentiate(program(True, d, True, None, "f32"))
    shapes = {i.name: jax.ShapeDtypeStruct(v.type.shape, np.float32) for i, v in both.named_inputs}
    text = str(jax.make_jaxpr(lambda x: run_program(both, x))(shapes))
    assert "512,512]" in text and "2048,2048" not in text


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient() -> None:
    d = dims(seq=6, memory=2)
    both = differentiate(program(True, d, True, 2))
    inputs = inputs_for(both, np.random.default_rng(0))
    got = run_numpy(both, inputs)
    seen = np.array([True, True, True, False, False, False])
    assert (np.abs(got["out"]).sum((0, 2, 3, 4)) > 0).tolist() == seen.tolist()
    assert not got["d_q"][:, ~seen].any() and np.isfinite(got["d_k"]).all()


def test_lse_is_the_log_of_the_sum_of_weights() -> None:
    g = Graph("lse")
    seq, memory, head_dim = Dim("seq", 4), Dim("memory", 3), Dim("head_dim", 2)
    q, k = g.data("q", (seq, head_dim), "f64"), g.data("k", (memory, head_dim), "f64")
    _, lse = b.fused_attention(q, k, k, seq, memory, head_dim, window=2, scale=2.0)
    x = inputs_for(g.build({"lse": lse}), np.random.default_rng(0))
    scores = 2 * x["q"] @ x["k"].T
    seen = abs(np.arange(4)[:, None] - np.arange(3)) < 2
    expected = np.log((np.exp(scores) * seen).sum(1))
    assert_close(run_numpy(g.build({"lse": lse}), x)["lse"], expected)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), WINDOWS, st.integers(1, 9), st.data())
@settings(max_examples=100)
def test_every_visible_score_lies_in_a_tile_and_no_tile_is_all_hidden(
    seq: int, memory: int, causal: bool, window: int | None, block: int, data: Any
) -> None:
    keys = data.draw(st.integers(0, memory))
    cut = tiles(seq, memory, keys, causal, window, 0, block)
    i, j = np.arange(seq)[:, None], np.arange(memory)
    seen = (j < keys) & ((j <= i) | (not causal))
    if window is not None:
        seen = seen & (abs(i - j) < window)
    assert cut.rows <= block and cut.columns <= block
    assert cut.down * cut.rows >= seq and cut.across * cut.columns >= memory
    covered = np.zeros_like(seen)
    for a, c in cut.pairs:
        tile = np.s_[a * cut.rows : (a + 1) * cut.rows, c * cut.columns : (c + 1) * cut.columns]
        covered[tile] = True
        last = (a + 1) * cut.rows > seq or c == -(-keys // cut.columns) - 1  # filled up
        assert seen[tile].any() or last or cut.one
    assert covered[seen].all()
    assert len(tiles(seq, memory, keys, causal, window, None, block).pairs) >= len(cut.pairs)


def test_text_round_trip() -> None:
    both = differentiate(program(True, dims(), True, 3))
    assert first_difference(parse_program(print_program(both)), both) is None
    assert "attention_grad" in print_program(both) and "window=3" in print_program(both)


def test_bf16_operands_are_summed_in_f32() -> None:
    d = dims(seq=64, memory=64, head_dim=16)
    wide = program(True, d, True, None)
    narrow = program(True, d, True, None, "bf16")
    inputs = inputs_for(narrow, np.random.default_rng(0))
    expected = run_numpy(wide, {n: x.astype(np.float64) for n, x in inputs.items()})["out"]
    got = np.asarray(run_numpy(narrow, inputs)["out"], np.float64)
    assert np.abs(got - expected).max() < 0.02


def attend(**types: Any) -> None:
    g = Graph("bad")
    d = dims()
    known = {
        "q": ((d["seq"], d["head_dim"]), "f32"),
        "k": ((d["memory"], d["head_dim"]), "f32"),
        "v": ((d["memory"], d["head_dim"]), "f32"),
    } | {n: t for n, t in types.items() if n in "qkv"}
    q, k, v = (g.data(n, *known[n]) for n in "qkv")
    b.fused_attention(q, k, v, "seq", "memory", "head_dim", window=types.get("window"))


def test_bad_operands_say_what_is_wrong() -> None:
    d = dims()
    with pytest.raises(
        IRError, match=r"test_attention.py:\d+: attention mixes the dtypes bf16, f32"
    ):
        attend(q=((d["seq"], d["head_dim"]), "bf16"))
    with pytest.raises(IRError, match="attention: q lacks the dim 'seq'"):
        attend(q=((d["batch"], d["head_dim"]), "f32"))
    with pytest.raises(IRError, match="attention: q has the dim 'memory'; rename it"):
        attend(q=((d["seq"], d["memory"], d["head_dim"]), "f32"))
    with pytest.raises(IRError, match="their dims must be the same"):
        attend(v=((d["memory"], d["head_dim"], d["batch"]), "f32"))
    with pytest.raises(IRError, match="k has the dim heads=2, which q lacks"):
        attend(**dict.fromkeys("kv", ((d["memory"], d["head_dim"], d["heads"]), "f32")))
    with pytest.raises(IRError, match="a window of 0; it is at least 1"):
        attend(window=0)


def test_no_gradient_is_lost_in_silence() -> None:
    g = Graph("lost")
    d = dims()
    q = g.parameter("q", (d["seq"], d["head_dim"]), "f64")
    k = g.parameter("k", (d["memory"], d["head_dim"]), "f64")
    out, lse = b.fused_attention(q, k, k, "seq", "memory", "head_dim")
    with pytest.raises(IRError, match="lse, which has no gradient; detach it"):
        gradients(out.sum("seq", "head_dim") + lse.sum("seq"), [q])
    (dq,) = gradients(out.sum("seq", "head_dim"), [q])
    with pytest.raises(IRError, match="no second derivative"):
        gradients((dq * dq).sum("seq", "head_dim"), [q])
