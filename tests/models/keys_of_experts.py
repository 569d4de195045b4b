"""What each key of a mixture of experts does, for ``test_every_key``.

Mostly by experts that are alike but for the size of what they make, and a gate of zeros, which
finds all of them as likely: a token's choices are then the first experts, and what a token gets is
a multiple of what one mlp makes of it (``alike``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from models import gpt
from models.gpt import Config
from tests.models.keyed import Key, Values, close, differ, drawn, forward, logits, training, values

# As many slots as tokens in each expert, and every second choice is taken.
CALM: dict[str, Any] = {
    "moe_num_experts": 4, "moe_hidden_size": 32, "moe_group_size": 8,
    "moe_capacity_factor_train": 4, "moe_capacity_factor_eval": 4,
    "moe_second_policy_train": "all", "moe_second_policy_eval": "all",
}  # fmt: skip
SWITCH = {"moe_gating": "switch", "moe_switch_policy_train": "argmax"}
NTLB = {"moe_gating": "ntlb", "moe_switch_policy_train": "argmax"}
WEIGHTS = 1e-8  # of a token's experts add up to 1 but for what keeps quotients finite
FULL = {"moe_capacity_factor_train": 0.1, "moe_capacity_factor_eval": 0.1}  # one slot


def moe(**keys: Any) -> dict[str, Any]:
    return {"n_layer": 1, "moe_layers": [0], "moe_params": CALM | keys}


def key(name: str, value: Any, holds: Any, program: str = "train_step", **given: Any) -> Key:
    """A key of moe_params."""
    return Key(moe(**given, **{name: value}), holds, moe(**given), program)


def alike(c: Config, sizes: Sequence[float] = (1, 1, 1, 1), **own: Any) -> Values:
    """Experts that make so many times the same; all are as likely."""
    down = np.ones((1, 4, 1, 1)) * np.reshape(sizes, (1, 4, 1, 1))
    same = {"h0_moe_up": lambda x: x[:, :1] + 0 * x, "h0_moe_down": lambda x: x[:, :1] * down}
    return values(c, **({"h0_moe_gate": 0.0} | same | own))


def mlp(c: Config, w: Values, times: float = 1.0) -> np.ndarray:
    """Logits with an mlp in the place of the experts: the first of them, what it makes so many
    times."""
    assert c.experts is not None
    plain = replace(c, moe_layers=(), experts=None, activation=c.experts.activation)
    own = {"h0.mlp.fc": w["h0.moe.up"][:, 0], "h0.mlp.proj": times * w["h0.moe.down"][:, 0]}
    own |= {n: 0 * x for n, x in values(plain).items() if n in ("h0.mlp.fc_b", "h0.mlp.proj_b")}
    return logits(plain, {n: x for n, x in w.items() if ".moe." not in n} | own)


def served(c: Config, w: Values, run: Any = logits) -> list[int]:
    """Positions of the tokens that some expert took."""
    found = abs(run(c, w) - run(c, w | {"h0.moe.down": 0 * w["h0.moe.down"]})).max(-1) > 1e-9
    assert (found == found[0]).all()
    return [int(i) for i in np.flatnonzero(found[0])]


def balance(c: Config, w: Values) -> float:
    """What is added to the loss."""
    assert c.experts is not None
    off = replace(c, experts=replace(c.experts, loss=0.0))
    return float(forward(c, w)["loss"] - forward(off, w)["loss"])


def chosen_layers(off: Config, on: Config) -> None:
    """Layer 1 has experts, layer 0 its mlp."""
    groups = {".".join(n.split(".")[:2]) for n in gpt.weights(on)}
    assert {"h0.mlp", "h1.moe"} <= groups and not {"h1.mlp", "h0.moe"} & groups
    assert not any(".moe." in n for n in gpt.weights(off))


def defaults(off: Config, on: Config) -> None:
    """Without it GPT-Neo's: 16 experts of 4096, of which a token has two."""
    for c, count, hidden in ((off, 16, 4096), (on, 4, 32)):
        assert [d.size for d in gpt.weights(c)["h0.moe.up"].dims] == [1, count, 8, hidden]
        assert c.experts is not None and c.experts.choices == 2


def activated(off: Config, on: Config) -> None:
    """The sigmoid of 0 is a half, and relu's is 0."""
    w = alike(on, h0_moe_up=0.0)
    assert served(off, w) == [] and served(on, w) == list(range(8))
    close(logits(on, w), mlp(on, w), WEIGHTS)


def count(off: Config, on: Config) -> None:
    """A gate with as many columns; where two are alike, more that are as likely change nothing."""
    few = alike(off)
    assert values(on)["h0.moe.gate"].shape == (1, 8, 6)
    first = {n: np.repeat(few[n][:, :1], 6, 1) for n in ("h0.moe.up", "h0.moe.down")}
    close(logits(on, few | first | {"h0.moe.gate": np.zeros((1, 8, 6))}), logits(off, few), WEIGHTS)


