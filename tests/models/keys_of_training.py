"""What each key of a GPT-Neo config does to the loss and the optimizer, for ``test_every_key``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from models import gpt
from models.gpt import Config
from neocc.ir.builder import Graph
from neocc.nn import mask_tokens
from tests.models.keyed import Key, changes, close, differ, forward, seen, stepped, values
from tests.models.values import parameters, start
from tests.numpy_executor import run_numpy

MATRICES = ("wte", "wpe", "h0.attn.q", "h0.attn.o", "h0.mlp.fc", "h0.mlp.proj")
MASK = {"mlm_training": True, "mlm_mask_id": 11}
LATER = {"lr_decay": "linear"}
ADAFACTOR = {"opt_name": "adafactor", "weight_decay": 0.0}


def partition(off: Config, on: Config) -> None:
    """Times the mean square of the log-partition."""
    w = values(on)
    a, b = forward(off, w), forward(on, w)
    lse = np.log(np.exp(a["logits"]).sum(-1))
    close(b["loss"] - a["loss"], (0.5 - 1e-4) * (lse**2).mean())


def entmax(off: Config, on: Config) -> None:
    """Nothing where the right token is far ahead, where cross entropy is never nothing; and what is
    far behind has no gradient."""
    w = values(on, head_w=0.0, head_b=np.where(np.arange(12) == 5, 9.0, 0.0))
    data = {n: np.full((4, 8), 5, np.int32) for n in ("tokens", "labels")}
    assert run_numpy(gpt.forward(on), w | data)["loss"] == 0
    assert run_numpy(gpt.forward(off), w | data)["loss"] > 1e-4
    w["head.b"][:3] = (9.0, 9.0, 0.0)
    given = start(on) | w | data | {"step": np.int32(0)}
    moments = run_numpy(gpt.train_step(on), given)["head.b.m"]
    close(
        moments / (1 - on.beta1),
        np.where(np.isin(np.arange(12), (0, 1)), 1 / 3, 0) - (np.arange(12) == 5) * 2 / 3,
    )


def masked(c: Config, step: int = 0, size: int = 4000) -> tuple[np.ndarray, ...]:
    """Tokens[batch, seq], what the model sees of them and its labels, as a step masks them."""
    c = replace(c, batch=size)
    g = Graph("masked")
    assert c.masking is not None
    tokens = g.data("tokens", c.dims()[:2])
    seen, labels = mask_tokens(tokens, c.masking, g.data("step", ()).cast("u32"), c.vocab)
    program = g.build({"seen": seen, "labels": labels})
    given = np.random.default_rng(3).integers(0, c.vocab, (size, c.seq)).astype(np.int32)
    made = run_numpy(program, {"tokens": given, "step": np.int32(step)})
    return given, made["seen"], made["labels"]


def both_ways(off: Config, on: Config) -> None:
    """Every position sees every other; a step takes tokens alone."""
    assert seen(on, values(on)).all()
    assert {i.name for i in gpt.train_step(on).inputs if i.role == "data"} == {"tokens"}
    assert (seen(off, values(off)) == np.tril(np.ones((8, 8), bool))).all()
    (given, made), (_, later) = stepped(on), stepped(on, step=1)
    differ(made["loss"], later["loss"])  # other tokens
    assert np.isfinite(given["tokens"]).all()


def mask_token(off: Config, on: Config) -> None:
    for c, token in ((off, 11), (on, 9)):
        tokens, got, labels = masked(c)
        hidden = (labels != 0) & (got != tokens)
        assert hidden.any() and (got[hidden] == token).all()


def share(off: Config, on: Config) -> None:
    """Of the tokens but the padding, 15 and 60 in a hundred; those chosen stay so."""
    chosen = {}
    for c, rate in ((off, 0.15), (on, 0.6)):
        tokens, _, labels = masked(c)
        chosen[rate] = labels != 0
        right = chosen[rate][tokens != 0]
        assert abs(right.mean() - rate) < 5 * (rate * (1 - rate) / right.size) ** 0.5
        assert (labels == np.where(chosen[rate], tokens, 0)).all()
    assert not (chosen[0.15] & ~chosen[0.6]).any()


def same(off: Config, on: Config) -> None:
    for c, rate in ((off, 0.1), (on, 0.7)):
        tokens, got, labels = masked(c)
        kept = (got == tokens)[(labels != 0) & (tokens != 11)]
        assert abs(kept.mean() - rate) < 5 * (rate * (1 - rate) / kept.size) ** 0.5


def drawn_tokens(off: Config, on: Config) -> None:
    """Nine in ten of the chosen become any ordinary token, each as often; of the rest none."""
    tokens, got, labels = masked(on)
    chosen = labels != 0
    assert (got == tokens)[~chosen].all()
    ordinary = got[chosen & (got != tokens) & (got != 11)]
    assert set(np.unique(ordinary)) == set(range(1, 11))
    parts = np.bincount(ordinary, minlength=11)[1:] / ordinary.size
    assert abs(parts - 0.1).max() < 0.02
    tokens, got, labels = masked(off)
    assert (got[got != tokens] == 11).all()


def in_front(off: Config, on: Config) -> None:
    _, plain, _ = masked(off)
    tokens, got, labels = masked(on)
    assert (got[:, 0] == 10).all() and (labels[:, 0] == 0).all()
    unmasked = labels[:, 1:] == 0
    assert (got[:, 1:] == tokens[:, :-1])[unmasked].all()
    assert not (labels == 10).any() and (plain[:, 0] != 10).any()


def ignored(off: Config, on: Config) -> None:
    """Never chosen, and never drawn."""
    _, _, labels = masked(off)
    assert {3, 4} <= set(np.unique(labels))
    tokens, got, labels = masked(on)
    assert not np.isin(labels, (3, 4)).any()
    assert not np.isin(got[got != tokens], (3, 4)).any()


def padded(off: Config, on: Config) -> None:
    """The label where nothing is to be found, and never chosen itself; its loss is 0."""
    for c, token in ((off, 0), (on, 2)):
        tokens, got, labels = masked(c)
        assert (labels == token).mean() > 0.5
        assert (got == tokens)[labels == token].all() and (got == tokens)[tokens == token].all()
        data = {"tokens": got[:4], "labels": labels[:4]}
        each = run_numpy(gpt.forward(c), values(c) | data)["loss_batch"]
        assert ((each == 0) == (labels[:4] == token)).all()


def rate(c: Config, step: int) -> float:
    return float(stepped(c, step)[1]["lr"])


def faster(off: Config, on: Config) -> None:
    a, b = changes(off), changes(on)
    for n, x in a.items():
        close(b[n], 2 * x)


def decays(off: Config, on: Config) -> None:
    """To a tenth at the end of training, along a line."""
    assert [rate(off, step) for step in (0, 25, 100)] == [0.01] * 3
    close([rate(on, step) for step in (0, 25, 100, 200)], [0.01, 0.00775, 0.001, 0.001])
    curve = replace(on, lr_decay="cosine")
    close(rate(curve, 25), 0.001 + 0.009 * (1 + np.cos(np.pi / 4)) / 2)


def ends(off: Config, on: Config) -> None:
    close([rate(c, 40) for c in (off, on)], [0.0064, 0.001])


def warms_up(off: Config, on: Config) -> None:
    close([rate(on, step) for step in (0, 4, 10, 11)], [0.0, 0.004, 0.01, 0.01])
    assert rate(off, 0) == 0.01


def first_moments(off: Config, on: Config) -> None:
    a, b = stepped(off)[1], stepped(on)[1]
    for n in gpt.weights(off):
        close(a[f"{n}.m"] / 0.1, b[f"{n}.m"] / 0.5)


def second_moments(off: Config, on: Config) -> None:
    a, b = stepped(off)[1], stepped(on)[1]
    for n in gpt.weights(off):
        close(a[f"{n}.v"] / 0.001, b[f"{n}.v"] / 0.5)


def damped(off: Config, on: Config) -> None:
    """By what is added to the root of the second moments."""
    for c, epsilon in ((off, 1e-6), (on, 0.5)):
        made, change = stepped(c)[1], changes(c)
        for n, x in change.items():
            close(x, 0.01 * made[f"{n}.m"] / (made[f"{n}.v"] ** 0.5 + epsilon), 1e-10)


def decayed(off: Config, on: Config) -> None:
    """Matrices by the rate times their value; norms and biases not at all."""
    a, b, w = changes(off), changes(on), parameters(on, start(on))
    for n, x in a.items():
        close(b[n] - x, 0.01 * 0.25 * w[n] if n in (*MATRICES, "h0.attn.k", "h0.attn.v") else 0.0)


def clipped(off: Config, on: Config) -> None:
    """All gradients by one factor, to this norm."""

    def norm(made: dict[str, Any]) -> float:
        return sum(float((made[f"{n}.m"] ** 2).sum()) for n in gpt.weights(off)) ** 0.5 / 0.1

    a, b = stepped(off)[1], stepped(on)[1]
    close(norm(a), float(a["grad_norm"]))
    close([norm(b), float(b["grad_norm"])], [0.01, norm(a)])
    for n in gpt.weights(off):
        close(b[f"{n}.m"] * norm(a), a[f"{n}.m"] * 0.01)


def size(x: Any) -> float:
    return float((np.asarray(x) ** 2).mean() ** 0.5)


def each(w: dict[str, Any]) -> dict[str, Any]:
    """Parameters one by one, those of a layer apart."""
    return {
        (n, i): x
        for n, rows in w.items()
        for i, x in enumerate(rows if "." in n and n[0] == "h" else [rows])
    }


def adafactor(off: Config, on: Config) -> None:
    """The first step changes each parameter by the rate times its size, and keeps no moments of
    first order."""
    w, change = each(parameters(on, start(on))), each(changes(on))
    for n, x in change.items():
        close(size(x), 0.01 * size(w[n]), 1e-6)
    assert not any(i.name.endswith(".m") for i in gpt.train_step(on).inputs)


def added_to_squares(off: Config, on: Config) -> None:
    w, change = each(parameters(on, start(on))), each(changes(on))
    adam = replace(off, optimizer="adam", beta1=0.0, clip=None)
    g = each({n: stepped(adam)[1][f"{n}.m"] for n in gpt.weights(on)})
    for n, x in change.items():
        close(x, 0.01 * size(w[n]) * g[n] / (g[n] ** 2 + 4.0) ** 0.5, 1e-9)


def least_size(off: Config, on: Config) -> None:
    """A parameter smaller than this is taken to be of this size."""
    w, a, b = each(parameters(on, start(on))), each(changes(off)), each(changes(on))
    assert min(size(x) for x in w.values()) < 0.5 < max(size(x) for x in w.values())
    for n, x in b.items():
        close(size(x), 0.01 * max(0.5, size(w[n])), 1e-6)
        close(size(a[n]), 0.01 * max(1e-3, size(w[n])), 1e-6)


TRAINING: dict[str, Key] = {
    "z_loss": Key({"z_loss": 0.5}, partition),
    "entmax_loss": Key({"entmax_loss": True}, entmax, {"no_weight_tie": True, "z_loss": 0.0}),
    "mlm_training": Key(MASK, both_ways),
    "mlm_mask_id": Key({"mlm_mask_id": 9}, mask_token, MASK),
    "mlm_mask_prob": Key({"mlm_mask_prob": 0.6}, share, MASK),
    "mlm_same_token_prob": Key({"mlm_same_token_prob": 0.7}, same, MASK),
    "mlm_random_token_prob": Key({"mlm_random_token_prob": 0.9}, drawn_tokens, MASK),
    "mlm_cls_token_id": Key({"mlm_cls_token_id": 10}, in_front, MASK),
    "mlm_mask_ignore_ids": Key(
        {"mlm_mask_ignore_ids": [3, 4]}, ignored,
        MASK | {"mlm_mask_prob": 0.9, "mlm_random_token_prob": 0.5},
    ),
    "padding_id": Key({"padding_id": 2}, padded, MASK),
    "lr": Key({"lr": 0.02}, faster),
    "lr_decay": Key({"lr_decay": "linear"}, decays),
    "lr_decay_end": Key({"lr_decay_end": 40}, ends, LATER),
    "train_steps": Key({"train_steps": 40}, ends, LATER),
    "warmup_steps": Key({"warmup_steps": 10}, warms_up),
    "beta1": Key({"beta1": 0.5}, first_moments),
    "beta2": Key({"beta2": 0.5}, second_moments),
    "epsilon": Key({"epsilon": 0.5}, damped),
    "weight_decay": Key({"weight_decay": 0.25}, decayed),
    "gradient_clipping": Key({"gradient_clipping": 0.01}, clipped),
    "opt_name": Key({"opt_name": "adafactor"}, adafactor),
    "ada_epsilon1": Key({"ada_epsilon1": 4.0}, added_to_squares, ADAFACTOR),
    "ada_epsilon2": Key({"ada_epsilon2": 0.5}, least_size, ADAFACTOR),
}  # fmt: skip
