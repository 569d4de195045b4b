"""Mixtures of experts: against Mesh TensorFlow's own figures, and the same on every mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neocc.cost.hardware import chip
from neocc.ir.builder import Graph
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program, Region
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.nn import Experts, Routing, check_experts, mixture
from neocc.nn.experts import route
from neocc.passes.autodiff import differentiate
from neocc.passes.microbatch import split_batch
from neocc.passes.pad import pad_inputs, unpad_outputs
from neocc.passes.partition import apply, simulate, verify_partitioned
from neocc.passes.plan import make_plan
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment, seeded
from tests.random_programs import assert_close

# What transformer_moe_layer_v1 of Mesh TensorFlow 0.1.21 computed in float32 on TensorFlow 2.12:
# outputs, loss and the gradients of sum(weight * output) + loss.
FIGURES = np.load(Path(__file__).parent / "fixtures" / "mesh_tf_experts.npz")
ALL = Routing(policy="all", threshold=0.4, switch="argmax")
BASE = Experts(count=4, hidden=5, choices=2, group=6, loss=0.1, routing=ALL)
CASES: dict[str, dict[str, Any]] = {
    "top_2": {},
    "wide": {"routing": replace(ALL, capacity=4.0)},
    "narrow": {"routing": replace(ALL, capacity=0.5)},
    "threshold": {"routing": replace(ALL, policy="threshold")},
    "none": {"routing": replace(ALL, policy="none")},
    "second loss": {"second_loss": True},
    "z loss": {"z_loss": 0.01},
    "top_n": {"gating": "top_n", "choices": 3},
    "switch": {"gating": "switch", "choices": 1},
    "one group": {"group": 12, "least": 5},
    "ntlb": {"gating": "ntlb", "choices": 4},
    "ntlb 2": {
        "gating": "ntlb",
        "choices": 2,
        "z_loss": 0.01,
        "routing": replace(ALL, capacity=0.8),
    },
}
WEIGHTS = ("gate", "up", "down")


def layer(e: Experts, batch: int = 2, seq: int = 12, embd: int = 4, dtype: str = "f64") -> Program:
    """x, gate, up, down, weight, seed -> y, balance[batch], loss."""
    g = Graph("experts")
    width, hidden = Dim("embd", embd), Dim("expert_hidden", e.hidden)
    tokens = (Dim("batch", batch), Dim("seq", seq), width)
    x, weight = (g.data(n, tokens, dtype) for n in ("x", "weight"))
    gate = g.parameter("gate", (width, e.experts), dtype)
    up = g.parameter("up", (e.experts, width, hidden), dtype)
    down = g.parameter("down", (e.experts, hidden, width), dtype)
    y, balance = mixture(x, gate, up, down, e, g.data("seed", (), "u32"))
    loss = (y * weight).sum("batch", "seq", "embd") + balance.mean("batch")
    return g.build({"y": y, "balance": balance, "loss": loss})


def values(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        i.name: rng.standard_normal(v.type.shape)
        for i, v in program.named_inputs
        if v.type.is_float
    }
    return made | {"seed": np.asarray(7, np.uint32)}


@pytest.mark.parametrize("case", CASES)
def test_reproduces_what_mesh_tensorflow_computed(x64: None, case: str) -> None:
    program = differentiate(layer(replace(BASE, **CASES[case])), wrt=["x", *WEIGHTS])
    verify(program)
    given = {n: FIGURES[n].astype(np.float64) for n in ("x", "weight", *WEIGHTS)}
    got = run_numpy(program, given | {"seed": np.asarray(0, np.uint32)})
    assert np.abs(FIGURES[f"{case}:y"]).max() > 0.1
    for n in ("y", *(f"d_{w}" for w in ("x", *WEIGHTS))):
        np.testing.assert_allclose(got[n], FIGURES[f"{case}:{n}"], rtol=0, atol=1e-5, err_msg=n)
    np.testing.assert_allclose(got["balance"].mean(), FIGURES[f"{case}:loss"], rtol=1e-5)


# Meshes

RANDOM = replace(BASE, count=8, hidden=8, group=4, routing=Routing(capacity=1.0, policy="random"))


@pytest.mark.parametrize("case", ["top_2", "top_n", "switch", "ntlb 2"])
def test_any_layout_computes_the_same_and_drops_the_same_tokens(x64: None, case: str) -> None:
    """With choices at random, every value, and which slots are filled to the last one."""
    g = Graph("routes")
    e = replace(RANDOM, **CASES[case])
    e = replace(e, routing=Routing(1.0, "random", switch="sample"))
    x = g.data("x", (Dim("batch", 8), Dim("group", 2), Dim("token", 8), Dim("embd", 4)), "f64")
    gate = g.parameter("gate", (x.dim("embd"), e.experts), "f64")
    routes = route(x, gate, e, g.data("seed", (), "u32"))
    wide = routes.dispatch.cast("i32")
    kept = wide.sum("experts", "slot")
    program = g.build({"kept": kept, "used": wide, "combine": routes.combine, "b": routes.loss})
    given = values(program)
    whole = run_numpy(program, given)
    most = 1 if e.gating == "ntlb" else e.choices
    assert len(np.unique(whole["kept"])) == most + 1  # none, some and all of its experts
    assert whole["used"].sum(2).max() == 1  # of a group's tokens at most one lies in a slot
    for mesh in ("8", "2x4", "4x2", "2x2x2"):
        for seed in range(2):
            at = Mesh.parse(mesh)
            made = apply(program, at, random_assignment(program, at, seeded(seed)))
            verify_partitioned(made, program)
            got = simulate(made, given)
            for n in ("kept", "used"):
                np.testing.assert_array_equal(got[n], whole[n], err_msg=f"{n} {mesh} {seed}")
            for n in ("combine", "b"):
                assert_close(got[n], whole[n])


CUTS = [
    "batch:x,experts:y",
    "batch:x,experts:x,expert_hidden:y",
    "experts:x",
    "experts:x,experts:y",
]


@pytest.mark.parametrize("layout", CUTS)
def test_experts_cut_over_any_axis_compute_the_same(x64: None, layout: str) -> None:
    """Also where the axis cuts the tokens' batch, as Mesh TensorFlow's layouts have it: tokens then
    travel by all-to-alls."""
    program = differentiate(layer(RANDOM, batch=8))
    given = values(program)
    whole = run_numpy(program, given)
    mesh = Mesh.parse("2x4")
    plan = make_plan(program, mesh, chip("v5e"), layout)
    cut = plan.partitioned.program.input_value("up").type.layout
    assert cut is not None
    rules = layout.split(",")
    named = [mesh.index(rule[-1]) for rule in rules if rule.startswith("experts")]
    assert all(cut.axes[a] == "experts" for a in named)
    moved = {c.axis for c in plan.collectives if c.kind == "all_to_all"}
    shared = {r[-1] for r in rules if f"batch:{r[-1]}" in rules and f"experts:{r[-1]}" in rules}
    assert shared <= moved
    verify_partitioned(plan.partitioned, plan.program)
    got = simulate(plan.partitioned, given)
    for n, x in whole.items():
        np.testing.assert_allclose(got[n], x, rtol=1e-9, atol=1e-12, err_msg=n)


def test_experts_that_do_not_divide_are_padded_and_get_no_token(x64: None) -> None:
    program = differentiate(layer(replace(RANDOM, count=6), batch=8))
    given = values(program)
    whole = run_numpy(program, given)
    plan = make_plan(program, Mesh.parse("2x4"), chip("v5e"), "batch:x,experts:y")
    assert [(p.dim, p.padded) for p in plan.paddings] == [("experts", 8)]
    got = simulate(plan.partitioned, pad_inputs(plan.program, given, 1e6))
    got = unpad_outputs(program, got)
    for n, x in whole.items():
        np.testing.assert_allclose(got[n], x, rtol=1e-9, atol=1e-12, err_msg=n)


def test_other_dims_of_one_axis_still_may_not_meet() -> None:
    program = layer(RANDOM, batch=8)
    for layout in ("batch:x,embd:x", "experts:x,embd:x", "batch:x,token:x"):
        with pytest.raises(LayoutError, match="meet in the tensor"):
            make_plan(program, Mesh.parse("2x4"), chip("v5e"), layout)


def test_microbatches_send_tokens_alike(x64: None) -> None:
    program = differentiate(layer(RANDOM, batch=8))
    made = zip(program.outputs, program.body.outputs, strict=True)
    sums = {n: v for n, v in made if n not in ("y", "balance")}
    body = Region(program.body.args, program.body.ops, tuple(sums.values()))
    program = replace(program, outputs=tuple(sums), body=body)
    given = values(program)
    parts = {n: given[n].reshape(4, 2, *given[n].shape[1:]) for n in ("x", "weight")}
    whole = run_numpy(program, given)
    # A mean over the batch is a sum of parts of it, and so is every gradient.
    got = run_numpy(split_batch(program, 4), given | parts)
    for n, x in whole.items():
        np.testing.assert_allclose(got[n], x, rtol=1e-9, atol=1e-12, err_msg=n)


# Sending


def sent(e: Experts, tokens: int, seed: int = 0, key: int = 7) -> dict[str, np.ndarray]:
    """What goes where of 64 groups."""
    g = Graph("sent")
    x = g.data("x", (Dim("batch", 64), Dim("token", tokens), Dim("embd", 8)), "f64")
    gate = g.parameter("gate", (x.dim("embd"), e.experts), "f64")
    routes = route(x, gate, e, g.data("seed", (), "u32"))
    program = g.build({"used": routes.dispatch.cast("i32"), "weight": routes.combine})
    return run_numpy(program, values(program, seed) | {"seed": np.asarray(key, np.uint32)})


@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.7, 8.0])
def test_an_expert_takes_the_first_tokens_that_chose_it_and_no_more(
    x64: None, capacity: float
) -> None:
    e = replace(BASE, routing=replace(ALL, capacity=capacity))
    out = sent(e, 16)
    slots = out["used"].shape[-1]
    assert slots == max(1, min(16, int(16 * capacity / 4)))
    filled = out["used"].sum(1)  # [batch, experts, slot]
    assert set(np.unique(filled)) <= {0, 1}
    assert (np.diff(filled, axis=-1) <= 0).all()  # from the first slot on
    if capacity == 8.0:  # none is too many
        assert (out["used"].sum((2, 3)) == 2).all()
        np.testing.assert_allclose(out["weight"].sum((2, 3)), 1.0)


def test_second_choices_come_at_random_as_often_as_their_gate_says(x64: None) -> None:
    wide = replace(BASE, count=2, routing=Routing(capacity=8.0, policy="random", threshold=0.5))
    seconds, gates = [], []
    for key in range(20):
        out = sent(wide, 16, key=key)
        seconds.append((out["used"].sum((2, 3)) == 2).mean())
    every = sent(replace(wide, routing=replace(wide.routing, policy="all")), 16)["weight"]
    gates = every.sum(3).min(2)  # that of the second of two experts
    assert np.mean(seconds) == pytest.approx(np.minimum(1.0, gates / 0.5).mean(), abs=0.01)
    assert len(set(seconds)) > 10


def test_a_switch_samples_by_its_probabilities(x64: None) -> None:
    e = replace(BASE, gating="switch", choices=1, routing=Routing(8.0, switch="sample"))
    chosen = np.mean([sent(e, 16, key=k)["used"].sum(3) for k in range(40)], 0)
    p = np.mean([sent(e, 16, key=k)["weight"].sum(3) for k in range(40)], 0)
    # The weight is the probability, so its mean is that times how often it was chosen.
    often = chosen > 0.2
    np.testing.assert_allclose(chosen[often], (p / np.maximum(chosen, 1e-9))[often], atol=0.35)
    assert np.abs(chosen - p / np.maximum(chosen, 1e-9))[often].mean() < 0.08


def test_what_trembles_in_training_does_not_in_evaluation() -> None:
    e = Experts(gating="switch", choices=1, dropout=0.1)
    assert e.draws and not e.evaluation.draws
    assert e.evaluation.routing.capacity == 2.0
    assert Experts().draws and Experts().evaluation.draws  # a policy may be random in both


def test_groups_divide_a_sequence() -> None:
    assert [Experts(group=n).grouped(24) for n in (1, 5, 9, 100)] == [1, 4, 8, 24]
    assert Experts(count=16).slots(1024) == 80
    assert Experts(count=16, least=4).slots(8) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating": "hash"}, "gating 'hash'; one of top_2, top_n, switch, ntlb"),
        ({"routing": Routing(policy="some")}, "policy 'some'; one of all, none"),
        ({"evaluating": Routing(switch="any")}, "switch policy 'any'; one of argmax"),
        ({"choices": 5}, "chooses 1 to 4 of 4, not 5"),
    ],
)
def test_what_makes_no_layer_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NeoccError, match=message):
        check_experts(replace(BASE, **change))