def width(off: Config, on: Config) -> None:
    """Hidden units that lead nowhere change nothing."""
    w = alike(on)
    assert w["h0.moe.up"].shape == (1, 4, 8, 40)
    less = {"h0.moe.up": w["h0.moe.up"][..., :32], "h0.moe.down": w["h0.moe.down"][:, :, :32]}
    w["h0.moe.down"][:, :, 32:] = 0
    close(logits(on, w), logits(off, w | less))


def gating(off: Config, on: Config) -> None:
    """Two that are alike, weighted to one, are one; a switch's one is weighted by its quarter."""
    w = alike(on)
    close(logits(off, w), mlp(off, w), WEIGHTS)
    close(logits(on, w), mlp(on, w, 1 / 4))


def choices(off: Config, on: Config) -> None:
    """The mean of the first three, and of the first two."""
    w = alike(on, (1, 2, 6, 50))
    close(logits(off, w), mlp(off, w, 3), WEIGHTS)
    close(logits(on, w), mlp(on, w, 1.5), WEIGHTS)


def left_behind(off: Config, on: Config) -> None:
    """Of each token's experts the first with room: with one slot each, as many tokens as experts
    that they may choose."""
    assert served(off, alike(off)) == [0, 1, 2, 3]
    w = alike(on, (1, 5, 7, 7))
    assert served(on, w) == [0, 1]
    close(logits(on, w)[:, 0], mlp(on, w, 1 / 4)[:, 0])
    close(logits(on, w)[:, 1], mlp(on, w, 5 / 4)[:, 1])


def grouped(off: Config, on: Config) -> None:
    """An expert takes its share of every group, which are of four, not eight."""
    assert served(off, alike(off)) == [0] and served(on, alike(on)) == [0, 4]


def room(run: Any) -> Any:
    """Six slots of four experts' 8 tokens are the factor 3, two a factor 1; in one mode alone."""

    def holds(off: Config, on: Config) -> None:
        for mode in (logits, training):
            assert served(off, alike(off), mode) == list(range(8))
            assert served(on, alike(on), mode) == list(range(6 if mode is run else 8))

    return holds


def least(off: Config, on: Config) -> None:
    assert served(off, alike(off)) == [0] and served(on, alike(on)) == [0, 1, 2]


def weighted(off: Config, on: Config) -> None:
    """All tokens at one expert of four that are as likely: 4 x 1 x 1/4, times the weight."""
    w = alike(on)
    close([balance(off, w), balance(on, w)], [0.01, 0.5])


def second_weighted(off: Config, on: Config) -> None:
    """As for the first, of the three that are left: 4/3, half as much."""
    w = alike(on)
    close([balance(off, w), balance(on, w)], [0.01, 0.01 * (1 + 0.5 * 4 / 3)], 1e-8)


def squared(off: Config, on: Config) -> None:
    """The log-partition of a gate of four zeros is log 4; a part of the balancing loss."""
    w = alike(on)
    close(balance(on, w) - balance(off, w), 0.01 * 2.0 * np.log(4) ** 2)


def policy(run: Any) -> Any:
    """Without second choices, whose weight is a half, a token has the other half; in one mode
    alone."""

    def holds(off: Config, on: Config) -> None:
        w = alike(on)
        for mode in (logits, training):
            close(mode(off, w), mlp(off, w), WEIGHTS)
            close(mode(on, w), mlp(on, w, 0.5 if mode is run else 1.0), WEIGHTS)

    return holds


def dropped(off: Config, on: Config) -> None:
    """Between an expert's two products, in training."""
    hidden = ("experts", "batch", "slot", "expert_hidden")
    assert drawn(gpt.train_step(off)) == []
    assert set(drawn(gpt.train_step(on))) == {(hidden, True)}
    w = alike(on)
    assert on.experts is not None
    close(logits(on, w), logits(off, w))
    nothing = replace(on, experts=replace(on.experts, dropout=0.9999999))
    close(training(nothing, w), mlp(on, w, 0.0))


def trembles(off: Config, on: Config) -> None:
    """What the gate sees is a hundredth off at most; evaluation is as before."""
    w = alike(on, h0_moe_gate=lambda x: x)
    assert set(drawn(gpt.train_step(on))) == {(("batch", "token", "embd"), True)}
    assert drawn(gpt.train_step(off)) == [] and drawn(gpt.forward(on)) == []
    close(logits(on, w), logits(off, w))
    apart = abs(training(on, w) - training(off, w)).max()
    assert 0 < apart < 0.01


