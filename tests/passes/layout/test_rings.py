"""Ring attention as the planner sees it: offered where it may gain, chosen where it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.cost.rounds import busiest
from neocc.cost.topology import Ring
from neocc.ir import builder as b
from neocc.ir.builder import Graph
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh
from neocc.ir.ops import ATTENTION
from neocc.ir.ops.attention import ring_axis
from neocc.ir.program import Op, Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import differentiate
from neocc.passes.decisions import decisions
from neocc.passes.layout.algebra import strategies
from neocc.passes.layout.rings import gains, gathered_seconds, offered
from neocc.passes.partition import verify_partitioned
from neocc.passes.plan import Plan, make_plan
from neocc.passes.recost import recost

AUTO, STANDARD = Collectives.asked("auto"), Collectives.asked("standard")
FORCED = Collectives.asked(forced=["attention=ring"])


def tower(
    seq: int, heads: int = 3, batch: int = 1, window: int | None = None, minds: bool = False
) -> Program:
    """Attention between products of wide inputs, and its gradients; all cut along the sequence,
    if at all, where there is one example and few heads. ``minds``: something in it minds the order
    of the sequence."""
    n, rows, keys = Dim("batch", batch), Dim("seq", seq), Dim("memory", seq)
    wide, count, size = Dim("embd", 128), Dim("heads", heads), Dim("head_dim", 128)
    g = Graph("tower")
    x = g.data("x", (n, rows, wide), "bf16")
    q, k, v = (
        b.einsum(x, g.parameter(name, (wide, count, size), "bf16"), "batch seq heads head_dim")
        for name in "qkv"
    )
    k, v = (t.rename(seq="memory") for t in (k, v))
    out, _ = b.fused_attention(q, k, v, rows, keys, size, True, window, 0.1)
    found = {"loss": (out * out).sum(*out.type.dims)}
    return differentiate(g.build(found | ({"next": x.shift("seq", 1)} if minds else {})))


def rings(plan: Plan) -> list[Op]:
    body = plan.partitioned.program.body
    return [
        op
        for op in body.walk()
        if op.kind in ATTENTION and ring_axis(op, op.attrs["strategy"]) is not None
    ]


def planned(program: Program, mesh: str, collectives: Collectives, layout: str = "") -> Plan:
    plan = make_plan(program, Mesh.parse(mesh), chip("v5p"), layout, collectives=collectives)
    verify_partitioned(plan.partitioned, plan.program)
    return plan


def test_a_long_sequence_of_few_heads_goes_round() -> None:
    program = tower(16384)
    before, after = (planned(program, "8", mode) for mode in (STANDARD, AUTO))
    assert not rings(before) and len(rings(after)) == 2
    assert after.timeline.step < before.timeline.step
    permutes = [c for c in after.collectives if c.kind == "permute"]
    assert permutes and all(c.algorithm == "ring" and c.standard > 0 for c in permutes)
    assert after.timeline.hidden >= sum(c.within * c.count for c in permutes) > 0
    assert after.solution.objective == pytest.approx(after.timeline.step, rel=1e-3)


def test_where_nothing_minds_the_order_no_half_is_swapped() -> None:
    """And where something does, rings swap: the step is longer, and so is what is exposed."""
    plan, swapping = (planned(tower(16384, minds=minds), "8", AUTO) for minds in (False, True))
    assert plan.ready.zigzag == 8 and swapping.ready.zigzag is None
    assert all(len(rings(p)) == 2 for p in (plan, swapping))
    waited = [
        {c.tensor for c in p.collectives if c.pairs and not c.within} for p in (plan, swapping)
    ]
    assert waited[0] == {"dq of attention_grad"} and len(waited[1]) > 3
    assert plan.timeline.step < swapping.timeline.step
    assert plan.timeline.exposed < swapping.timeline.exposed
    assert plan.solution.bound <= plan.solution.objective


@pytest.mark.parametrize(
    ("program", "mesh"), [(tower(256), "8"), (tower(4096, heads=8), "8"), (tower(512, 3, 8), "8")]
)
def test_where_it_does_not_gain_nothing_changes(program: Program, mesh: str) -> None:
    """Few queries a device; as many heads as devices; as many examples."""
    before, after = (planned(program, mesh, mode) for mode in (STANDARD, AUTO))
    assert not rings(after)
    assert after.timeline.step == pytest.approx(before.timeline.step, rel=1e-9)
    forced = planned(program, mesh, FORCED)
    assert forced.timeline.step >= after.timeline.step * (1 - 1e-9)


@given(
    st.sampled_from([128, 256, 512, 1024, 4096, 16384]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 4]),
    st.sampled_from([None, 200]),
    st.sampled_from(["8", "2x4", "4x2"]),
    st.sampled_from(["v5p", "v5e", "h100"]),
)
@settings(max_examples=25)
def test_only_rings_that_may_gain_are_offered(
    seq: int, heads: int, batch: int, window: int | None, text: str, name: str
) -> None:
    """Each is faster than gathering, at its full price; and no strategy but rings is left out."""
    mesh, target = Mesh.parse(text), chip(name)
    cost = CostModel.of(target, mesh, collectives=AUTO)
    for op in tower(seq, heads, batch, window).body.ops:
        if op.kind not in ATTENTION:
            continue
        every = strategies(op, mesh)
        left = offered(op, every, cost, False)
        for s in every:
            axis = ring_axis(op, s)
            if axis is None:
                assert s in left
                continue
            time, instead = cost.ring(op, s), gathered_seconds(op, s, cost)
            assert time is not None and 0 <= time.hidden <= time.sending
            if s in left:
                assert instead is None or time.compute + time.exposed < sum(instead)
            else:
                others = [o for o in every if ring_axis(op, o) is None]
                assert not gains(op, s, axis, others, cost)
        standard = CostModel.of(target, mesh, collectives=STANDARD)
        without = [s for s in every if ring_axis(op, s) is None]
        assert offered(op, every, standard, False) == without


def test_a_layout_asks_for_it_by_the_dim_of_keys() -> None:
    plan = planned(tower(512), "2x4", STANDARD, "memory:y,batch:x")
    assert [str(op.attrs["strategy"]) for op in rings(plan)] == ["{batch, memory}"] * 2
    both = planned(tower(512), "2x4", AUTO, "seq:x,memory:y")
    assert not rings(both)  # no ring where another axis cuts the queries


def test_forced_it_takes_the_place_of_every_gather() -> None:
    plan = planned(tower(512), "8", FORCED, "seq:x")
    assert len(rings(plan)) == 2
    with pytest.raises(LayoutError, match="attention=bogus: one of standard, ring"):
        Collectives.asked(forced=["attention=bogus"])


@pytest.mark.parametrize("mode", [AUTO, FORCED])
def test_a_plan_read_back_costs_the_same(mode: Collectives) -> None:
    plan = planned(tower(16384), "8", mode)
    again = recost(plan.ready, decisions(plan), plan.memory_limit).plan
    assert again.timeline == plan.timeline and again.collectives == plan.collectives
    # Whatever may run collectives when it is read: a ring that the file names is one.
    ready = replace(plan.ready, cost=replace(plan.ready.cost, collectives=STANDARD))
    assert len(rings(recost(ready, decisions(plan), plan.memory_limit).plan)) == 2


@pytest.mark.parametrize(
    ("pairs", "wraps", "found"),
    [
        ([(i, (i + 1) % 8) for i in range(8)], True, (1, 1)),
        ([(i, 7 - i) for i in range(8)], True, (2, 3)),  # 3 hops past either end, 3 past the middle
        ([(i, 7 - i) for i in range(8)], False, (4, 7)),  # all that cross the middle
        ([(i, (i + 1) % 4) for i in range(4)], False, (1, 3)),
    ],
)
def test_messages_on_the_busiest_wire(pairs: Any, wraps: bool, found: tuple[int, int]) -> None:
    n = len(pairs)
    assert busiest(tuple(pairs), Ring(n, 1e9, 1e-6, wraps)) == found
    assert busiest(tuple(pairs), Ring(n, 1e9, 1e-6, switched=True)) == (1, 1)
