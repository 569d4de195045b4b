"""Models of GPT-Neo configs in float64, and what they compute, for the tables of config keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from models import gpt
from models.gpt import Config
from neocc.ir.program import Op, Program, Region
from neocc.passes.simplify import simplify
from tests.models.values import batch, parameters, start
from tests.numpy_executor import run_numpy

Values = dict[str, Any]
BASE: dict[str, Any] = {
    "n_layer": 2, "n_embd": 8, "n_head": 2, "n_vocab": 12, "n_ctx": 8, "train_batch_size": 4,
    "lr": 0.01, "train_steps": 100,
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of the config. ``on``: what a config says with it; ``given``: what that and the config
    without it say. ``holds``: asserts what the key does, from the config without and the one with
    it. ``program``: the function of models/gpt.py whose program it changes. ``tolerance``: of that
    program cut over a mesh against it whole."""

    on: dict[str, Any]
    holds: Callable[[Config, Config], None]
    given: dict[str, Any] = field(default_factory=dict)
    program: str = "train_step"
    tolerance: float = 1e-9

    @property
    def without(self) -> dict[str, Any]:
        return BASE | self.given

    @property
    def configs(self) -> tuple[Config, Config]:
        """Without the key, and with it; wide."""
        return wide(self.without), wide(self.without | self.on)


def wide(keys: Mapping[str, Any]) -> Config:
    """In float64, unless the config says another precision."""
    c = gpt.config_from_gptneo(dict(keys), "keyed")
    return c if "precision" in keys else replace(c, dtype="f64", param_dtype="f64")


def values(c: Config, **own: Any) -> Values:
    """Parameters off their symmetric values; ``own``: some by name, ``_`` for a dot, or a function
    of what they would be."""
    w = parameters(c, start(c))
    for name, x in own.items():
        full = next(n for n in w if n.replace(".", "_") == name)
        w[full] = x(w[full]) if callable(x) else np.broadcast_to(x, w[full].shape).astype(float)
    return w


def tokens_of(c: Config) -> np.ndarray:
    return batch(c)["tokens"]


def forward(c: Config, w: Values, tokens: np.ndarray | None = None) -> Values:
    """logits, loss and loss_batch."""
    data = batch(c) if tokens is None else {"tokens": tokens, "labels": batch(c)["labels"]}
    return run_numpy(gpt.forward(c), w | data)


def logits(c: Config, w: Values, tokens: np.ndarray | None = None) -> np.ndarray:
    return forward(c, w, tokens)["logits"]


def training(c: Config, w: Values, step: int = 0) -> np.ndarray:
    """Logits as a step of training has them: with dropout, and experts chosen as in training."""
    g, p, tokens = gpt.begin(c, "training")
    made, _ = gpt.model(c, p, tokens, gpt.mask_seed(c, g.data("step", ())))
    program = g.build({"logits": made})
    return run_numpy(program, w | {"tokens": tokens_of(c), "step": np.int32(step)})["logits"]


def stepped(c: Config, step: int = 0) -> tuple[Values, Values]:
    """What a step of training is given, and what it makes of it."""
    given = start(c) | batch(c) | {"step": np.int32(step)}
    program = simplify(gpt.train_step(c))
    given = {i.name: given[i.name] for i in program.inputs}
    return given, run_numpy(program, given)


def changes(c: Config, step: int = 0) -> Values:
    """By how much a step lowers each parameter."""
    given, made = stepped(c, step)
    return {n: given[n] - made[n] for n in gpt.weights(c)}


def seen(c: Config, w: Values) -> np.ndarray:
    """bool[i, j]: whether the logits at i depend on the token at j."""
    c = replace(c, batch=c.seq + 1)
    tokens = np.tile(np.arange(c.seq) % c.vocab, (c.batch, 1)).astype(np.int32)
    for j in range(c.seq):
        tokens[j + 1, j] = (j + c.vocab // 2) % c.vocab
    z = logits(c, w, tokens)
    return (abs(z[1:] - z[0]).max(-1) > 1e-9).T


def ops(program: Program) -> list[tuple[Op, bool]]:
    """Every op, and whether it runs once for each layer."""

    def inside(region: Region, looped: bool) -> list[tuple[Op, bool]]:
        found = [(op, looped) for op in region.ops]
        for op in region.ops:
            for inner in op.regions:
                found += inside(inner, looped or op.kind == "repeat")
        return found

    return inside(program.body, False)


def drawn(program: Program) -> list[tuple[tuple[str, ...], bool]]:
    """The dims of what is drawn at random, and whether it is drawn for each layer."""
    return [(op.result.type.names, looped) for op, looped in ops(program) if op.kind == "random"]


def close(a: Any, b: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def differ(a: Any, b: Any, by: float = 1e-6) -> None:
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > by
