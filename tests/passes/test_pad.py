"""Padding never reaches the valid part, whatever it holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.gpt import Config, train_step
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.errors import IRError
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes import pad
from neocc.passes.pad import Padding, pad_inputs, pad_program, unpad_outputs
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for, programs


def poisoned(padded: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs grown with NaN, and with integers that are often valid ids."""
    rng = np.random.default_rng(5)
    made = pad_inputs(padded, inputs)
    for name, array in made.items():
        valid = np.zeros(array.shape, bool)
        valid[tuple(slice(0, n) for n in inputs[name].shape)] = True
        floats = array.dtype.kind not in "iub"
        poison = np.nan if floats else rng.integers(0, 9, array.shape).astype(array.dtype)
        made[name] = np.where(valid, array, poison).astype(array.dtype)
    return made


def check(program: Program, sizes: Mapping[str, int]) -> Program:
    """Pads, and holds the valid parts of all outputs against the program as it was."""
    padded, _ = pad_program(program, sizes)
    verify(padded)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_numpy(program, inputs)
    outputs = run_numpy(padded, poisoned(padded, inputs))
    found = unpad_outputs(program, outputs)
    for name in program.outputs:
        assert_close(found[name], expected[name])
        if any(i.name == name for i in program.inputs):
            outside = outputs[name].copy()
            outside[tuple(slice(0, n) for n in expected[name].shape)] = 0
            assert not outside.any(), f"{name} replaces an input and its padding is not zero"
    return padded


@st.composite
def sizes_for(draw, program: Program) -> dict[str, int]:
    """Sizes that the program can be padded to, found by leaving out what is refused."""
    sizes: dict[str, int] = {}
    for name, d in program.dims.items():
        if not draw(st.booleans()):
            continue
        more = {**sizes, name: d.size + draw(st.integers(1, 5))}
        try:
            pad_program(program, more)
        except IRError:
            continue
        sizes = more
    return sizes


@given(st.data())
@settings(max_examples=150)
def test_valid_parts_are_what_they_were_whatever_the_padding_holds(data: st.DataObject) -> None:
    program = data.draw(programs(zero=data.draw(st.booleans())))
    sizes = data.draw(sizes_for(program))
    assume(sizes)
    check(program, sizes)


def softmax_loss() -> Program:
    batch, vocab = Dim("batch", 3), Dim("vocab", 5)
    g = Graph("softmax_loss")
    logits = g.data("logits", [batch, vocab], "f64")
    labels = g.data("labels", [batch])
    shifted = logits - logits.max(vocab)
    total = b.exp(shifted).sum(vocab)
    hit = b.iota(logits, vocab).equals(labels)
    mean = (b.log(total) - b.select(hit, shifted, 0.0).sum(vocab)).mean(batch)
    return g.build(
        {"loss": mean, "largest": logits.max(vocab), "least": logits.reduce("min", vocab)}
    )


def embedding_step() -> Program:
    """Gather, scatter_add of its gradient, a momentum that stays zero in the padding."""
    batch, vocab, embd = Dim("batch", 24), Dim("vocab", 5), Dim("embd", 3)
    g = Graph("embedding_step")
    table = g.parameter("table", [vocab, embd], "f64")
    momentum = g.state("momentum", [vocab, embd], "f64")
    ids = g.data("ids", [batch])
    rows = b.gather(table, ids, vocab)
    grad = b.scatter_add(rows, ids, vocab)
    step = 0.9 * momentum + grad
    outputs = {"table": table - 0.1 * step, "momentum": step, "rows": rows}
    outputs["norm"] = (grad * grad).sum(vocab, embd)
    outputs["after"] = table.cumsum("vocab", reverse=True)
    outputs["next"] = table.shift("vocab", -2)
    return g.build(outputs)


def layers() -> Program:
    """A carried value whose padding stays zero, one that loses it, one that never had it."""
    layers, embd = Dim("layers", 3), Dim("embd", 5)
    g = Graph("layers")
    w = g.parameter("w", [layers, embd], "f64")
    x = g.data("x", [embd], "f64")
    zeros = g.constant(0.0, "f64").broadcast(embd)

    def body(carry: tuple, w: tuple) -> tuple:
        kept, lost, x = carry
        x = b.tanh(x * w[0] + kept.sum(embd))
        return b.tanh(kept) * 0.5, b.tanh(lost) + x, b.tanh(x) + lost.sum(embd)

    kept, lost, x = b.repeat(layers, body, (zeros, zeros, x), (w,))
    return g.build({"kept": kept.sum(embd), "lost": lost.sum(embd), "last": x.sum(embd)})


