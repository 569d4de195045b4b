"""Attention with keys and values that go round: the numbers, FLOPs and permutes of the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.mesh import Mesh, Strategy
from neocc.ir.ops import ATTENTION, attention_tiles
from neocc.ir.ops.attention import circle_of, ring_axis, ring_sends
from neocc.ir.ops.attention_ring import firsts, low_half
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.lower.audit import pair
from neocc.lower.hlo import HloFacts, read_hlo
from neocc.lower.jax import lower
from neocc.passes.autodiff import differentiate
from neocc.passes.layout.algebra import Assignment
from neocc.passes.pad import pad_program
from neocc.passes.partition import Partitioned, apply, simulate, verify_partitioned
from neocc.passes.plan import local_flops, make_plan
from neocc.passes.zigzag import in_zigzag
from tests.lower.collectives.devices import QUICK
from tests.numpy_executor import run_numpy
from tests.random_assignments import random_assignment
from tests.random_programs import assert_close, inputs_for


def attending(
    seq: int,
    memory: int,
    causal: bool,
    window: int | None = None,
    dtype: str = "f64",
    group: int = 2,
) -> Program:
    """Loss and gradients of attention whose queries share keys, in pairs if nothing else is said:
    then keys go round in the gradient; where each has its own, queries do."""
    dims = batch, rows, heads, _, features = (
        Dim("batch", 4),
        Dim("seq", seq),
        Dim("kv", 2),
        Dim("group", group),
        Dim("head_dim", 3),
    )
    keys = Dim("memory", memory)
    g = Graph("attending")
    x = g.parameter("x", dims, dtype)
    y = g.parameter("y", (batch, heads, keys, features), dtype)
    z = g.parameter("z", (keys, batch, heads, features), dtype)
    out, lse = b.fused_attention(x, y, z, rows, keys, features, causal, window, 0.5)
    made = {"loss": (out * b.sin(x)).sum(*x.dims), "out": out}
    # The loss alone has gradients; lse is an output of the other programs.
    return differentiate(g.build(made)) if dtype == "f64" else g.build({**made, "lse": lse})


def on_rings(program: Program, mesh: Mesh, *axes: str | None) -> Partitioned:
    """Attention and its gradient under one strategy, all else on every device."""
    found = random_assignment(program, mesh, lambda options: options[0])
    chosen = dict(found.strategies)
    for op in program.body.ops:
        if op.kind in ATTENTION:
            chosen[op] = Strategy(axes)
    partitioned = apply(program, mesh, Assignment(chosen, found.boundaries))
    verify_partitioned(partitioned, program)
    return partitioned


Permutes = Counter[tuple[frozenset[tuple[int, ...]], int]]  # device pairs, bytes


def permutes(partitioned: Partitioned, kinds: Collection[str] = ATTENTION) -> Permutes:
    """All that the rings of a program on one axis send."""
    found: Permutes = Counter()
    mesh = partitioned.mesh
    for op in partitioned.program.body.walk():
        if op.kind in kinds and ring_axis(op, op.attrs["strategy"]) is not None:
            blocks = op.attrs["strategy"].blocks(mesh)
            for one in ring_sends(op, mesh.size, lambda d, blocks=blocks: blocks.get(d, 1)):
                found[frozenset(one.pairs), one.bytes] += one.times
    return found


def compiled_permutes(facts: HloFacts) -> Permutes:
    found: Permutes = Counter()
    for c in facts.collectives:
        if c.kind == "collective-permute":
            found[frozenset(c.groups), c.operand_bytes] += c.trip_count
    return found


def check(
    program: Program,
    mesh: Mesh,
    axes: tuple[str | None, ...],
    compiled: bool,
    order: bool = False,
) -> None:
    """The partitioned program computes what the whole one does, in NumPy and in JAX; with
    ``order``, where its sequences lie in the ring's."""
    ordered = in_zigzag(program, mesh.sizes[axes.index("memory")]) if order else program
    assert ordered is not None
    partitioned = on_rings(ordered, mesh, *axes)
    inputs = inputs_for(program, np.random.default_rng(0))
    right = run_numpy(program, inputs)
    runs = [simulate(partitioned, inputs)]
    if compiled:
        lowered = lower(partitioned)
        made = lowered.compile(QUICK)
        facts = read_hlo(made.as_text() or "")
        assert facts.flops == local_flops(partitioned.program.body, mesh)
        if len(mesh) == 1:
            sent, wanted = compiled_permutes(facts), permutes(partitioned)
            assert not sent - wanted
            # The gradient sends some of what attention sent, which here is there already.
            assert wanted - sent <= permutes(partitioned, ["attention"])
        outputs = made(*lowered.place(inputs))
        runs.append(dict(zip(partitioned.program.outputs, outputs, strict=True)))
    for outputs in runs:
        for name, array in right.items():
            assert_close(outputs[name], array)


