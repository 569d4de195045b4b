"""The programs that sample: what they say behind each prompt is what the whole model says there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from models.gpt import PRESETS, Config
from neocc.backends.target import audit_for_target
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel, on_vector_unit
from neocc.cost.roofline import product_traffic_time
from neocc.ir.builder import Graph, einsum
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.nn import Experts, Masking, Routing
from neocc.passes.partition import apply, simulate
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from tests.models.values import parameters, start
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment, seeded
from tests.random_programs import assert_close

BASE = replace(
    PRESETS["tiny"], vocab=31, embd=16, heads=2, seq=12, batch=3, dtype="f64", param_dtype="f64"
)
# As many slots as tokens: the forward pass drops none either, as sampling never does.
ROOM = Routing(capacity=4.0, policy="threshold")
EXPERTS = Experts(4, 12, "top_n", 3, group=6, activation="gelu", evaluating=ROOM)
OPTIONS: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"layers": 4, "attention": ((("global", "local"), 2),), "window": 3},
    "window of one": {"attention": ((("local",), 2),), "window": 1},
    "none": {"attention": ((("global", "none"), 1),), "double_at_none": True},
    "two stacks": {"layers": 3, "attention": ((("local",), 1), (("global",), 2)), "window": 4},
    "rotary": {"positions": "rotary"},
    "axial": {"positions": "axial", "axial": (3, 4)},
    "axial with more": {"positions": "axial", "axial": (4, 5)},
    "memory": {"mem_kv": 2, "attention": ((("global", "local"), 1),), "window": 4},
    "linear": {"attention": ((("global", "linear"), 1),)},
    "shared": {"share": True},
    "options": {"norm": "scale", "glu": True, "macaron": True, "tied": False},
    "rezero": {"norm": "rezero", "qkv_bias": True},
    "experts": {"layers": 3, "moe_layers": (0, 2), "experts": EXPERTS},
    "switches": {
        "share": True, "macaron": True, "moe_layers": (1,),
        "experts": replace(
            EXPERTS, gating="switch", choices=1, evaluating=Routing(4.0, switch="input_jitter")
        ),
    },
    "no token left behind": {
        "moe_layers": (0, 1), "attention": ((("global", "local"), 1),), "window": 3,
        "experts": replace(EXPERTS, gating="ntlb"),
    },
}  # fmt: skip
PROMPT, SLOTS, LENGTHS = 5, 10, (5, 1, 3, 4)


def run_through(c: Config, run: Any, values: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """logits[batch, vocab] behind the prompts and behind each token after them; what pads the
    prompts is of no account."""
    prefill, decode = gpt.prefill(c, PROMPT, SLOTS), gpt.decode_step(c, SLOTS)
    verify(prefill)
    verify(decode)
    lengths = np.array(LENGTHS[: c.batch], np.int32)
    given = np.where(np.arange(PROMPT) < lengths[:, None], tokens[:, :PROMPT], 7)
    data = {"tokens": given.astype(np.int32), "lengths": lengths}
    out = run(prefill, values | data)
    found = [out.pop("logits")]
    for at in range(PROMPT, SLOTS):
        given = tokens[np.arange(len(lengths)), lengths + at - PROMPT]
        data = {"tokens": given[:, None], "lengths": lengths}
        place = {"at": np.int32(at), "filled": np.int32(PROMPT)}
        out = run(decode, values | out | data | place)
        found.append(out.pop("logits"))
    return found


def whole(c: Config, values: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """The same logits from the forward pass over all of it."""
    data = {"tokens": tokens, "labels": np.zeros_like(tokens)}
    logits = run_numpy(gpt.forward(c), values | data)["logits"]
    rows, last = np.arange(c.batch), np.array(LENGTHS[: c.batch]) - 1
    return [logits[rows, last + i] for i in range(SLOTS - PROMPT + 1)]


def tokens_of(c: Config) -> np.ndarray:
    return np.random.default_rng(5).integers(0, c.vocab, (c.batch, c.seq)).astype(np.int32)


@pytest.mark.parametrize("name", OPTIONS)
def test_with_the_cache_equals_without(name: str) -> None:
    c = replace(BASE, **OPTIONS[name])
    values, tokens = parameters(c, start(c)), tokens_of(c)
    found = run_through(c, run_numpy, values, tokens)
    for mine, right in zip(found, whole(c, values, tokens), strict=True):
        assert_close(mine, right, 1e-11)


@pytest.mark.parametrize(
    "experts",
    [
        replace(EXPERTS, evaluating=Routing(4.0, "random", 0.8)),
        replace(EXPERTS, gating="switch", choices=1, evaluating=Routing(4.0, switch="sample")),
    ],
)
def test_experts_at_random_are_the_same_in_any_batch_and_however_much_is_given(
    experts: Experts,
) -> None:
    """What is drawn goes by a token's position, and by its layer."""
    c = replace(BASE, layers=4, moe_layers=(1, 3), experts=experts)
    values, tokens = parameters(c, start(c)), tokens_of(c)
    found = run_through(c, run_numpy, values, tokens)
    for i, logits in enumerate(found):
        for row, length in enumerate(LENGTHS[: c.batch]):
            alone, given = replace(c, batch=1), length + i
            data = {"tokens": tokens[row : row + 1, :given], "lengths": np.array([given], np.int32)}
            right = run_numpy(gpt.prefill(alone, given, given), values | data)["logits"]
            assert_close(logits[row : row + 1], right, 1e-11)
    certain = replace(experts, evaluating=Routing(4.0, "all", switch="argmax"))
    other = run_through(replace(c, experts=certain), run_numpy, values, tokens)
    assert max(abs(a - b).max() for a, b in zip(found, other, strict=True)) > 1e-3