def padded_rows() -> Program:
    seq, to, out = Dim("seq", 3), Dim("to", 9), Dim("out", 2)
    g = Graph("padded_rows")
    x = g.data("x", [seq], "f64")
    w = g.data("w", [seq, out], "f64")
    wide = x.pad("seq", 2, to, 0.5)
    return g.build({"total": wide.sum(to), "y": b.dot(x, w, seq)})


def grouped_attention() -> Program:
    """Attention and its gradient where queries of a group share keys."""
    seq, memory, heads = Dim("seq", 5), Dim("memory", 6), Dim("heads", 2)
    group, head_dim = Dim("group", 3), Dim("head_dim", 2)
    g = Graph("grouped_attention")
    q = g.parameter("q", [seq, heads, group, head_dim], "f64")
    k = g.parameter("k", [memory, heads, head_dim], "f64")
    v = g.parameter("v", [heads, memory, head_dim], "f64")
    dout = g.data("dout", [group, seq, heads, head_dim], "f64")
    out, lse = b.fused_attention(q, k, v, seq, memory, head_dim, window=4, scale=0.5)
    attrs = g.ops[-1].attrs
    dq, dk, dv = g.emit_all("attention_grad", [q, k, v, out, lse, dout], **attrs)
    return g.build({"out": out, "lse": lse, "q": q - dq, "k": k - dk, "v": v - dv})


SAMPLES = [
    (
        grouped_attention(),
        {"seq": 8, "memory": 8, "heads": 4, "group": 4, "head_dim": 4},
    ),
    (softmax_loss(), {"vocab": 8, "batch": 4}),
    (embedding_step(), {"vocab": 8, "batch": 32}),
    (layers(), {"embd": 8}),
    (padded_rows(), {"seq": 4, "to": 12, "out": 4}),
]


UNMASKED = ("reduce", "einsum", "gather", "scatter_add", "cumsum", "shift", "pad")
UNMASKED += ("attention", "attention_grad")


@pytest.mark.parametrize("kind", UNMASKED)
def test_the_property_above_notices_a_missing_mask(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pad.RULES, kind, lambda op, operands, out: (operands, pad.Fill()))
    with pytest.raises(AssertionError):
        for program, sizes in SAMPLES:
            check(program, sizes)


@pytest.mark.parametrize("program, sizes", SAMPLES, ids=lambda v: getattr(v, "name", ""))
def test_samples_keep_their_valid_parts(program: Program, sizes: dict[str, int]) -> None:
    check(program, sizes)


def masks(program: Program) -> int:
    return sum(op.kind == "select" for op in program.body.walk())


def test_a_carried_value_is_masked_only_where_a_step_spoils_its_padding() -> None:
    padded = check(layers(), {"embd": 8})
    (repeat,) = (op for op in padded.body.ops if op.kind == "repeat")
    body = repeat.regions[0]
    kept, lost = body.args[:2]
    assert [op.operands[1] for op in body.ops if op.kind == "select"] == [lost]
    assert [kept] in [list(op.operands) for op in body.ops if op.kind == "reduce"]


def test_padding_that_is_known_to_be_the_identity_is_not_masked() -> None:
    """Adam's arithmetic on zeros: 0 / (sqrt(0) + eps) = 0 needs no mask, exp(0) = 1 does."""
    embd = Dim("embd", 3)
    g = Graph("adam")
    x = g.data("x", [embd], "f64")
    m = x.shift("embd", 0)  # made known: the shift masks
    update = m / (b.sqrt(m * m) + 1e-8)
    known, _ = pad_program(g.build({"out": update.sum(embd)}), {"embd": 4})
    assert masks(known) == 1
    unknown, _ = pad_program(g.build({"out": b.exp(m).sum(embd)}), {"embd": 4})
    assert masks(unknown) == 2


def test_one_mask_serves_all_consumers() -> None:
    a, c = Dim("a", 3), Dim("c", 2)
    g = Graph("shared")
    x, y = g.data("x", [a], "f64"), g.data("y", [a, c], "f64")
    program = g.build({"s": x.sum(a), "p": b.dot(x, y, a), "q": x.cumsum("a", reverse=True)})
    assert masks(check(program, {"a": 4})) == 2  # one of x, one of y


def test_stored_tensors_of_other_dims_have_masks_of_their_own() -> None:
    """One that is cut along the dim and one that is whole would send a common mask about."""
    vocab, embd = Dim("vocab", 5), Dim("embd", 2)

    def valid(*orders: tuple[Dim, ...]) -> int:
        g = Graph("stored")
        seen = g.data("x", [vocab], "f64")
        outputs = {"s": seen.sum(vocab)}
        for i, dims in enumerate(orders):
            outputs[f"w{i}"] = b.exp(g.parameter(f"w{i}", dims, "f64"))
        padded = check(g.build(outputs), {"vocab": 6})
        return sum(op.kind == "iota" for op in padded.body.ops)

    assert valid((vocab, embd)) == valid((vocab, embd), (vocab, embd)) == 1
    assert valid((vocab, embd), (embd, vocab), (vocab,)) == 4


