"""Fused attention: FLOPs of the tiles that run, seconds, and what a model's formula counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import gpt
from neocc.cost.attention import KERNEL, PORTABLE, attention_flops, attention_seconds, unfused_flops
from neocc.cost.hardware import chip
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.program import Op
from neocc.ir.types import Dim
from neocc.passes.plan import model_flops

V5E = chip("v5e")


def op(causal: bool = True, window: int | None = None, seq: int = 4096) -> Op:
    d = [Dim("batch", 4), Dim("seq", seq), Dim("heads", 16), Dim("head_dim", 128)]
    g = Graph("op")
    q = g.data("q", d, "bf16")
    k = g.data("k", d, "bf16").rename(seq="memory")
    b.fused_attention(q, k, k, "seq", "memory", "head_dim", causal, window)
    return g.ops[-1]


def whole(dim: str) -> int:
    return 1


def cut(dim: str) -> int:
    return 4 if dim == "seq" else 1


def test_flops_are_those_of_the_tiles_that_hold_a_visible_score() -> None:
    full = 2 * 2 * 4 * 16 * 4096**2 * 128
    assert attention_flops(op(causal=False), whole) == full == unfused_flops(op())
    assert attention_flops(op(), whole) == full * (8 * 9 // 2) / 8**2
    assert attention_flops(op(window=512), whole) == full * (8 + 7) / 8**2
    assert attention_flops(op(window=1), whole) == full * 8 / 8**2


def test_devices_of_a_cut_sequence_run_one_program_and_skip_nothing() -> None:
    assert attention_flops(op(), cut) * 4 == unfused_flops(op())


def test_a_kernel_is_bound_by_products_where_the_loop_passes_scores_through_memory() -> None:
    kernel = attention_seconds(V5E, op(), whole, KERNEL)
    assert kernel == pytest.approx(
        attention_flops(op(), whole) / (V5E.flops("bf16") * V5E.matmul_efficiency)
    )
    loop = attention_seconds(V5E, op(), whole, PORTABLE)
    assert 2 * kernel < loop
    assert attention_seconds(V5E, op(window=256), whole, PORTABLE) < 0.5 * loop


def test_model_flops_do_not_depend_on_the_kernel() -> None:
    for c in (gpt.PRESETS["gpt2-small"], replace(gpt.PRESETS["gpt2-medium"], seq=512)):
        counts = {
            k: model_flops(gpt.train_step(replace(c, attention_kernel=k)).body) for k in gpt.KERNELS
        }
        assert counts["fused"] == counts["unfused"]