def samples(off: Config, on: Config) -> None:
    """Experts as likely are chosen as often, where the likeliest would be the first for all."""
    w = alike(on, (0, 1, 1, 1))
    assert served(off, w) == []
    taken = abs(logits(on, w) - logits(off, w)).max(-1) > 1e-9
    assert 0.4 < taken.mean() < 1.0  # 3 in 4 of 32
    assert len(drawn(gpt.forward(on))) > 0 and drawn(gpt.forward(off)) == []


def unseen(off: Config, on: Config) -> None:
    """A gate that sees nothing, as it nearly always does, takes the first of equals; one that sees
    takes the likeliest."""
    gate = np.zeros((1, 8, 4))
    gate[..., 1] = 5.0
    w = alike(on, (1, 0, 0, 0), h0_moe_gate=gate, h0_ln2_g=0.0, h0_ln2_b=1.0)
    assert served(on, w) == []
    taken = {c: (abs(training(c, w) - logits(c, w)) > 1e-9).any(-1).mean() for c in (off, on)}
    assert taken[off] < 0.3 and taken[on] > 0.9


def jitter(off: Config, on: Config) -> None:
    """The noise is in proportion to it."""
    w = alike(on, h0_moe_gate=lambda x: x)
    assert on.experts is not None and off.experts is not None
    still = training(replace(off, experts=replace(off.experts, jitter=0.0)), w)
    little, more = (abs(training(c, w) - still).max() for c in (off, on))
    assert 5 < little / more < 20


def cold(off: Config, on: Config) -> None:
    """Without heat the likeliest is sampled."""
    assert on.experts is not None
    w = alike(on, (0, 1, 2, 3), h0_moe_gate=lambda x: x)
    calm = replace(on.experts.evaluating, switch="argmax")
    likeliest = logits(replace(on, experts=replace(on.experts, evaluating=calm)), w)
    close(logits(on, w), likeliest)
    differ(logits(off, w), likeliest)


EXPERTS: dict[str, Key] = {
    "moe_layers": Key(
        {"moe_layers": [1], "moe_params": CALM}, chosen_layers, {"moe_params": CALM}
    ),
    "moe_params": Key(moe(), defaults, {"n_layer": 1, "moe_layers": [0]}),
    "moe_activation": Key({"moe_activation": "sigmoid"}, activated, moe()),
    "moe_num_experts": key("moe_num_experts", 6, count, moe_capacity_factor_eval=6),
    "moe_hidden_size": key("moe_hidden_size", 40, width),
    "moe_gating": Key(moe(**SWITCH), gating, moe()),
    "moe_top_n_num_experts_per_token": key(
        "moe_top_n_num_experts_per_token", 2, choices, moe_gating="top_n"
    ),
    "moe_ntlb_top_k": key("moe_ntlb_top_k", 2, left_behind, **NTLB, **FULL),
    "moe_group_size": key("moe_group_size", 4, grouped, **SWITCH, **FULL),
    "moe_capacity_factor_train": key("moe_capacity_factor_train", 3, room(training), **SWITCH),
    "moe_capacity_factor_eval": key(
        "moe_capacity_factor_eval", 3, room(logits), "forward", **SWITCH
    ),
    "moe_min_expert_capacity": key("moe_min_expert_capacity", 3, least, **SWITCH, **FULL),
    "moe_loss_coef": key("moe_loss_coef", 0.5, weighted),
    "moe_use_second_place_loss": key("moe_use_second_place_loss", True, second_weighted),
    "moe_z_loss": key("moe_z_loss", 2.0, squared),
    "moe_second_policy_train": key("moe_second_policy_train", "none", policy(training)),
    "moe_second_policy_eval": key("moe_second_policy_eval", "none", policy(logits), "forward"),
    "moe_second_threshold_train": key(
        "moe_second_threshold_train", 0.6, policy(training),
        moe_second_policy_train="threshold",
    ),
    "moe_second_threshold_eval": key(
        "moe_second_threshold_eval", 0.6, policy(logits), "forward",
        moe_second_policy_eval="threshold",
    ),
    "moe_dropout_rate": key("moe_dropout_rate", 0.3, dropped),
    "moe_switch_policy_train": Key(
        moe(moe_gating="switch", moe_switch_policy_train="input_jitter"), trembles, moe(**SWITCH)
    ),
    "moe_switch_policy_eval": key(
        "moe_switch_policy_eval", "sample", samples, "forward", **SWITCH
    ),
    "moe_switch_dropout": key(
        "moe_switch_dropout", 0.999, unseen, moe_gating="switch",
        moe_switch_policy_train="input_dropout",
    ),
    "moe_switch_jitter": key(
        "moe_switch_jitter", 0.001, jitter, moe_gating="switch",
        moe_switch_policy_train="input_jitter",
    ),
    "moe_switch_temperature": key(
        "moe_switch_temperature", 1e-6, cold, "forward", **SWITCH, moe_switch_policy_eval="sample"
    ),
}  # fmt: skip