def test_random_numbers_of_the_valid_part_survive_padding() -> None:
    rows, columns = Dim("rows", 3), Dim("columns", 5)
    g = Graph("noise")
    seed = g.data("seed", (), "u32")
    program = g.build({"noise": b.random(seed, [rows, columns], 7, "normal", "f64")})
    padded = check(program, {"rows": 4, "columns": 8})
    (op,) = padded.body.ops
    assert op.attrs["counted"] == (3, 5)
    again = check(padded, {"columns": 16})
    assert again.body.ops[0].attrs["counted"] == (3, 5)


def test_a_rename_ties_two_dims() -> None:
    seq = Dim("seq", 3)
    g = Graph("scores")
    x = g.data("x", [seq], "f64")
    program = g.build({"scores": x * x.rename(seq="memory")})
    _, paddings = pad_program(program, {"memory": 4})
    assert paddings == (Padding("seq", 3, 4), Padding("memory", 3, 4))
    with pytest.raises(IRError, match="'seq' and 'memory'"):
        pad_program(program, {"seq": 4, "memory": 5})


def test_whole_rows_split_and_merge_exactly() -> None:
    embd, heads, size = Dim("embd", 6), Dim("heads", 3), Dim("size", 2)
    g = Graph("heads")
    x = g.data("x", [embd], "f64")
    cut = x.split("embd", heads, size)
    back = (cut * 2.0).merge("heads", "size", "embd")
    check(g.build({"cut": cut, "back": back, "sum": back.sum(embd)}), {"embd": 8, "heads": 4})


def test_a_slice_and_a_concat_that_end_with_the_padding_are_exact() -> None:
    first, last, both = Dim("first", 3), Dim("last", 4), Dim("both", 7)
    g = Graph("ends")
    x, y = g.data("x", [first], "f64"), g.data("y", [last], "f64")
    whole = b.concat([x, y], ["first", "last"], both)
    part = y.slice("last", 1, Dim("part", 2))
    program = g.build({"whole": whole, "total": whole.sum(both), "part": part.sum("part")})
    check(program, {"last": 6, "both": 9, "part": 4})
    for sizes in ({"first": 4}, {"last": 6}, {"part": 4}):
        with pytest.raises(IRError, match="cannot run on padded dims"):
            pad_program(program, sizes)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"embd": 7},
            r"test_pad.py:\d+: split cannot run on padded dims.*'embd' to 2 times 'heads'",
        ),
        ({"size": 3}, r"test_pad.py:\d+: split cannot run"),
        ({"to": 2}, r"smaller"),
        ({"layer": 5}, r"no dim 'layer' to pad; program 'refused' has embd, layers"),
        ({"layers": 5}, r"test_pad.py:\d+: the repeat over layers=2 would run more often"),
    ],
)
def test_what_cannot_be_padded_is_refused_with_the_line(
    sizes: dict[str, int], message: str
) -> None:
    embd, layers, to = Dim("embd", 6), Dim("layers", 2), Dim("to", 8)
    g = Graph("refused")
    x, w = g.data("x", [embd], "f64"), g.data("w", [layers], "f64")
    y = b.repeat(layers, lambda c, w: (c[0] * w[0],), (x,), (w,))[0]
    outputs = {"y": y.split("embd", Dim("heads", 3), Dim("size", 2)), "z": x.pad("embd", 1, to)}
    with pytest.raises(IRError, match=message):
        pad_program(g.build(outputs), sizes)


def test_padding_states_its_waste() -> None:
    assert str(Padding("vocab", 50257, 50304)) == "vocab: 50257 -> 50304 (0.093 % padding)"


def test_nothing_to_pad_gives_the_program_back() -> None:
    program = softmax_loss()
    assert pad_program(program, {"vocab": 5}) == (program, ())


def test_padded_programs_run_under_jax(x64: None) -> None:
    program, sizes = SAMPLES[2]
    padded, _ = pad_program(program, sizes)
    inputs = inputs_for(program, np.random.default_rng(0))
    expected = run_program(program, inputs)
    found = unpad_outputs(program, run_program(padded, poisoned(padded, inputs)))
    for name in program.outputs:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    "sizes", [{"vocab": 16}, {"heads": 4, "vocab": 12, "batch": 4}, {"embd": 10, "mlp": 40}]
)
def test_a_whole_training_step_keeps_its_valid_parts(sizes: dict[str, int]) -> None:
    """Forward, backward, clipping and Adam: the loss's softmax, norms over padded dims."""
    config = Config(
        "tiny", 2, 8, 2, vocab=11, seq=5, batch=3, dtype="f64", param_dtype="f64", recompute=True
    )
    check(train_step(config), sizes)
