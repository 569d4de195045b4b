"""What is held at each point of a step: what XLA fuses is not, copies while they are read."""

from __future__ import annotations

import pytest

from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.ir.builder import Graph, Tensor, dot, einsum, exp, gather, repeat, tanh
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.layout.build import build
from neocc.passes.layout.liveness import epilogues, last_use, materialised
from neocc.passes.layout.memory import limit, measure, peak, points
from neocc.passes.layout.solve import solve
from neocc.passes.plan import make_plan
from tests.passes.layout import programs

BATCH, EMBD, MLP, VOCAB = Dim("batch", 64), Dim("embd", 256), Dim("mlp", 1024), Dim("vocab", 512)


def graph() -> tuple[Graph, Tensor, Tensor]:
    g = Graph("p")
    return g, g.data("x", (BATCH, EMBD), "f32"), g.parameter("w", (EMBD, MLP))


def made_by(program: Program, kind: str, nth: int = 0):
    return [op for op in program.body.ops if op.kind == kind][nth].result


def test_a_chain_of_one_large_operand_is_made_in_each_product_that_reads_it() -> None:
    g, x, w = graph()
    h = dot(x, w, "embd")
    narrow = exp(h * 2.0)
    v, u = g.parameter("v", (MLP, EMBD)), g.parameter("u", (MLP, EMBD))
    y = einsum(narrow, v, "batch embd") * tanh(einsum(narrow, u, "batch embd"))
    program = g.build({"y": y.sum("embd")})
    stored = materialised(program.body)
    assert made_by(program, "exp") not in stored
    assert made_by(program, "einsum") in stored
    # ... so the product that it is made of is held until the last of them.
    last = last_use(program.body, stored)
    readers = [i for i, op in enumerate(program.body.ops) if op.kind == "einsum"]
    assert last[made_by(program, "einsum")] == readers[2]
    # A GPU's products make none of what they read.
    assert made_by(program, "exp") in materialised(program.body, apart=True)


def test_a_chain_of_two_large_operands_is_stored_if_two_products_read_it() -> None:
    g, x, w = graph()
    other = g.data("other", (BATCH, MLP), "f32")
    both = exp(dot(x, w, "embd") * other.sum("mlp")) * other
    v, u = g.parameter("v", (MLP, EMBD)), g.parameter("u", (MLP, EMBD))
    y, z = einsum(both, v, "batch embd"), einsum(both, u, "batch embd")
    two = g.build({"y": y, "z": z})
    product = [op for op in two.body.ops if op.kind == "mul"][-1].result
    assert product in materialised(two.body)
    g, x, w = graph()
    other = g.data("other", (BATCH, MLP), "f32")
    both = exp(dot(x, w, "embd") * other.sum("mlp")) * other
    one = g.build({"y": einsum(both, g.parameter("v", (MLP, EMBD)), "batch embd")})
    product = [op for op in one.body.ops if op.kind == "mul"][-1].result
    assert product not in materialised(one.body)


def test_a_product_that_only_a_stored_chain_reads_is_not_stored_itself() -> None:
    g, x, w = graph()
    program = g.build({"y": tanh(dot(x, w, "embd"))})
    assert made_by(program, "einsum") in epilogues(program.body, materialised(program.body))


def test_a_softmax_keeps_the_product_that_it_sums_over() -> None:
    g, x, w = graph()
    e = exp(dot(x, w, "embd"))
    program = g.build({"y": e / e.sum("mlp")})
    assert not epilogues(program.body, materialised(program.body))


def looked_up_early_and_updated_late() -> Program:
    g = Graph("p")
    tokens = g.data("tokens", (BATCH,), "i32")
    table = g.parameter("table", (VOCAB, EMBD))
    x = gather(table, tokens, "vocab")
    w = g.parameter("w", (Dim("layers", 3), EMBD, MLP))
    y = repeat(
        Dim("layers", 3), lambda h, w: h + einsum(tanh(dot(h, w, "embd")), w, "batch embd"), x, w
    )
    return g.build({"y": y.sum("batch"), "table": table * 0.5 + table * table})


def test_a_gathered_table_is_held_while_it_is_looked_up_not_until_it_is_updated() -> None:
    """FSDP's gather of the embedding: the update reads the table where it is stored."""
    program, mesh = looked_up_early_and_updated_late(), Mesh.parse("8")
    cost = CostModel.of(chip("v5e"), mesh)
    problem = build(program, mesh, cost)
    flow = next(f for f in problem.flows if f.value.name == "table")
    copied = [
        point.op.kind
        for point in points(problem)
        if any(live.copies is flow for live in point.live)
    ]
    assert "gather" in copied
    assert "einsum" not in copied


def test_an_all_reduce_takes_no_second_buffer_and_a_gathered_output_takes_one() -> None:
    """The sum replaces its terms; a parameter that is gathered after its update is all there,
    beside the one that it replaces."""
    g = Graph("p")
    x, w = g.data("x", (BATCH, EMBD), "f32"), g.parameter("w", (EMBD, MLP))
    program = g.build({"y": exp(dot(x, w, "embd")).sum("batch"), "w": w * 0.5})
    mesh = Mesh.parse("8")
    plan = make_plan(program, mesh, chip("v5e"), "batch:x")
    whole = w.type.size * 4
    assert plan.memory.peak < 1.5 * whole  # old and new are one
    plan = make_plan(program, mesh, chip("v5e"), "embd:x")
    terms = BATCH.size * MLP.size * 4
    assert plan.memory.by_kind["temporaries"] < 1.5 * terms


def test_what_each_turn_of_a_loop_reads_of_a_product_may_be_there_twice_on_a_tpu() -> None:
    """Entmax's search for its threshold. Not where the last dim fills its lanes; and an input of
    the program is read where it lies."""

    def peak_of(target: str, product: bool, size: int = 1000) -> float:
        batch, mlp = Dim("batch", 128), Dim("mlp", size)
        g = Graph("p")
        x, w = g.data("x", (batch, EMBD), "f32"), g.parameter("w", (EMBD, mlp))
        h = dot(x, w, "embd") + 1.0 if product else g.data("h", (batch, mlp), "f32")
        low = repeat(Dim("turns", 3), lambda low, _: low + (h - low).sum("mlp"), h.max("mlp"), {})
        plan = make_plan(g.build({"y": (h - low).sum("mlp")}), Mesh.parse("1"), chip(target))
        return plan.memory.by_kind["temporaries"] / (batch.size * mlp.size * 4)

    assert [round(peak_of("v5e", p), 1) for p in (True, False)] == [2, 0]
    assert round(peak_of("v5e", True, 1024), 1) == 1
    assert [round(peak_of("h100", p), 1) for p in (True, False)] == [1, 0]


@pytest.mark.parametrize("name", ["layers", "trained", "embedding"])
def test_what_is_measured_is_what_the_rows_say(name: str) -> None:
    program = getattr(programs, name)()
    mesh = Mesh.parse("2x2")
    problem = build(program, mesh, CostModel.of(chip("v5e"), mesh))
    solution = solve(problem)
    at = points(problem)
    size = measure(problem, solution)
    moves = solution.assignment.moves or {}
    for point in at:
        row = limit(problem, point, 1.0)
        held = sum(held[solution.picked[c]] for c, held in row.options.items())
        for flow, targets in row.moves.items():
            held += sum(targets.get(t, 0.0) for _, t in moves[flow.value])
        assert held == sum(map(size, point.live))
    memory, op = peak(problem, solution)
    assert memory.peak == max(sum(map(size, p.live)) for p in at)
    assert any(p.op is op and sum(map(size, p.live)) == memory.peak for p in at)
