"""Reshards: none where layouts meet, shared where they can be, right before their first use."""

from __future__ import annotations

import numpy as np
import pytest

from neocc.ir.builder import Graph, dot, exp, repeat
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.program import Program
from neocc.ir.types import Dim, TensorType
from neocc.passes.layout.algebra import SUM, Assignment, Boundary, Strategy, Through
from neocc.passes.partition import apply, simulate, verify_partitioned
from neocc.passes.partition.reshard import arcs, reshard_tree, sent_bytes
from tests.passes.partition.checking import check

BATCH, EMBD, Q, K, V = Dim("batch", 8), Dim("embd", 8), Dim("q", 8), Dim("k", 8), Dim("v", 8)
X4 = Mesh.parse("4")
WHOLE = Layout((None,))


def at(*axes) -> Layout:
    return Layout(axes)


def assign(program: Program, args, strategies, outputs) -> Assignment:
    """An assignment of a program with no repeat, by position; one placement stands for all."""
    steps = {o: Strategy((s,)) for o, s in zip(program.body.ops, strategies, strict=True)}
    boundary = Boundary(tuple(Layout((a,)) for a in args), tuple(Layout((a,)) for a in outputs))
    return Assignment(steps, {program.body: boundary})


def kinds(program: Program) -> list[str]:
    return [op.kind for op in program.body.walk()]


