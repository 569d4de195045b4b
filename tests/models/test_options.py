"""Each option of models/gpt.py against a plain JAX model, and partitioned against whole."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from models import gpt
from models.gpt import PRESETS, Config
from neocc.cost.hardware import chip
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.verify import verify
from neocc.nn import Experts, Masking, Routing
from neocc.passes.autodiff import differentiate
from neocc.passes.microbatch import split_batch
from neocc.passes.pad import pad_inputs, unpad_outputs
from neocc.passes.partition import simulate
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from tests.models import plain_gpt
from tests.models.partitioned import assert_partitioned_equals_whole
from tests.models.values import batch, parameters
from tests.models.values import start as start_pushed
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close

TINY = replace(PRESETS["tiny"], vocab=24, embd=16, heads=4, seq=8, batch=4, scale_scores=False)
WIDE = replace(TINY, dtype="f64", param_dtype="f64", window=3)
MASKING = Masking(mask=23, rate=0.4, same=0.2, random=0.3, cls=22, ignore=(21,))
PATTERN = ((("global", "linear", "local", "none"), 1),)
SENT = Routing(capacity=1.5, policy="threshold")
EXPERTS = Experts(count=4, hidden=12, group=4, loss=0.3, routing=SENT, evaluating=SENT)
MIXED: dict[str, Any] = {"layers": 4, "attention": PATTERN, "double_at_none": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"attention": ((("global", "linear"), 1),)},
    "rotary": {"positions": "rotary"},
    "axial": {"positions": "axial", "axial": (2, 4)},
    "more axial": {"positions": "axial", "axial": (3, 4)},
    "glu": {"glu": True},
    "scalenorm": {"norm": "scale"},
    "rezero": {"norm": "rezero", **MIXED},
    "macaron": {"macaron": True},
    "memory": {"mem_kv": 3},
    "shared": {"share": True},
    "untied": {"tied": False},
    "exact gelu": {"activation": "gelu_exact"},
    "softmax": {"activation": "softmax"},
    "entmax": {"entmax": True},
    "experts": {"moe_layers": (1,), "experts": EXPERTS},
    "switches": {
        "layers": 3, "moe_layers": (0, 1), "norm": "rezero",
        "experts": replace(EXPERTS, gating="switch", choices=1, z_loss=0.1, activation="relu"),
    },
    "experts here and there": {
        **MIXED, "moe_layers": (0, 3), "share": True, "macaron": True, "glu": True,
        "experts": replace(EXPERTS, gating="top_n", choices=3, evaluating=Routing(1.0, "all")),
    },
    "masked": {"masking": MASKING},
    "masked, all kinds": {"masking": MASKING, **MIXED},
    "all at once": {
        **MIXED, "positions": "rotary", "glu": True, "norm": "rezero", "macaron": True,
        "mem_kv": 2, "share": True, "tied": False, "activation": "selu", "entmax": True,
    },
    "unfused masked memory": {
        "masking": MASKING, "mem_kv": 2, "attention_kernel": "unfused", "norm": "scale",
        "attention": ((("local", "global"), 1),), "macaron": True, "positions": "axial",
        "axial": (4, 2),
    },
}  # fmt: skip


COMBINED = (
    "linear",
    "experts",
    "masked, all kinds",
    "all at once",
    "unfused masked memory",
)
SOME = [pytest.param(o, marks=[] if o in COMBINED else pytest.mark.slow) for o in OPTIONS]


def config(option: str) -> Config:
    return replace(WIDE, **OPTIONS[option])


start = functools.partial(start_pushed, push=0.3)


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_equals_a_plain_jax_model_and_its_gradient_is_the_slope(
    x64: None, option: str
) -> None:
    c = config(option)
    values, data = parameters(c, start(c)), batch(c)
    for recompute in (False, True):
        program = differentiate(gpt.forward(replace(c, recompute=recompute)))
        verify(program)
        got = run_numpy(program, values | data)
        assert_close(got["loss"], plain_gpt.loss(c, values, data["tokens"], data["labels"]))
        rng, h = np.random.default_rng(5), 1e-6
        to = {n: rng.standard_normal(x.shape) for n, x in values.items()}
        ends = [
            run_numpy(program, {n: x + s * h * to[n] for n, x in values.items()} | data)["loss"]
            for s in (1, -1)
        ]
        slope = sum(float((got[f"d_{n}"] * d).sum()) for n, d in to.items())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_gradient_equals_a_plain_jax_model(x64: None, option: str) -> None:
    c = config(option)
    values, data = parameters(c, start(c)), batch(c)
    plain = jax.jit(jax.grad(lambda w, *data: plain_gpt.loss(c, w, *data)))
    got = run_numpy(differentiate(gpt.forward(c)), values | data)
    for n, g in plain(values, data["tokens"], data["labels"]).items():
        assert_close(got[f"d_{n}"], g)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_loss(option: str) -> None:
    """With the same weights where both have them, so that the change is the option's."""
    c, base = config(option), replace(WIDE, layers=config(option).layers)
    mine, own = parameters(c, start(c)), parameters(base, start(base))
    common = {n: mine[n] for n in mine.keys() & own.keys() if mine[n].shape == own[n].shape}
    before = run_numpy(gpt.forward(base), own | common | batch(c))["loss"]
    after = run_numpy(gpt.forward(c), mine | common | batch(c))["loss"]
    assert abs(float(before) - float(after)) > 1e-6