@given(st.sampled_from(sorted(OPTIONS)), st.integers(0, 10**6))
@settings(max_examples=10)
def test_partitioned_anyhow_it_is_the_same(name: str, seed: int) -> None:
    """A slot's dim may be cut too: a device then writes, or leaves, the slots that it has."""
    c = replace(BASE, batch=4, **OPTIONS[name])
    mesh = Mesh.parse("2x2")

    def run(program: Program, inputs: Any) -> dict[str, np.ndarray]:
        assignment = random_assignment(program, mesh, seeded(seed))
        return simulate(apply(program, mesh, assignment), inputs)

    values, tokens = parameters(c, start(c)), tokens_of(c)
    found = run_through(c, run, values, tokens)
    for mine, right in zip(found, whole(c, values, tokens), strict=True):
        assert_close(mine, right, 1e-11)


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"masking": Masking(mask=3)}, (), "that finds masked tokens cannot be sampled"),
        ({}, (13,), "1 tokens in 13 slots of a context of 12"),
    ],
)
def test_what_cannot_be_sampled_is_refused(fields: Any, sizes: Any, message: str) -> None:
    with pytest.raises(NeoccError, match=message):
        gpt.decode_step(replace(BASE, **fields), *sizes)


def test_a_cache_of_one_slot_and_prompts_that_fill_it() -> None:
    c = replace(BASE, batch=2)
    values, tokens = parameters(c, start(c)), tokens_of(c)
    data = {"tokens": tokens[:, :4], "lengths": np.array([4, 2], np.int32)}
    out = run_numpy(gpt.prefill(c, 4, 4), values | data)
    assert out["h0.cache.k"].shape == (2, 2, 4, 2, 8)
    right = run_numpy(gpt.prefill(c, 4, 6), values | data)
    assert_close(out["logits"], right["logits"])
    assert_close(out["h0.cache.v"], right["h0.cache.v"][:, :, :4])
    verify(gpt.decode_step(c, 1))


def test_a_decode_step_of_175b_is_planned_within_a_device() -> None:
    """Weights in bf16 and the cache lie once on the mesh, and are read once: no step is faster."""
    c = replace(PRESETS["gpt3-175b"], batch=32)
    mesh, target = Mesh.parse("8x16"), chip("v5e")
    plan = make_plan(simplify(gpt.decode_step(c)), mesh, target)
    assert plan.fits and plan.solution.gap == 0
    weights = 2 * plan.ready.source.parameter_count / mesh.size
    cache = 2 * 2 * c.layers * c.batch * c.seq * c.embd / mesh.size
    held = plan.memory.by_kind
    assert held["parameters"] == pytest.approx(weights, rel=0.02)
    assert held["optimizer state"] == pytest.approx(cache)
    assert (weights + cache) / target.hbm_bandwidth < plan.timeline.compute
    assert 0.75 * 17.4e-3 < plan.timeline.compute < 17.4e-3  # the TPU compiler's cycles
    assert plan.timeline.step > plan.timeline.compute


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode_step", "prefill"])
def test_the_compiled_program_is_the_plan(name: str) -> None:
    """The cache is written in place: it counts once."""
    c = replace(PRESETS["gpt2-xl"], batch=32)
    plan = make_plan(simplify(getattr(gpt, name)(c)), Mesh.parse("2x4"), chip("v5e"))
    found = audit_for_target(plan)
    assert found.ok and abs(found.memory_error) < 0.05


@pytest.mark.parametrize("rows", [1, 2])
def test_a_product_of_one_row_is_a_sum_on_the_vector_unit(rows: int) -> None:
    g = Graph("product")
    dims = [Dim("rows", rows), Dim("k", 1024), Dim("n", 4096)]
    x, w = g.data("x", dims[:2], "bf16"), g.data("w", dims[1:], "bf16")
    program = g.build({"y": einsum(x, w, "rows n")})
    (op,) = program.body.ops
    target = chip("v5e")
    seconds = CostModel.of(target, Mesh.parse("1")).op_seconds(op, lambda dim: 1)
    cycles = (seconds - target.kernel_overhead) * target.vector_clock
    if rows == 1:  # the TPU compiler's estimate: 59,716 cycles
        assert cycles == pytest.approx(59_716, rel=0.05)
    else:
        moved = 2 * (1024 * 4096 + rows * (1024 + 4096))
        assert cycles / target.vector_clock == pytest.approx(
            product_traffic_time(target, rows, 4096, moved)
        )
    assert on_vector_unit(target, op, lambda dim: 1) is (rows == 1)
    assert not on_vector_unit(chip("h100"), op, lambda dim: 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_those_of_the_forward_pass(name: str) -> None:
    """Of the first tokens alone too: attention is causal."""
    c = replace(BASE, **OPTIONS[name])
    values, tokens = parameters(c, start(c)), tokens_of(c)
    labels = np.roll(tokens, -1, 1)
    logits = run_numpy(gpt.forward(c), values | {"tokens": tokens, "labels": labels})["logits"]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logp = np.take_along_axis(logp, labels[..., None], -1)[..., 0]
    for count in (c.seq, 7):
        data = {"tokens": tokens[:, :count], "labels": labels[:, :count]}
        found = run_numpy(gpt.score(c, count), values | data)
        assert_close(found["logp"], logp[:, :count], 1e-11)
        np.testing.assert_array_equal(found["best"], logits[:, :count].argmax(-1))


def test_of_equal_logits_the_first_is_best() -> None:
    c = replace(BASE, tied=False)
    values = parameters(c, start(c))
    values |= {"head.w": np.zeros_like(values["head.w"]), "head.b": np.arange(31) // 3 % 5 * 1.0}
    data = {"tokens": tokens_of(c), "labels": tokens_of(c)}
    assert (run_numpy(gpt.score(c), values | data)["best"] == 12).all()