def floats(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {i.name: rng.standard_normal(v.type.shape) for i, v in program.named_inputs}


def qkv() -> Program:
    g = Graph("qkv")
    x = g.data("x", (BATCH, EMBD), "f64")
    w = [g.parameter(f"w{d.name}", (EMBD, d), "f64") for d in (Q, K, V)]
    return g.build({d.name: dot(x, m, "embd") for d, m in zip((Q, K, V), w, strict=True)})


def test_consumers_that_want_one_layout_share_one_gather() -> None:
    program = qkv()
    assignment = assign(program, ["batch", "q", "k", "v"], ["q", "k", "v"], ["q", "k", "v"])
    partitioned = check(program, X4, assignment, floats(program))
    assert kinds(partitioned.program) == ["all_gather", "einsum", "einsum", "einsum"]


def test_layouts_that_meet_need_no_op() -> None:
    program = qkv()
    assignment = assign(program, ["batch", None, None, None], ["batch"] * 3, ["batch"] * 3)
    assert kinds(check(program, X4, assignment, floats(program)).program) == ["einsum"] * 3


def test_a_reshard_stands_right_before_its_first_use() -> None:
    program = qkv()
    assignment = assign(program, ["embd", None, "k", "v"], ["batch", "k", "v"], ["batch", "k", "v"])
    partitioned = check(program, X4, assignment, floats(program))
    assert kinds(partitioned.program) == [
        "all_to_all",
        "einsum",
        "all_gather",
        "einsum",
        "einsum",
    ]


def test_a_sum_that_is_added_to_a_sum_is_reduced_once() -> None:
    g = Graph("two")
    x, y = g.data("x", (BATCH, EMBD), "f64"), g.data("y", (BATCH, EMBD), "f64")
    program = g.build({"out": x.sum("embd") + y.sum("embd")})
    assignment = assign(
        program, ["embd", "embd"], ["embd", "embd", Through(frozenset({0, 1}))], [None]
    )
    partitioned = check(program, X4, assignment, floats(program))
    assert kinds(partitioned.program) == ["reduce", "reduce", "add", "all_reduce"]


def test_partial_and_whole_uses_of_one_value_share_what_they_can() -> None:
    """One value wanted reduced and scattered: scattered once, then gathered."""
    tree = reshard_tree(
        TensorType((BATCH, EMBD), "f32"),
        Layout((SUM,)),
        [at("batch"), WHOLE],
        arcs(X4, sent_bytes(X4)),
    )
    assert {m.kind for m in tree.values()} == {"reduce_scatter", "all_gather"}


def test_allowed_moves_alone_are_used() -> None:
    program = qkv()
    assignment = assign(program, ["embd"] + [None] * 3, ["batch"] * 3, ["batch"] * 3)
    x = program.body.args[0]
    direct = apply(program, X4, assignment)
    assert kinds(direct.program)[0] == "all_to_all"
    through = frozenset({(at("embd"), WHOLE), (WHOLE, at("batch"))})
    assignment = Assignment(assignment.strategies, assignment.boundaries, {x: through})
    partitioned = check(program, X4, assignment, floats(program))
    assert kinds(partitioned.program)[:2] == ["all_gather", "local_slice"]
    nothing = Assignment(assignment.strategies, assignment.boundaries, {x: frozenset()})
    with pytest.raises(LayoutError, match="no moves lead from"):
        apply(program, X4, nothing)


def test_a_dim_cut_by_two_axes_is_uncut_from_the_inside() -> None:
    mesh = Mesh.parse("2x4")
    t = TensorType((BATCH, EMBD), "f32")
    tree = reshard_tree(
        t, Layout(("batch", "batch")), [Layout((None, "batch"))], arcs(mesh, sent_bytes(mesh))
    )
    path = [str(m.target) for m in tree.values()]
    assert path[0].startswith("{batch, ") and path[-1] == "{-, batch}"


def test_a_stacked_output_may_leave_a_repeat_partial_and_is_reduced_once() -> None:
    layers = Dim("layers", 3)
    g = Graph("stack")
    x = g.data("x", (BATCH,), "f64")
    w = g.parameter("w", (layers, BATCH), "f64")
    total = repeat(layers, lambda x, w: x * w, x, w)
    program = g.build({"out": total})
    # A region output that is no carry: taken from the program's repeat by hand.
    from neocc.ir.builder import Block, close_repeat

    g = Graph("stack")
    x, w = g.data("x", (BATCH,), "f64"), g.parameter("w", (layers, BATCH), "f64")
    inner = Block(g)
    carried, sliced = inner.add_arg(x.type), inner.add_arg(w.type.without(["layers"]))
    squares = (sliced * carried).sum("batch")
    attrs = {"dim": layers, "carries": 1, "stacked": 1, "reverse": True, "recompute": False}
    outs = [inner.use(carried * 0.5), inner.use(squares)]
    end, sums = close_repeat(inner, [x, w], outs, attrs, None)
    program = g.build({"end": end, "sums": sums})
    op = program.body.ops[0]
    steps = {o: Strategy(("batch",)) for o in op.regions[0].ops}
    steps[next(o for o in op.regions[0].ops if o.kind == "constant")] = Strategy((None,))
    cut = at("batch")
    assignment = Assignment(
        steps,
        {
            program.body: Boundary((cut, cut), (cut, WHOLE)),
            op.regions[0]: Boundary((cut, cut), (cut, at(SUM))),
        },
    )
    partitioned = check(program, X4, assignment, floats(program))
    assert [(o.kind, times) for o, times in partitioned.collectives()] == [("all_reduce", 1)]


def test_collectives_in_a_repeat_count_once_a_step() -> None:
    layers = Dim("layers", 5)
    g = Graph("fsdp")
    x = g.data("x", (BATCH, EMBD), "f64")
    w = g.parameter("w", (layers, EMBD), "f64")
    program = g.build({"out": repeat(layers, lambda x, w: exp(x * w), x, w)})
    op = program.body.ops[0]
    inner, rows, cut = op.regions[0], at("batch"), at("embd")
    assignment = Assignment(
        {o: Strategy(("batch",)) for o in inner.ops},
        {
            program.body: Boundary((rows, cut), (rows,)),
            inner: Boundary((rows, cut), (rows,)),
        },
    )
    partitioned = check(program, X4, assignment, floats(program))
    assert [(o.kind, times) for o, times in partitioned.collectives()] == [("all_gather", 5)]


def test_every_op_has_an_id_of_its_own_and_every_local_one_its_strategy() -> None:
    program = qkv()
    assignment = assign(program, ["embd", None, "k", "v"], ["batch", "k", "v"], ["batch", "k", "v"])
    ops = apply(program, X4, assignment).program.body.ops
    assert [op.attrs["id"] for op in ops] == list(range(len(ops)))
    assert all("strategy" in op.attrs for op in ops if op.kind == "einsum")


def test_a_missing_decision_names_the_op() -> None:
    program = qkv()
    assignment = assign(program, [None] * 4, [None] * 3, [None] * 3)
    del assignment.strategies[program.body.ops[1]]
    with pytest.raises(LayoutError, match=r"no strategy for .*einsum"):
        apply(program, X4, assignment)


def test_the_simulator_refuses_replicas_that_differ() -> None:
    g = Graph("wrong")
    x = g.data("x", (BATCH,), "f64")
    program = g.build({"out": x.sum("batch")})
    partitioned = apply(program, X4, assign(program, ["batch"], ["batch"], [None]))
    (total, reduce) = partitioned.program.body.ops
    assert reduce.kind == "all_reduce" and total.result.type.layout == at(Partial("sum"))
    total.result.type = total.result.type.with_layout(WHOLE)
    with pytest.raises(LayoutError, match="replicas along 'x' differ"):
        simulate(partitioned, floats(program))
    with pytest.raises(LayoutError, match="must lie as"):
        verify_partitioned(partitioned)