MESH = Mesh.parse("2x4")


@pytest.mark.parametrize("option", SOME)
def test_partitioned_equals_unpartitioned(x64: None, option: str) -> None:
    """A whole step of training, in two layouts that nobody would choose."""
    c = replace(config(option), lr=0.01, warmup=0)
    program = simplify(gpt.train_step(c))
    assert_partitioned_equals_whole(program, start(c) | batch(c), MESH)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_planned_step_is_the_same_where_dims_are_padded(x64: None, option: str) -> None:
    """3 heads and a vocab of 27 over 4 devices."""
    c = replace(config(option), lr=0.01, warmup=0, vocab=27, heads=3, embd=18)
    program = simplify(gpt.train_step(c))
    values = start(c) | batch(c)
    values = {i.name: values[i.name] for i in program.inputs}
    plan = make_plan(program, MESH, chip("v5e"), "batch:x,heads:y,vocab:y,mlp:y")
    assert {p.dim for p in plan.paddings} == {"heads", "vocab"}
    got = simulate(plan.partitioned, pad_inputs(plan.program, values, 7))
    got = unpad_outputs(program, got)
    for n, x in run_numpy(program, values).items():
        np.testing.assert_allclose(got[n], x, rtol=1e-7, atol=1e-9, err_msg=n)


@pytest.mark.parametrize("option", SOME)
def test_training_lowers_the_loss(option: str) -> None:
    c = replace(TINY, **{**OPTIONS[option], "lr": 1e-2, "warmup": 5, "steps": 60, "window": 3})
    program, data = simplify(gpt.train_step(c)), batch(c)
    values = run_numpy(gpt.init(c), {"seed": np.uint32(3)})
    losses = []
    for _ in range(30):
        out = run_numpy(program, values | data)
        losses.append(float(out["loss"]))
        values = {n: out[n] for n in values}
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses


def test_layers_that_share_have_one_set_of_parameters_and_one_gradient() -> None:
    c = replace(config("shared"), layers=12)
    names = {n for n in gpt.weights(c) if n.startswith("h")}
    assert all(n.startswith("h.") for n in names)
    assert gpt.train_step(c).parameter_count == gpt.train_step(config("shared")).parameter_count


def test_axial_positions_and_rotary_pairs_must_fit() -> None:
    with pytest.raises(NeoccError, match="tiny: 2 x 3 axial positions for a seq of 8"):
        gpt.forward(replace(TINY, positions="axial", axial=(2, 3)))
    with pytest.raises(NeoccError, match="even head_dim, not 5"):
        gpt.forward(replace(TINY, positions="rotary", embd=20))
    with pytest.raises(NeoccError, match="tiny: norm 'batch'; one of layer, scale, rezero"):
        gpt.forward(replace(TINY, norm="batch"))


@pytest.mark.parametrize("option", ["masked", "experts"])
def test_what_is_drawn_is_the_same_in_parts_of_the_batch_and_on_every_step_other(
    x64: None, option: str
) -> None:
    c = replace(config(option), res_dropout=0.2, embed_dropout=0.1)
    program = simplify(gpt.train_step(c))
    names = {i.name for i in program.inputs if i.role == "data"}
    values, data = start(c), {n: x for n, x in batch(c).items() if n in names}
    whole = run_numpy(program, values | data)
    halves = {n: x.reshape(2, 2, -1) for n, x in data.items()}
    parts = run_numpy(split_batch(program, 2), values | halves)
    for n, x in whole.items():
        np.testing.assert_allclose(parts[n], x, rtol=1e-9, atol=1e-12, err_msg=n)
    later = run_numpy(program, values | data | {"step": np.asarray(1, np.int32)})
    assert float(later["loss"]) != float(whole["loss"])
