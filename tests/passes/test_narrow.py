"""What only products read is rounded where the chip rounds it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models import gpt
from neocc.cost.hardware import chip
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.program import Program
from neocc.ir.text import parse_program, print_program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.narrow import narrow_products
from neocc.passes.simplify import simplify
from tests.numpy_executor import run_numpy
from tests.random_programs import inputs_for

V5E = chip("v5e")
TINY = gpt.Config("tiny", 3, 16, 2, vocab=32, seq=8, batch=4, dtype="f32")


def stacks(program: Program) -> list[str]:
    """Types of what the loops keep."""
    loops = [op for op in program.body.ops if op.kind == "repeat"]
    return [str(v.type) for op in loops for v in op.results[op.attrs["carries"] :]]


@pytest.mark.parametrize("kernel", ["fused", "unfused"])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_off_the_chip_a_narrowed_step_is_the_same_to_the_bit(
    kernel: str, recompute: bool | None
) -> None:
    program = simplify(gpt.train_step(replace(TINY, attention_kernel=kernel, recompute=recompute)))
    narrow = narrow_products(program, V5E)
    verify(narrow)
    assert print_program(parse_program(print_program(narrow))) == print_program(narrow)
    assert (narrow.inputs, narrow.outputs) == (program.inputs, program.outputs)
    inputs = inputs_for(program, np.random.default_rng(0))
    made = run_numpy(narrow, inputs)
    for name, array in run_numpy(program, inputs).items():
        np.testing.assert_array_equal(array, made[name], err_msg=name)


def test_every_product_multiplies_bf16_and_makes_f32() -> None:
    program = narrow_products(simplify(gpt.train_step(TINY)), V5E)
    for op in program.body.walk():
        if op.kind in ("einsum", "attention", "attention_grad"):
            assert {v.type.dtype for v in op.operands[:2]} == {"bf16"}
            assert op.results[0].type.dtype == "f32"


def test_stacks_that_only_products_read_are_kept_narrow_and_others_wide() -> None:
    kept = stacks(narrow_products(simplify(gpt.train_step(replace(TINY, recompute=False))), V5E))
    heads = [t for t in kept if "heads" in t and "lse" not in t and "seq" in t]
    assert [t.split("[")[0] for t in heads if "head_dim" in t] == ["bf16", "bf16", "bf16", "f32"]


def test_what_is_read_wide_as_well_stays_wide() -> None:
    batch, embd, mlp, layers = Dim("batch", 2), Dim("embd", 3), Dim("mlp", 4), Dim("layers", 2)
    g = Graph("both")
    x, w = g.data("x", [batch, embd], "f32"), g.data("w", [layers, embd, mlp], "f32")

    def step(x, slices):
        y = b.einsum(x, slices["w"], "batch mlp")
        return b.einsum(y, slices["w"], "batch embd") + x

    out = b.repeat(layers, step, x, {"w": w})
    program = narrow_products(simplify(g.build({"out": out})), V5E)
    (loop,) = [op for op in program.body.ops if op.kind == "repeat"]
    assert [v.type.dtype for v in loop.operands] == ["f32", "bf16"]
    assert [v.type.dtype for v in loop.results] == ["f32"]


def test_a_gpu_keeps_its_f32() -> None:
    program = simplify(gpt.train_step(TINY))
    assert narrow_products(program, chip("h100")) is program