CASES = {
    "causal": (24, 24, True, None),
    "of whole blocks, an odd number of queries each": (15, 15, True, None),
    "full": (12, 24, False, None),
    "of a window of one block": (24, 24, True, 6),
    "of a window of two blocks": (24, 24, True, 13),
    "of a window both ways": (24, 24, False, 7),
    "causal, with more keys than queries": (12, 24, True, None),
}


SOON = {("causal", "3"), ("of a window of two blocks", "3"), ("full", "2")}


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("case", "text"),
    [
        pytest.param(case, text, marks=() if (case, text) in SOON else pytest.mark.slow)
        for case in CASES
        for text in ("2", "3", "4")
    ],
)
def test_equals_attention_on_one_device(
    x64: None, monkeypatch: Any, case: str, text: str, group: int
) -> None:
    monkeypatch.setattr(attention_tiles, "BLOCK", 2)
    seq, memory, causal, window = CASES[case]
    if seq % int(text):
        seq = memory = 4 * 5
    program = attending(seq, memory, causal, window, group=group)
    check(program, Mesh.parse(text), ("memory",), True)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("2x4", ("group", "memory")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("2x3", ("batch", "memory")),
                ("3x2", ("memory", "kv")),
                ("4x2", ("memory", None)),
                ("2x2x2", ("kv", "memory", "batch")),
            ]
        ),
    ],
)
def test_beside_cuts_of_other_dims(
    x64: None, monkeypatch: Any, text: str, axes: tuple[str | None, ...]
) -> None:
    monkeypatch.setattr(attention_tiles, "BLOCK", 2)
    check(attending(24, 24, True), Mesh.parse(text), axes, True)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("3", ("memory",)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("2x3", ("kv", "memory")), ("4x2", ("memory", None))]
        ),
    ],
)
def test_in_zigzag_order_nothing_is_swapped(
    x64: None, monkeypatch: Any, text: str, axes: tuple[str | None, ...], group: int
) -> None:
    monkeypatch.setattr(attention_tiles, "BLOCK", 2)
    program, mesh = attending(24, 24, True, group=group), Mesh.parse(text)
    check(program, mesh, axes, True, order=True)
    n = mesh.sizes[axes.index("memory")]
    ordered = in_zigzag(program, n)
    assert ordered is not None
    for op in ordered.body.walk():
        if op.kind in ATTENTION:
            sends = ring_sends(op, n, lambda dim: 1)
            assert not any(s.pairs == circle_of(op, n).mirror() for s in sends)
            assert sum(s.times for s in sends if not s.turns) <= 2 * len(op.results)  # home alone


def test_in_the_order_of_one_ring_no_other_runs() -> None:
    program = in_zigzag(attending(24, 24, True), 4)
    assert program is not None
    with pytest.raises(Exception, match="'memory' lies in the order of a ring of 4 devices"):
        on_rings(program, Mesh.parse("2"), "memory")
    with pytest.raises(Exception, match="seq"):
        on_rings(program, Mesh.parse("4"), "seq")
    check(program, Mesh.parse("4"), (None,), False)  # put as it comes, and whole


