"""What each key of a GPT-Neo config does to the layers, for ``test_every_key``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models import gpt
from models.gpt import Config
from neocc.passes.simplify import simplify
from tests.models.keyed import (
    Key,
    close,
    differ,
    drawn,
    forward,
    logits,
    ops,
    seen,
    stepped,
    tokens_of,
    training,
    values,
)
from tests.models.values import start

ONE = {"n_layer": 1}
CAUSAL = np.tril(np.ones((8, 8), bool))
MOST = 0.9999999  # of a mask: keeps nothing


def layers(off: Config, on: Config) -> None:
    """A layer that adds nothing makes three of two; the program is no longer."""
    w = values(on)
    for name in ("attn.o", "attn.b", "mlp.proj", "mlp.proj_b"):
        w[f"h0.{name}"][2] = 0.0
    two = {n: x[:2] if n.startswith("h0.") else x for n, x in w.items()}
    assert w["h0.attn.q"].shape == (3, 8, 2, 4)
    close(logits(on, w), logits(off, two))
    assert len(ops(gpt.train_step(on))) == len(ops(gpt.train_step(off)))


def embd(off: Config, on: Config) -> None:
    """12 embd^2 weights a layer, an mlp of 4 embd, and 10 embd of biases and norms."""
    for c in (off, on):
        d, matrices = c.embd, 12 * c.embd**2
        assert gpt.train_step(c).parameter_count == 2 * (matrices + 10 * d) + (12 + 8 + 2) * d
    assert values(on)["h0.mlp.fc"].shape == (2, 12, 48)


def heads(off: Config, on: Config) -> None:
    """The same weights, other heads: each has a softmax of its own, and no other part has one."""
    w, sizes = values(off), {n: p.dims for n, p in gpt.weights(on).items()}

    def parted() -> dict[str, np.ndarray]:
        return {n: x.reshape([d.size for d in sizes[n]]) for n, x in w.items()}

    assert parted()["h0.attn.q"].shape == (2, 8, 4, 2)
    differ(logits(on, parted()), logits(off, w))
    w["h0.attn.q"] = w["h0.attn.q"] * 0
    close(logits(on, parted()), logits(off, w))


def vocab(off: Config, on: Config) -> None:
    w, tokens = values(on), tokens_of(off)
    z = logits(on, w, tokens)
    assert z.shape[-1] == 13
    close(z[..., :12], logits(off, w | {"wte": w["wte"][:12]}, tokens))


def context(off: Config, on: Config) -> None:
    w, tokens = values(on), tokens_of(on)
    z = logits(on, w, tokens)
    assert z.shape[1] == 10
    close(z[:, :8], logits(off, w | {"wpe": w["wpe"][:8]}, tokens[:, :8]))


def sequences(off: Config, on: Config) -> None:
    """The loss is the mean over them."""
    w = values(on)
    few, many = forward(off, w, tokens_of(on)[:4]), forward(on, w)
    assert (len(few["logits"]), len(many["logits"])) == (4, 6)
    close(many["logits"][:4], few["logits"])
    close(many["loss"], many["loss_batch"].mean())


def attention(off: Config, on: Config) -> None:
    """What a layer of each type sees; a mean over all before, where no key weighs more."""
    types = [t for types, times in on.pattern for t in types * times]
    assert types == ["global", "local", "linear", "none"]
    one = {t: replace(on, layers=1, attention=(((t,), 1),), window=3) for t in types}
    found = {t: seen(c, values(c)) for t, c in one.items()}
    near = CAUSAL & ~np.tril(CAUSAL, -3)
    assert (found["global"] == CAUSAL).all() and (found["linear"] == CAUSAL).all()
    assert (found["local"] == near).all() and (found["none"] == np.eye(8, dtype=bool)).all()
    assert not any(".attn." in n for n in gpt.weights(one["none"]))
    w = values(one["global"], h0_attn_q=0.0, h0_attn_k=0.0)
    close(logits(one["linear"], w), logits(one["global"], w), 1e-5)
    w = values(one["global"], h0_attn_k=lambda x: 20 * x)
    differ(logits(one["linear"], w), logits(one["global"], w))


def radius(off: Config, on: Config) -> None:
    assert (seen(off, values(off)) == CAUSAL).all()
    assert (seen(on, values(on)) == CAUSAL & ~np.tril(CAUSAL, -3)).all()


def axial(off: Config, on: Config) -> None:
    """A position's vector is the mean of its row's and its column's."""
    w = values(on)
    rows, columns = w["wpe_1"], w["wpe_2"]
    assert (rows.shape, columns.shape) == ((2, 8), (4, 8)) and "wpe" not in w
    table = [(rows[i // 4] + columns[i % 4]) / 2 for i in range(8)]
    close(logits(on, w), logits(off, w | {"wpe": np.stack(table)}))


def rotary(off: Config, on: Config) -> None:
    """Positions are relative: what repeats in the tokens does in the logits, but order counts."""
    assert "wpe" not in gpt.weights(on)
    w = values(on, h0_attn_q=lambda x: 9 * x)
    again = np.tile([3, 7], (4, 4)).astype(np.int32)
    z = logits(on, w, again)
    close(z[:, 2:6], z[:, 4:8])
    table = w | {"wpe": values(off)["wpe"]}
    differ(*(logits(off, table, again)[:, i] for i in (2, 4)))
    one, other = again.copy(), again.copy()
    one[:, :3], other[:, :3] = (3, 7, 5), (7, 3, 5)
    differ(logits(on, w, one)[:, 2], logits(on, w, other)[:, 2])
    table["wpe"] = 0 * table["wpe"]
    close(logits(off, table, one)[:, 2], logits(off, table, other)[:, 2])


def glu(off: Config, on: Config) -> None:
    """fc times the activation of gate: of an fc that is 1, what gate makes alone."""
    w = values(on, h0_mlp_fc=0.0, h0_mlp_fc_b=1.0)
    alone = w | {"h0.mlp.fc": w["h0.mlp.gate"], "h0.mlp.fc_b": w["h0.mlp.gate_b"]}
    z = logits(on, w)
    close(z, logits(off, alone))
    differ(z, logits(on, w | {"h0.mlp.fc_b": 2 * w["h0.mlp.fc_b"]}))


def activation(off: Config, on: Config) -> None:
    """The sigmoid of 0 is a half, and gelu's is 0."""
    w = values(on, h0_mlp_fc=0.0, h0_mlp_fc_b=0.0)
    half = w["h0.mlp.proj"].sum(1) / 2
    assert (off.activation, on.activation) == ("gelu", "sigmoid")
    close(logits(on, w), logits(off, w | {"h0.mlp.proj_b": w["h0.mlp.proj_b"] + half}))


def scale_norm(off: Config, on: Config) -> None:
    """One gain in the place of embd, and no bias; ln_f stays."""
    w = values(on)
    assert w["h0.ln1.g"].shape == (2,) and "h0.ln1.b" not in w and w["ln_f.b"].shape == (8,)
    plain = values(off) | w
    for norm in ("h0.ln1", "h0.ln2"):
        plain[f"{norm}.g"] = np.repeat(w[f"{norm}.g"][:, None], 8, 1)
        plain[f"{norm}.b"] = np.zeros((2, 8))
    close(logits(on, w), logits(off, plain))


def rezero(off: Config, on: Config) -> None:
    """At a gain of 0, where it starts, a layer adds nothing; there is no norm but the last."""
    w = values(on, h0_rezero1_g=0.0, h0_rezero2_g=0.0)
    assert not any(".ln1." in n or ".ln2." in n for n in w)
    idle = values(off) | w
    for name in ("attn.o", "attn.b", "mlp.proj", "mlp.proj_b"):
        idle[f"h0.{name}"] = 0 * idle[f"h0.{name}"]
    close(logits(on, w), logits(off, idle))
    assert (start(on, push=0.0)["h0.rezero1.g"] == 0).all()
    assert (seen(on, w) == np.eye(8, dtype=bool)).all()
    assert (seen(on, values(on, h0_rezero1_g=1.0)) == CAUSAL).all()


def macaron(off: Config, on: Config) -> None:
    """Half an mlp before attention, which sees it without a norm, and half of one after."""
    w = values(on, h0_macaron_proj=0.0, h0_macaron_proj_b=0.0)
    whole = {n: w[n] / 2 for n in ("h0.mlp.proj", "h0.mlp.proj_b")}
    close(logits(on, w), logits(off, w | whole))
    added = w | {"h0.macaron.proj_b": np.ones((1, 8)) * np.arange(8)}
    moved = w | whole | {"wte": w["wte"] + np.arange(8) / 2}
    tied = {"wte": w["wte"]}  # the same logits of what comes out
    differ(logits(on, added), logits(on, w))
    close(*(last_of(c, x | tied, x["wte"]) for c, x in ((on, added), (off, moved))))


def last_of(c: Config, w: dict, wte: np.ndarray) -> np.ndarray:
    """Logits by a head of its own, of embeddings ``wte``."""
    c = replace(c, tied=False)
    return logits(c, w | {"wte": wte, "head.w": w["wte"].T, "head.b": np.zeros(12)})


def memory(off: Config, on: Config) -> None:
    """Three keys and values more that every query sees: where all scores are 0, and their values
    too, position i has (i + 1) / (i + 4) of what it had."""
    w = values(on, h0_attn_q=0.0, h0_attn_mem_v=0.0)
    assert w["h0.attn.mem_k"].shape == (1, 3, 2, 4)
    z = logits(on, w)
    for i in range(8):
        less = {"h0.attn.o": w["h0.attn.o"] * (i + 1) / (i + 4)}
        close(z[:, i], logits(off, w | less)[:, i])
    assert (abs(logits(on, w | {"h0.attn.mem_v": w["h0.attn.mem_v"] + 1}) - z).max(-1) > 1e-6).all()


def shared(off: Config, on: Config) -> None:
    """As many copies of one layer's weights; their gradient is the sum."""
    w = values(on)
    copies = {f"h0.{n[2:]}": np.stack([x, x]) for n, x in w.items() if n.startswith("h.")}
    close(logits(on, w), logits(off, w | copies))
    five = replace(on, layers=5, attention=())
    assert gpt.train_step(on).parameter_count == gpt.train_step(five).parameter_count


def untied(off: Config, on: Config) -> None:
    """A head and a bias of its own, with no norm before it."""
    w = values(on, head_b=0.0)
    assert not any(n.startswith("ln_f") for n in w)
    z = logits(on, w)
    close(logits(on, w | {"head.w": 2 * w["head.w"]}), 2 * z)
    close(logits(on, w | {"head.b": np.arange(12.0)}), z + np.arange(12))
    tokens = tokens_of(on).clip(0, 10)
    other = w | {"wte": w["wte"] + np.eye(12)[:, -1:]}  # of a token that does not occur
    close(logits(on, other, tokens), logits(on, w, tokens))


def dropped_embeddings(off: Config, on: Config) -> None:
    """Of tokens and of positions: where all is dropped, every position is like every other."""
    assert drawn(gpt.train_step(off)) == []
    assert set(drawn(gpt.train_step(on))) == {
        (("batch", "seq", "embd"), False),
        (("seq", "embd"), False),
    }
    w = values(on)
    z = training(replace(on, embed_dropout=MOST), w)
    close(z, np.broadcast_to(z[:1, :1], z.shape))
    of_its_own_each_step(on)


def dropped_weights(off: Config, on: Config) -> None:
    """Of attention: where all are dropped, a layer attends to nothing."""
    assert drawn(gpt.train_step(off)) == []
    assert set(drawn(gpt.train_step(on))) == {(("batch", "heads", "seq", "memory"), True)}
    w = values(on)
    z = training(replace(on, attn_dropout=MOST), w)
    close(z, training(off, w | {"h0.attn.o": 0 * w["h0.attn.o"]}))
    of_its_own_each_step(on)


def dropped_results(off: Config, on: Config) -> None:
    """Of attention and mlp: where all is dropped, layers add nothing."""
    assert drawn(gpt.train_step(off)) == []
    assert set(drawn(gpt.train_step(on))) == {(("batch", "seq", "embd"), True)}
    w = values(on)
    idle = {f"h0.{n}": 0 * w[f"h0.{n}"] for n in ("attn.o", "attn.b", "mlp.proj", "mlp.proj_b")}
    close(training(replace(on, res_dropout=MOST), w), training(off, w | idle))
    of_its_own_each_step(on)


def of_its_own_each_step(c: Config) -> None:
    w = values(c)
    close(training(c, w), training(c, w))
    differ(training(c, w), training(c, w, step=1))
    close(
        forward(c, w)["loss"],
        forward(replace(c, embed_dropout=0, attn_dropout=0, res_dropout=0), w)["loss"],
    )


def by_depth(off: Config, on: Config) -> None:
    """proj starts smaller by the square root of the layers, and nothing else does."""
    a, b = start(off, push=0.0), start(on, push=0.0)
    assert {n for n in a if not np.array_equal(a[n], b[n])} == {"h0.mlp.proj"}
    close(a["h0.mlp.proj"], b["h0.mlp.proj"] * 2**0.5)


def by_fan_in(off: Config, on: Config) -> None:
    """The mlp starts smaller by the square roots of what goes into its products."""
    a, b = start(off, push=0.0), start(on, push=0.0)
    assert {n for n in a if not np.array_equal(a[n], b[n])} == {"h0.mlp.fc", "h0.mlp.proj"}
    close(a["h0.mlp.fc"], b["h0.mlp.fc"] * 8**0.5)
    close(a["h0.mlp.proj"], b["h0.mlp.proj"] * 32**0.5)


def precision(off: Config, on: Config) -> None:
    """Products run in bfloat16; parameters, state and loss stay float32."""
    for c, dtype in ((off, "f32"), (on, "bf16")):
        program = gpt.train_step(c)
        products = [op for op, _ in ops(program) if op.kind == "einsum"]
        assert {v.type.dtype for op in products for v in op.operands} == {dtype}
        kept = {v.type.dtype for i, v in program.named_inputs if i.role in ("parameter", "state")}
        assert kept == {"f32", "i32"} and program.output_value("loss").type.dtype == "f32"


def recompute(off: Config, on: Config) -> None:
    """A layer's products are made again going back; what comes out is the same."""

    def products(c: Config) -> int:
        found = ops(simplify(gpt.train_step(c)))
        return sum(op.kind in ("einsum", "fused_attention") and looped for op, looped in found)

    assert products(on) > products(off)
    (_, a), (_, b) = stepped(off), stepped(on)
    for n, x in a.items():
        close(b[n], x)


LAYERS: dict[str, Key] = {
    "n_layer": Key({"n_layer": 3}, layers),
    "n_embd": Key({"n_embd": 12}, embd),
    "n_head": Key({"n_head": 4}, heads),
    "n_vocab": Key({"n_vocab": 13}, vocab),
    "n_ctx": Key({"n_ctx": 10}, context),
    "train_batch_size": Key({"train_batch_size": 6}, sequences),
    "attention_types": Key(
        {"attention_types": [[["global", "local", "linear", "none"], 1]]}, attention, {"n_layer": 4}
    ),
    "local_attention_radius": Key(
        {"local_attention_radius": 3}, radius, ONE | {"attention_types": [[["local"], 1]]}
    ),
    "axial_pos_emb": Key({"axial_pos_emb": [2, 4]}, axial),
    "rotary_emb": Key(
        {"rotary_emb": True}, rotary,
        ONE | {"attention_types": [[["local"], 1]], "local_attention_radius": 3},
    ),
    "mlp_glu": Key({"mlp_glu": True}, glu),
    "activation_fn": Key({"activation_fn": "sigmoid"}, activation),
    "activation_function": Key({"activation_function": "sigmoid"}, activation),
    "scalenorm": Key({"scalenorm": True}, scale_norm),
    "rezero": Key({"rezero": True}, rezero),
    "macaron": Key({"macaron": True}, macaron, ONE),
    "num_mem_kv": Key({"num_mem_kv": 3}, memory, ONE),
    "share_parameters": Key({"share_parameters": True}, shared),
    "no_weight_tie": Key({"no_weight_tie": True}, untied),
    "embed_dropout": Key({"embed_dropout": 0.3}, dropped_embeddings),
    "attn_dropout": Key({"attn_dropout": 0.3}, dropped_weights),
    "res_dropout": Key({"res_dropout": 0.3}, dropped_results),
    "scale_by_depth": Key({"scale_by_depth": True}, by_depth, program="init"),
    "scale_by_in": Key({"scale_by_in": True}, by_fan_in, program="init"),
    "precision": Key(
        {"precision": "bfloat16"}, precision, {"precision": "float32"}, tolerance=0.05
    ),
    "recompute_grad": Key({"recompute_grad": True}, recompute),
}  # fmt: skip
