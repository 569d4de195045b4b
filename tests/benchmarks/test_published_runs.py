"""Published runs: FLOP conventions, plans as rules, and steps put together from layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.dense_models import Dense
from benchmarks.published_runs import Errors, Result, fitted, order
from benchmarks.run_rows import (
    Unpredicted,
    case_of,
    convention_of,
    flops_of_step,
    measured_step,
    selective_cases,
)
from benchmarks.stage_cost import Plan, cost_of
from benchmarks.step_time import Run, layers_of_stages, predict
from benchmarks.training_systems import MEGATRON_2021, MEGATRON_2022, TORCHTITAN, ZERO_3
from neocc.cost.hardware import Chip, chip
from neocc.cost.topology import AxisLink, topology

A100 = chip("a100")
SMALL = Dense(4, 1024, 8, 8, 128, 4096, 51200, 512)
LLAMA = Dense(4, 1024, 8, 2, 128, 2816, 51200, 512, True, True, True, False)
ALONE = (AxisLink(()),) * 3


def links(data: int = 1, context: int = 1, tensor: int = 1) -> tuple[AxisLink, ...]:
    return topology(A100, (data, context, tensor)).links()


ROW = {
    "source": "Megatron-LM SC'21 Table 2",
    "model": {
        "name": "GPT",
        "layers": 2,
        "d_model": 8,
        "heads": 2,
        "d_ff": 32,
        "vocab": 100,
        "seq": 16,
    },
    "global_batch": 4,
    "hardware": "A100 (Selene)",
    "chips": 2,
    "tp": 2,
    "microbatch": 2,
    "recompute": "full",
    "measured": {"tflops_per_chip": 1e-6},
    "flops_convention": "hardware (recomputed forward counted)",
}
TINY = Dense(2, 8, 2, 2, 4, 32, 100, 16)


# FLOP conventions


def test_conventions_count_by_hand():
    # 64 tokens; 2 layers of 12 x 64 weights, 800 of the table; scores: 64 tokens x 16 positions.
    weights, table, tokens = 2 * 12 * 8 * 8, 100 * 8, 4 * 16
    scores = 12 * 2 * tokens * 16 * 8
    full = 6 * tokens * (weights + table) + scores
    assert flops_of_step(TINY, 4, "model, full") == full
    assert flops_of_step(TINY, 4, "model, half") == full - scores / 2
    again = 2 * tokens * weights + scores / 3  # a forward pass of the layers
    assert flops_of_step(TINY, 4, "hardware") == full + again
    with pytest.raises(ValueError, match="unknown FLOP convention 'all'"):
        flops_of_step(TINY, 4, "all")


def test_the_hardware_convention_is_megatrons_formula():
    gpt = Dense(96, 12288, 96, 96, 128, 49152, 51200, 2048)
    b, s, layers, h, v = 1536, 2048, 96, 12288, 51200
    published = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert flops_of_step(gpt, b, "hardware") == pytest.approx(published)


@pytest.mark.parametrize(
    ("text", "convention"),
    [
        ("hardware (recomputed forward counted, i.e. 8ND)", "hardware"),
        ("model 6ND + causal(half) attention", "model, half"),
        ("model 6ND + full attention (older MaxText)", "model, full"),
        ("model", "model, full"),
    ],
)
def test_conventions_are_read_from_rows(text: str, convention: str):
    assert convention_of({"flops_convention": text}) == convention


def test_step_time_goes_before_tokens_and_tokens_before_flops():
    flops = {"tflops_per_chip": 1e-6}
    step = measured_step(ROW, TINY)[0]
    assert step == pytest.approx(flops_of_step(TINY, 4, "hardware") / (1e6 * 2))
    tokens = {**ROW, "measured": {"tokens_per_s_per_chip": 8.0, **flops}}
    assert measured_step(tokens, TINY)[0] == 4 * 16 / (8 * 2)
    both = {**ROW, "measured": {"step_time_s": 3.0, "tokens_per_s_per_chip": 8.0, **flops}}
    assert measured_step(both, TINY)[0] == 3.0


# Rows


def test_a_row_becomes_the_run_that_it_states():
    case = case_of(ROW)
    (run,) = case.runs
    assert (run.tensor, run.data, run.batch, run.microbatches) == (2, 1, 2, 2)
    assert run.system is MEGATRON_2021
    assert run.recompute == "full"
    assert case.family == "A100"
    assert case_of({**ROW, "fsdp": 2, "tp": 1}).runs[0].system is ZERO_3


def test_what_a_row_leaves_open_is_tried():
    case = case_of({**ROW, "microbatch": None})
    assert [(r.batch, r.microbatches) for r in case.runs] == [(1, 4), (2, 2), (4, 1)]
    assert case.opened == "microbatch"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ep": 8}, "mixture of experts"),
        ({"model": {**ROW["model"], "vocab": None}}, "the row lacks vocab"),
        ({"measured": {"oom": True}}, "out of memory"),
        ({"global_batch": None}, "no global batch"),
        ({"hardware": "abacus"}, "no chip for 'abacus'"),
        ({"recompute": "some of it"}, "policy 'some of it' is not known"),
        ({"source": "a rumour"}, "nothing is known of the system"),
    ],
)
def test_a_row_that_is_left_out_says_why(change: dict, why: str):
    with pytest.raises(Unpredicted, match=why):
        case_of({**ROW, **change})


# Layers under a plan


@pytest.mark.parametrize("on", [A100, chip("v5p")], ids=["a100", "v5p"])
@pytest.mark.parametrize("model", [SMALL, LLAMA], ids=["gpt", "llama"])
def test_one_device_sends_nothing_and_computes_three_times_forward(model: Dense, on: Chip):
    cost = cost_of("layer", model, 8, on, Plan(attention=None), ALONE)
    assert not cost.forward.sent and not cost.backward.sent
    assert cost.backward.product == pytest.approx(2 * cost.forward.product, rel=0.05)
    flops = 2 * 8 * model.seq * model.layer_weights
    assert cost.forward.product >= flops / (on.flops("bf16") * on.matmul_efficiency)
    names = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if model.gated else set())
    assert set(cost.forward.products) == names


def test_tensor_parallelism_sends_what_megatron_sends():
    tensor = cost_of("layer", SMALL, 8, A100, Plan(tensor=4), links(tensor=4))
    activation = 8 * SMALL.seq * SMALL.embd * 2
    kinds = [(s.kind, s.bytes) for p in (tensor.forward, tensor.backward) for s in p.sent]
    assert kinds == [("all_reduce", activation)] * 4
    cut = cost_of("layer", SMALL, 8, A100, Plan(tensor=4, sequence=True), links(tensor=4))
    forward = sorted(s.kind for s in cut.forward.sent if s.bytes == activation)
    assert forward == ["all_gather"] * 2 + ["reduce_scatter"] * 2
    backward = sorted(s.kind for s in cut.backward.sent if s.bytes == activation)
    assert backward == ["all_gather"] * 4 + ["reduce_scatter"] * 2  # two gathers are for weights
    alone = cost_of("layer", SMALL, 8, A100, Plan(), ALONE)
    assert tensor.forward.product < alone.forward.product / 3


def test_fsdp_gathers_every_matrix_both_ways_and_scatters_its_gradient():
    for data in (8, 24):  # 24 devices hold flat shards of dims that 24 does not divide
        cost = cost_of("layer", SMALL, 1, A100, Plan(data=data), links(data=data))
        matrices = [4 * 2 * SMALL.embd**2, 2 * 2 * SMALL.embd * SMALL.mlp]
        assert sum(s.bytes for s in cost.forward.sent) == sum(matrices)
        for kind in ("all_gather", "reduce_scatter"):
            sent = [s for s in cost.backward.sent if s.kind == kind]
            assert sum(s.bytes for s in sent) == sum(matrices)
            assert all(s.weight for s in sent)


def test_context_parallelism_gathers_keys_and_values_only():
    cost = cost_of("layer", LLAMA, 2, A100, Plan(context=2), links(context=2))
    kept = [s for s in cost.forward.sent if not s.weight]
    assert [s.kind for s in kept] == ["all_gather"] * 2
    assert {s.bytes for s in kept} == {2 * LLAMA.seq * LLAMA.kv_heads * LLAMA.head_dim * 2}


def test_a_narrow_dtype_makes_products_faster_and_casts_cost_memory():
    h100 = chip("h100")
    wide = cost_of("layer", LLAMA, 64, h100, Plan(), ALONE)
    narrow = cost_of("layer", LLAMA, 64, h100, Plan(low="f8"), ALONE)
    assert narrow.forward.product < 0.6 * wide.forward.product
    assert narrow.forward.traffic > wide.forward.traffic
    assert narrow.forward.core == wide.forward.core


def test_fused_attention_moves_no_scores_and_computes_half():
    stored = cost_of("layer", SMALL, 8, A100, Plan(attention=None), ALONE)
    fused = cost_of("layer", SMALL, 8, A100, Plan(), ALONE)
    assert fused.forward.core_traffic == 0 < stored.forward.core_traffic
    assert fused.forward.core < stored.forward.core


def test_the_ends_of_a_model_have_the_products_of_the_loss_only():
    head = cost_of("head", SMALL, 8, A100, Plan(), ALONE).forward
    assert set(head.products) == {"table", "grad"}
    assert not cost_of("embedding", SMALL, 8, A100, Plan(), ALONE).forward.products


# Steps


def run(**changes: object) -> Run:
    base = Run(SMALL, A100, MEGATRON_2021, data=1, batch=2, microbatches=8)
    return replace(base, **changes)


def test_layers_of_stages_add_up_and_the_ends_have_fewer():
    assert layers_of_stages(96, 8) == [12] * 8
    assert layers_of_stages(126, 8) == [15, *[16] * 6, 15]
    for layers, stages in [(126, 16), (105, 35), (7, 4), (5, 4)]:
        held = layers_of_stages(layers, stages)
        assert sum(held) == layers and len(held) == stages and min(held) >= 1


def test_recomputation_costs_a_forward_pass_and_the_selective_one_less():
    none, selective, full = (
        predict(run(recompute=r, system=MEGATRON_2022)) for r in ("none", "selective", "full")
    )
    assert none < selective < full < 4 / 3 * none * 1.05


def test_a_faster_matrix_unit_never_slows_a_step():
    assert predict(run(), 1.2) < predict(run(), 1.0) < predict(run(), 0.8)
    bound = replace(MEGATRON_2021, host=1.0)  # where launches bound it, it does not matter
    assert predict(run(system=bound), 1.2) == pytest.approx(predict(run(system=bound)), rel=0.01)


def test_gradients_behind_compute_cost_less():
    system = replace(TORCHTITAN, sharded=False)
    waits = replace(system, reduce_overlap=False)
    assert predict(run(data=8, system=system)) < predict(run(data=8, system=waits))


def test_the_published_order_of_ptd_and_zero_3():
    """arXiv 2104.04473 table 2: 175B on 1536 A100s, 141 against 44 TFLOP/s a GPU."""
    gpt = Dense(96, 12288, 96, 96, 128, 49152, 51200, 2048)
    ptd = Run(gpt, A100, MEGATRON_2021, 16, 1, 96, tensor=8, stages=12, recompute="full")
    zero = Run(gpt, A100, ZERO_3, 1536, 1, 1, fsdp=True, recompute="full")
    assert 2.5 < predict(zero) / predict(ptd) < 4.0


def test_megatrons_iterations_are_predicted():
    results = [Result(case, predict(case.runs[0])) for case in selective_cases()]
    assert Errors.of(r.error for r in results).worst < 0.08


# The report


def test_the_fit_finds_the_factor():
    assert fitted(lambda e: abs(e - 0.83)) == 0.83


def test_errors_are_of_absolute_values():
    errors = Errors.of([-0.3, 0.1, 0.2])
    assert (errors.mean, errors.median, errors.worst) == (pytest.approx(0.2), 0.2, 0.3)
    assert str(Errors.of([])) == "no row"


def test_order_compares_plans_of_one_model_only():
    case = case_of(ROW)
    fast = replace(case, plan="fast", measured=1.0)
    slow = replace(case, plan="slow", measured=2.0)
    other = replace(slow, model="another")
    assert order([Result(fast, 1.1), Result(slow, 1.2), Result(other, 0.1)]).kept == 1
    assert len(order([Result(fast, 1.3), Result(slow, 1.2)]).broken) == 1
    near = replace(slow, measured=1.01)
    assert order([Result(fast, 1.3), Result(near, 1.2)]) == order([])