@given(st.data())
@settings(max_examples=40)
def test_any_ring_equals_attention_on_one_device(data: st.DataObject) -> None:
    """In NumPy, by the same exchanges."""
    axes = [st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from([1, 2])]
    sizes = data.draw(st.permutations([data.draw(size) for size in axes]))
    ring = data.draw(st.sampled_from([i for i, n in enumerate(sizes) if n > 1]))
    causal, window = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, 40))
    seq = sizes[ring] * data.draw(st.integers(1, 6))
    memory = seq if data.draw(st.booleans()) else sizes[ring] * data.draw(st.integers(1, 6))
    other = data.draw(st.sampled_from([None, "batch", "kv", "group"]))
    other = other if sizes[1 - ring] in (1, 2) and sizes[1 - ring] > 1 else None
    group = 2 if other == "group" else data.draw(st.integers(1, 3))
    strategy: list[str | None] = [other, other]
    strategy[ring] = "memory"
    mesh = Mesh.parse("x".join(map(str, sizes)))
    aligned = causal and window is None and seq == memory and seq % (2 * sizes[ring]) == 0
    order = aligned and data.draw(st.booleans())
    program = attending(seq, memory, causal, window, group=group)
    check(program, mesh, tuple(strategy), False, order)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_are_padding_are_not_seen(causal: bool) -> None:
    """A sequence of 10 on a ring of 4; what fills it up are numbers like any other."""
    program, _ = pad_program(attending(10, 10, causal), {"seq": 16, "memory": 16})
    (op,) = (op for op in program.body.walk() if op.kind == "attention")
    assert op.attrs["length"] == 10
    check(program, Mesh.parse("4"), ("memory",), False)


@given(st.data())
@settings(max_examples=60)
def test_every_visible_score_is_computed_once(data: st.DataObject) -> None:
    """The tiles of all turns on all devices hold each pair that the masks show, and no pair twice;
    every device computes as many."""
    n, block = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    causal, window = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, 40))
    seq = n * data.draw(st.integers(1, 9))
    memory = seq if data.draw(st.booleans()) else n * data.draw(st.integers(1, 9))
    program = attending(seq, memory, causal, window)
    op = next(op for op in program.body.ops if op.kind == "attention")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "BLOCK", block)
        shape = circle_of(op, n)
    seen = np.zeros((seq, memory), int)
    for place in range(n):
        for step, (earlier, later) in enumerate(shape.turns):
            assert len(earlier) == len(later)
            owner = (place - step) % n
            before = low_half(owner, n, np) <= low_half(place, n, np)
            for a, b_ in earlier if before else later:
                for i in rows_of(a, place, shape.seq, shape.tiles.rows, shape.tiles.down, shape):
                    columns, across = shape.tiles.columns, shape.tiles.across
                    for j in rows_of(b_, owner, shape.memory, columns, across, shape):
                        seen[i, j] += 1
    i, j = np.arange(seq)[:, None], np.arange(memory)[None]
    visible = np.ones(seen.shape, bool) & ((j <= i) | (not causal))
    if window is not None:
        visible &= (i < j + window) & (j < i + window)
    assert seen.max(initial=0) <= 1
    assert (seen >= visible).all()


def rows_of(tile: int, place: int, length: int, size: int, count: int, shape: Any) -> range:
    """Global indices of a tile's rows, those that fill it up left out."""
    half, number = divmod(tile, count // shape.halves)
    long = length // shape.halves
    first = firsts(np.array(place), shape, length, np)[half]
    return range(first + number * size, first + min(long, (number + 1) * size))


def test_a_causal_mask_halves_the_work_of_every_device() -> None:
    """Of 4 n^2 pairs of half blocks each of n devices computes 2 n + 1 of 4 n."""
    op, n = attending(32, 32, True).body.ops[0], 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "BLOCK", 2)
        shape = circle_of(op, n)
    assert shape.halves == 2 and sum(shape.computed) == 2 * n + 1 == math.ceil(4 * n / 2) + 1


