"""Sequences in the zig-zag order of a ring through a whole program: the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.ir import builder as b
from neocc.ir.builder import Graph, Tensor
from neocc.ir.ops import ATTENTION
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.ir.verify import verify
from neocc.passes.autodiff import differentiate
from neocc.passes.zigzag import Reorder, equivariant, in_zigzag
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for, programs

BATCH, SEQ, MEMORY, EMBD = Dim("batch", 2), Dim("seq", 8), Dim("memory", 8), Dim("embd", 3)


def same(program: Program, other: Program) -> None:
    verify(other)
    inputs = inputs_for(program, np.random.default_rng(0))
    right = run_numpy(program, inputs)
    for name, array in run_numpy(other, inputs).items():
        assert_close(array, right[name])


@given(st.data())
@settings(max_examples=150)
def test_what_is_equivariant_is_the_same_in_any_order_of_a_dim(data: st.DataObject) -> None:
    """Of random programs: where every op says so, its dim in zig-zag order gives the same."""
    program = data.draw(programs(zero=False))
    if any(op.kind in ATTENTION for op in program.body.walk()):
        return  # which is told of the order, and minds it
    for name in {n for v in program.body.args for n in v.type.names}:
        dims = closed(program, name)
        (size,) = {d.size for v in program.values() for d in v.type.dims if d.name in dims}
        if all(equivariant(op, dims) for op in program.body.walk()):
            for devices in (n for n in range(1, size) if size % (2 * n) == 0):
                same(program, Reorder(frozenset(dims), devices).program(program))


def closed(program: Program, name: str) -> set[str]:
    """A dim and those it is renamed to."""
    found, size = {name}, -1
    while size < len(found):
        size = len(found)
        for op in program.body.walk():
            if op.kind == "rename" and found & {op.attrs["dim"], op.attrs["to"]}:
                found |= {op.attrs["dim"], op.attrs["to"]}
    return found


def attending(
    beside: Callable[[Tensor], Tensor], causal: bool = True, window: int | None = None
) -> Program:
    g = Graph("attending")
    x = g.parameter("x", (BATCH, SEQ, EMBD), "f64")
    y = beside(x)
    keys = (y * 2.0).rename(seq="memory")
    out, _ = b.fused_attention(y, keys, b.sin(keys), SEQ, MEMORY, EMBD, causal, window, 0.5)
    loss = (out * x).sum(BATCH, SEQ, EMBD)
    return differentiate(g.build({"loss": loss, "out": out}))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_attention_beside_ops_that_do_not_mind_the_order(devices: int) -> None:
    program = attending(lambda x: b.tanh(x) + b.iota(x, SEQ).cast("f64") * x.sum(SEQ))
    found = in_zigzag(program, devices)
    assert found is not None
    kinds = Counter(op.kind for op in found.body.walk())
    assert kinds["reorder"] == 4  # x, iota, out and the gradient of x
    assert all(op.attrs["zigzag"] == devices for op in found.body.walk() if op.kind in ATTENTION)
    same(program, found)


MINDS = {
    "a running sum": lambda x: x.cumsum("seq"),
    "a shift": lambda x: x.shift("seq", 1),
    "a slice": lambda x: x.slice("seq", 0, Dim("some", 4)).pad("some", 2, SEQ),
    "parts": lambda x: x.split("seq", Dim("hi", 4), Dim("lo", 2)).sum("lo").sum("hi") + x,
    "rows by number": lambda x: x + b.gather(x.sum(BATCH, EMBD), b.iota(x, EMBD), "seq"),
    "noise by place": lambda x: (
        x + b.random(b.iota(x, EMBD).sum("embd").cast("u32"), (BATCH, SEQ), 1, "normal", "f64")
    ),
}


@pytest.mark.parametrize("name", MINDS)
def test_declines_where_an_op_minds_the_order(name: str) -> None:
    assert in_zigzag(attending(MINDS[name]), 2) is None


def test_declines_where_no_ring_has_that_order() -> None:
    assert in_zigzag(attending(b.tanh, causal=False), 2) is None
    assert in_zigzag(attending(b.tanh, window=3), 2) is None
    assert in_zigzag(attending(b.tanh), 3) is None  # 8 in 6 halves
    once = in_zigzag(attending(b.tanh), 2)
    assert once is not None and in_zigzag(once, 2) is None


@pytest.mark.parametrize("fields", [{}, {"positions": "rotary"}])
def test_a_training_step_is_the_same_and_swaps_in_no_layer(fields: dict[str, str]) -> None:
    """Inputs and outputs with a sequence are reordered, once each; of a layer only iota is."""
    wide = {"dtype": "f64", "param_dtype": "f64", "ada_epsilon1": 1e-6}
    config = replace(gpt.PRESETS["tiny"], seq=8, layers=2, vocab=16, **wide, **fields)
    program = gpt.train_step(config)
    found = in_zigzag(program, 2)
    assert found is not None
    ends = [v for v in (*program.body.args, *program.body.outputs) if v.type.has("seq")]
    places = [op for op in program.body.walk() if op.kind == "iota" and op.result.type.has("seq")]
    reorders = [op for op in found.body.walk() if op.kind == "reorder"]
    assert ends and len(reorders) == len(ends) + len(places)
    assert bool(places) == ("positions" in fields)
    same(program, found)


def test_dropout_is_by_place_and_declines() -> None:
    program = gpt.train_step(replace(gpt.PRESETS["tiny"], res_dropout=0.1))
    assert in_zigzag(program, 2) is None
