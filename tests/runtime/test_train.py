"""Training on a mesh: the initial state, the losses of every mesh and layout, donated buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.train_curves import LAYOUTS, batches, curve, free_links, reference, wide
from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.builder import Graph
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.nn import Experts, Routing
from neocc.passes.partition.simulate import simulate
from neocc.passes.partition.verify import verify_partitioned
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.train import Diverged, Run, partition_init

V5E = chip("v5e")
FREE = free_links(V5E)  # links that cost nothing: a plan for them cuts all it can
SMALL = gpt.Config(
    "small", 1, 32, 4, vocab=256, seq=32, batch=8, dtype="f32", lr=3e-3, warmup=5, steps=40
)
DROPS = replace(SMALL, embed_dropout=0.1, attn_dropout=0.2, res_dropout=0.1)


def plan_of(config: gpt.Config, mesh: str, layout: str = "") -> Plan:
    return make_plan(simplify(gpt.train_step(config)), Mesh.parse(mesh), V5E, layout)


def test_a_plan_that_cuts_all_it_can_follows_one_device():
    base = reference(SMALL, 40)
    found = curve(SMALL, "2x4", 40, FREE, "seq:y")
    moves = {c.kind for c in found.plan.collectives}
    assert moves >= {"slice", "all_gather", "all_reduce"}, f"this plan says little: {moves}"
    assert found.off(base) < 1e-4
    assert base[-5:].mean() < 0.8 * base[0]


def test_one_device_follows_the_reference_executor():
    assert curve(SMALL, "1x1", 10, V5E).off(reference(SMALL, 10)) < 1e-6


def test_dropout_masks_are_the_same_on_every_mesh():
    base = reference(DROPS, 8)
    assert abs(base[-1] / reference(SMALL, 8)[-1] - 1) > 1e-4  # it does something
    assert curve(DROPS, "8x1", 8, FREE).off(base) < 1e-5


@pytest.mark.parametrize(
    ("mesh", "layout", "dim"), [("8x1", "vocab:x", "vocab"), ("8x1", "heads:x", "heads")]
)
def test_a_dim_that_does_not_divide_trains_alike(mesh: str, layout: str, dim: str):
    odd = replace(SMALL, vocab=259)
    found = curve(odd, mesh, 10, V5E, layout)
    assert dim in [p.dim for p in found.plan.paddings]
    assert found.off(reference(odd, 10)) < 1e-5


SENT = replace(
    SMALL, layers=2, moe_layers=(1,), experts=Experts(8, 64, group=16, routing=Routing(1.0))
)


def test_a_mixture_of_experts_trains_alike_where_tokens_travel_to_it():
    base = curve(SENT, "1x1", 15, V5E)
    found = curve(SENT, "2x4", 15, V5E, "batch:x,batch:y,experts:y")
    assert "all_to_all" in {c.kind for c in found.plan.collectives}
    assert found.off(base.losses) < 1e-4
    assert base.losses[-3:].mean() < 0.9 * base.losses[0]


@pytest.mark.slow
def test_in_64_bits_a_mixture_of_experts_agrees_to_rounding(x64: None):
    config = wide(SENT)
    base = reference(config, 20)
    layouts = ["batch:x,batch:y,experts:y", "batch:x,experts:x,expert_hidden:y", "experts:x"]
    for layout in layouts:
        assert curve(config, "2x4", 20, V5E, layout).off(base) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "layout"), LAYOUTS)
def test_hand_layouts_follow_one_device(mesh: str, layout: str):
    assert curve(SMALL, mesh, 20, V5E, layout).off(reference(SMALL, 20)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4", "4x2", "8x1", "2x2x2"])
def test_in_64_bits_the_meshes_agree_to_rounding(mesh: str, x64: None):
    config = wide(DROPS)
    assert curve(config, mesh, 20, FREE).off(reference(config, 20)) < 1e-12


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """On 2x4, with padding: a vocab of 259 cut by four."""
    config = replace(SMALL, vocab=259)
    yield Run(plan_of(config, "2x4", "batch:x,vocab:y"), gpt.init(config), seed=3)


def test_state_is_donated(run: Run):
    before = run.state
    pointers = [
        b.data.unsafe_buffer_pointer() for a in before.values() for b in a.addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)  # no array shares its memory with another
    run.step(batches(SMALL).at(0))
    assert all(a.is_deleted() for a in before.values())
    assert not any(a.is_deleted() for a in run.state.values())
    after = {
        b.data.unsafe_buffer_pointer() for a in run.state.values() for b in a.addressable_shards
    }
    kept = len(after & set(pointers)) / len(pointers)
    assert kept > 0.9, f"only {kept:.0%} of the state stays where it was"


def test_state_lies_as_the_step_takes_it(run: Run):
    names = [i.name for i in run.program.inputs]
    wanted = dict(zip(names, run.lowered.in_shardings, strict=True))
    for name, array in run.state.items():
        assert array.sharding.is_equivalent_to(wanted[name], array.ndim), name
    assert run.state["wte"].addressable_shards[0].data.shape == (65, 32)


def test_padding_of_the_state_stays_zero(run: Run):
    for name in ("wte", "wte.m", "wte.v"):
        array = np.asarray(run.state[name])
        assert array.shape == (260, 32)
        assert not array[259:].any()


def test_an_array_for_data_of_another_shape_is_refused(run: Run):
    data = batches(SMALL).at(0)
    with pytest.raises(NeoccError, match="input 'tokens' is"):
        run.step({**data, "tokens": np.zeros((9, 32), np.int32)})
    with pytest.raises(NeoccError, match="needs the input 'labels'"):
        run.step({"tokens": data["tokens"]})


@settings(max_examples=8)
@given(
    st.sampled_from(["8", "2x4", "4x2"]),
    st.sampled_from(["batch:x", "vocab:x", "embd:x", "heads:x,vocab:x", "mlp:x,vocab:x"]),
    st.sampled_from([61, 64, 7]),
    st.integers(0, 2**32 - 1),
)
def test_initial_values_are_the_same_on_every_mesh(mesh: str, layout: str, vocab: int, seed: int):
    """Also where heads or vocab are padded: the padding is zero, the rest as unpadded."""
    config = replace(gpt.TINY, vocab=vocab, layers=1)
    others = "".join(f",batch:{axis}" for axis in Mesh.parse(mesh).names[1:])
    plan = plan_of(config, mesh, layout + others)  # fully given: nothing to search
    start = partition_init(gpt.init(config), plan)
    verify_partitioned(start)
    step = plan.partitioned.program
    for info, value in step.named_inputs:
        if info.role != "data":
            assert start.program.output_value(info.name).type == value.type
    made = simulate(start, {"seed": np.array(seed, np.uint32)})
    wanted = run_program(gpt.init(config), {"seed": np.uint32(seed)})
    for name, array in wanted.items():
        full = np.zeros(made[name].shape, made[name].dtype)
        full[tuple(slice(0, n) for n in array.shape)] = array
        np.testing.assert_allclose(made[name], full, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_loss_that_is_not_finite_stops_the_run(run: Run):
    run.state = {**run.state, "ln_f.g": jax.numpy.full_like(run.state["ln_f.g"], np.nan)}
    records = run.train(batches(SMALL), 5, first=6)
    assert next(records).step == 7
    with pytest.raises(Diverged, match="step 7: the loss is nan"):
        next(records)


def broken(init: Program, **outputs: str) -> Program:
    return replace(init, outputs=tuple(outputs.get(n, n) for n in init.outputs))


def test_initial_values_for_another_model_are_refused():
    plan = plan_of(gpt.TINY, "1x1")
    with pytest.raises(NeoccError, match="only one of them knows wpe, wqe"):
        partition_init(broken(gpt.init(gpt.TINY), wpe="wqe"), plan)
    with pytest.raises(NeoccError, match=r"makes 'wte' as f32\[vocab=61.*takes f32\[vocab=64"):
        partition_init(gpt.init(replace(gpt.TINY, vocab=61)), plan)


def test_a_program_without_a_loss_is_refused():
    g = Graph("lossless")
    plan = make_plan(g.build({"n": g.state("n", (), "i32") + 1}), Mesh.parse("1x1"), V5E)
    with pytest.raises(NeoccError, match="'lossless' has no output 'loss'"):
        Run(plan, gpt.init(gpt.TINY))


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(LayoutError, match="needs 16 devices; there are 8"):
        Run(plan_of(gpt.TINY, "4x4"), gpt.init(gpt.TINY))