def test_keys_go_no_farther_than_a_window_reaches() -> None:
    op = attending(64, 64, True, 10).body.ops[0]
    shape = circle_of(op, 8)  # of 8 queries: 9 keys before the first one lie in two blocks
    assert len(shape.turns) == 3 and shape.halves == 1
    assert [one.times for one in ring_sends(op, 8, lambda dim: 1)] == [2, 2]


@given(st.integers(1, 4), st.sampled_from([16, 64]), st.sampled_from([16, 64]))
def test_in_the_gradient_goes_round_what_is_less_to_send(group: int, seq: int, memory: int) -> None:
    """Queries with one sum, or keys and values with two."""
    program = attending(seq, memory, True, group=group)
    op = next(op for op in program.body.walk() if op.kind == "attention_grad")
    sends = [s for s in ring_sends(op, 4, lambda dim: 1) if s.turns]
    q, k = (v.type.size // 4 * 8 for v in op.operands[:2])
    each = 3 * q + 2 * q // 3, 4 * k  # a head is 3 wide; statistics are 2
    assert {s.what for s in sends} in ({"q", "dout", "stats", "dq+"}, {"k", "v", "dk+", "dv+"})
    assert sum(s.bytes * s.times for s in sends) == 3 * min(each)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("memory", "memory"), "one axis alone can cut 'memory'"),
        (("memory", "seq"), "one axis alone can cut 'memory', and 'seq' with it"),
    ],
)
def test_what_no_ring_does_is_refused(axes: tuple[str, ...], words: str) -> None:
    with pytest.raises(Exception, match=words):
        on_rings(attending(24, 24, True), Mesh.parse("2x2"), *axes)


def test_what_attention_alone_sends_and_its_statistics(monkeypatch: Any) -> None:
    """In float32, against float64."""
    monkeypatch.setattr(attention_tiles, "BLOCK", 4)
    mesh = Mesh.parse("4")
    program, exact = attending(32, 32, True, dtype="f32"), attending(32, 32, True)
    partitioned = on_rings(program, mesh, "memory")
    inputs = inputs_for(program, np.random.default_rng(1))
    right = run_numpy(exact, {k: v.astype(np.float64) for k, v in inputs.items()})
    lowered = lower(partitioned)
    made = lowered.compile()
    outputs = dict(zip(program.outputs, made(*lowered.place(inputs)), strict=True))
    assert compiled_permutes(read_hlo(made.as_text() or "")) == permutes(partitioned)
    np.testing.assert_allclose(outputs["out"], right["out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["lse"], run_numpy(program, inputs)["lse"], rtol=1e-5)


@pytest.mark.parametrize("text", ["2", pytest.param("2x4", marks=pytest.mark.slow)])
def test_the_audit_finds_every_permute_of_a_training_step(text: str) -> None:
    """And every FLOP; one permute more or less is not as planned."""
    small = replace(gpt.PRESETS["tiny"], dtype="f32", embd=64, batch=8, vocab=104, layers=2)
    forced = Collectives.asked(forced=["attention=ring"])
    layout = "seq:x" if text == "2" else "batch:x,seq:y"
    # A chip for which f32 stays f32: the CPU has no bf16 permutes.
    program = gpt.train_step(small)
    plan = make_plan(program, Mesh.parse(text), chip("a100"), layout, collectives=forced)
    lowered = lower(plan.partitioned)
    facts = read_hlo(lowered.compile(QUICK).as_text() or "")
    assert facts.flops == plan.flops
    permutes = [c for c in plan.collectives if c.kind == "permute"]
    found = pair(plan, facts)
    assert permutes and not [f for f in found if not f.ok]
    assert {f.planned for f in found if f.verdict.startswith("by ring")} - {None} == {*permutes}
    gone = next(c for c in facts.collectives if c.kind == "collective-permute" and c.trip_count > 1)
    lacking = replace(facts, collectives=tuple(c for c in facts.collectives if c is not gone))
    assert [f for f in pair(plan, lacking) if not f.ok]
