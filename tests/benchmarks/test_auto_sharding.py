"""neocc beside other planners: the step that they plan is neocc's, and all are judged alike."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import auto_sharding_step as plain
from benchmarks.auto_sharding import auto_log, reason
from benchmarks.auto_sharding_cases import Case, by_plan, by_rules, input_dims, neocc_rules, planned
from benchmarks.auto_sharding_judge import COSTED, seconds, sent
from models import gpt
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import chip
from neocc.cost.topology import topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.lower.hlo import Collective
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close

CASE = Case("tiny", Mesh.parse("2x2"), batch=4, seq=16)
QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
PICKED = "batch:y;embed_sequence:y;heads:x;sequence:x"


def test_the_plain_step_computes_what_neocc_computes() -> None:
    c = replace(CASE.plain, seq=8, batch=2, warmup=1)
    rng = np.random.default_rng(0)
    state = run_numpy(gpt.init(c), {"seed": np.uint32(1)})
    for n, a in state.items():
        noise = 0.1 * rng.standard_normal(a.shape)
        if a.dtype == np.float32:
            state[n] = a + (noise * noise if n.endswith(".v") else noise).astype(np.float32)
    state["step"] = np.int32(3)
    tokens, labels = rng.integers(0, c.vocab, (2, c.batch, c.seq)).astype(np.int32)
    wanted = run_numpy(gpt.train_step(c), {**state, "tokens": tokens, "labels": labels})
    plain.check(asdict(c))
    step = jax.jit(partial(plain.train_step, asdict(c), True, lambda name, x: x))
    after, told = step.lower(state, tokens, labels).compile(QUICK)(state, tokens, labels)
    assert set(after) | set(told) == set(wanted)
    for n, value in (after | told).items():
        assert_close(value, wanted[n], 1e-5)


def test_the_plain_step_has_neoccs_inputs() -> None:
    state, tokens, _ = plain.arguments(asdict(CASE.plain))
    inputs = {i.name: v.type for i, v in gpt.train_step(CASE.plain).named_inputs}
    assert set(state) | {"tokens", "labels"} == set(inputs)
    for name, array in (state | {"tokens": tokens}).items():
        assert array.shape == inputs[name].shape


def test_what_the_plain_step_leaves_out_is_refused() -> None:
    with pytest.raises(SystemExit, match="dropout"):
        plain.check(asdict(replace(CASE.plain, attn_dropout=0.1)))


def test_layouts_by_rules_and_by_plan_say_the_same() -> None:
    """Of a layout that leaves nothing open, but for the table of positions."""
    rules = "batch:x;heads:y;intermediate_expanded:y;vocab:y"
    mine, theirs = by_plan(planned(CASE, CASE.plain, neocc_rules(rules))), by_rules(CASE, rules)
    assert mine["values"] == theirs["values"]
    assert mine["inputs"] == theirs["inputs"]
    assert set(mine["inputs"]) == {n for n, _ in input_dims(CASE.plain)}


def test_the_table_of_positions_has_a_dim_of_its_own_in_mesh_tensorflow() -> None:
    assert neocc_rules(PICKED) == "batch:y,heads:x,seq:x"
    found = by_rules(CASE, PICKED)
    assert found["inputs"]["wpe.m"] == [["y"], []]
    assert found["inputs"]["tokens"] == [["y"], ["x"]]
    assert found["values"]["qkv"] == [["y"], ["x"], ["x"], []]


def test_auto_shardings_own_log() -> None:
    log = "a] Solver took 7188 ms\nW] could only find a non-optimal solution within\n"
    log += "a] Solver took 115114 ms\na] Auto Sharding took 123 seconds\n"
    wanted = {"seconds": 123, "solver_seconds": [7.188, 115.114], "not_proved": 1}
    assert auto_log(log) == wanted
    with pytest.raises(NeoccError, match="does not tell"):
        auto_log("nothing")


def test_a_failure_is_told_by_its_cause() -> None:
    log = "begin\nRESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20G of 15G.\nend"
    assert reason(log) == "Ran out of memory in hbm. Used 20G of 15G."
    assert reason("first\nlast\n\n") == "last"


LAID = topology(chip("v5e"), (2, 4))
ALL = (tuple(range(8)),)
ON_Y = ((0, 1, 2, 3), (4, 5, 6, 7))
ON_X = ((0, 4), (1, 5), (2, 6), (3, 7))
PARTS = ((0, 1), (2, 3), (4, 5), (6, 7))


def collective(kind: str, groups: tuple[tuple[int, ...], ...], large: int) -> Collective:
    """With ``large`` bytes where it is largest."""
    n = len(groups[0])
    before = large // n if kind == "all-gather" else large
    after = large // n if kind == "reduce-scatter" else large
    return Collective(
        kind, "c", "main", "f32", "f32", (before // 4,), (after // 4,), before, after, groups,
        None, 1, "", None, False, False,
    )  # fmt: skip


@given(st.integers(1, 1000).map(lambda n: 32 * n), st.sampled_from([ALL, ON_X, ON_Y, PARTS]))
def test_an_all_reduce_sends_what_a_scatter_and_a_gather_send(large: int, groups) -> None:
    both = sum(sent(collective(k, groups, large)) for k in ("reduce-scatter", "all-gather"))
    assert math.isclose(sent(collective("all-reduce", groups, large)), both)


def test_only_pairs_that_differ_send() -> None:
    pairs = (*((i, i) for i in range(4)), (4, 5), (5, 4), (6, 7), (7, 6))
    assert sent(collective("collective-permute", pairs, 64)) == 32
    assert sent(collective("all-to-all", ON_Y, 64)) == 48


@pytest.mark.parametrize("kind", COSTED)
def test_one_axis_is_priced_as_the_cost_model_does(kind: str) -> None:
    groups = ((0, 1), (1, 2), (2, 3), (3, 0)) if kind == "collective-permute" else ON_Y
    wanted = collective_time(COSTED[kind], 4096, LAID.links()[1])
    assert seconds(collective(kind, groups, 4096), LAID) == wanted


def test_a_gather_over_two_axes_is_two_gathers() -> None:
    x, y = LAID.links()
    wanted = collective_time("all_gather", 2048, y) + collective_time("all_gather", 4096, x)
    assert math.isclose(seconds(collective("all-gather", ALL, 4096), LAID), wanted)


def test_groups_that_are_part_of_an_axis_are_priced_as_the_whole() -> None:
    whole = seconds(collective("all-reduce", ON_Y, 4096), LAID)
    assert seconds(collective("all-reduce", PARTS, 4096), LAID) == whole
