"""The rows of a report, on plans small enough to be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import neocc
from models import gpt
from neocc.frontends.model_file import Model, our_dims
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.types import Dim, TensorType
from neocc.report import as_json, facts, terminal
from neocc.report.certificate import PROVED
from neocc.runtime import Compilation, compile_model

MESH = Mesh.parse("2x4")
TYPE = TensorType((Dim("embd", 8), Dim("heads", 16)), "f32")


@pytest.fixture(scope="module")
def compilation() -> Compilation:
    """The tiny GPT, heads and mlp on y, batch on x: Megatron with data parallelism."""
    model = Model(Path(gpt.__file__), gpt, "tiny", gpt.PRESETS["tiny"])
    layout = "batch:x,heads:y,mlp:y"
    return compile_model(model, Mesh.parse("2x2"), neocc.chip("v5e"), layout, compare=True)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((None, None), "whole on every device"),
        (("embd", None), "embd on x"),
        (("heads", "embd"), "embd on y, heads on x"),
        (("heads", "heads"), "heads on x and y"),
        ((Partial("sum"), "embd"), "embd on y, partial sums on x"),
    ],
)
def test_a_layout_in_words(axes: tuple, words: str):
    assert facts.layout_words(TYPE.with_layout(Layout(axes)), MESH) == words


def test_a_gptneo_layout_in_our_dims():
    assert our_dims("batch:x, memory_length:y,intermediate_expanded:y") == "batch:x,memory:y,mlp:y"


def test_every_parameter_is_in_one_row(compilation: Compilation):
    rows = facts.weights(compilation.plan)
    named = [n for row in rows for n in row.names]
    inputs = compilation.plan.program.named_inputs
    assert sorted(named) == sorted(facts.short(i.name) for i, _ in inputs if i.role == "parameter")
    (qkv,) = (row for row in rows if "attn.q" in row.names)
    assert set(qkv.names) == {"attn.q", "attn.k", "attn.v"}
    assert facts.layout_words(qkv.type, compilation.plan.mesh) == "heads on y"
    assert qkv.bytes == 2 * 32 * 4 * 8 * 4 // 2  # layers x embd x heads x head_dim in f32, over y


def test_activations_are_those_of_the_forward_pass(compilation: Compilation):
    rows = {row.names[0]: row for row in facts.activations(compilation.plan)}
    mesh = compilation.plan.mesh
    queries = rows["queries, keys, values"]
    assert facts.layout_words(queries.type, mesh) == "batch on x, heads on y"
    assert queries.bytes == 4 * 16 * 4 * 8 * 4 // 4
    assert "attention scores" not in rows  # fused attention never holds them
    assert facts.layout_words(rows["mlp activations"].type, mesh) == "batch on x, mlp on y"
    assert {"residual stream", "logits"} <= set(rows)


def test_traffic_adds_up_to_the_plan(compilation: Compilation):
    plan = compilation.plan
    rows = facts.traffic(plan)
    each = [c for c in plan.collectives if c.kind != "slice"]
    assert sum(r.runs for r in rows) == sum(c.count for c in each)
    assert sum(r.seconds for r in rows) == pytest.approx(sum(c.count * c.seconds for c in each))
    assert [r.seconds for r in rows] == sorted((r.seconds for r in rows), reverse=True)
    shown, rest = facts.cut_after(rows, 3)
    assert rest is not None
    assert sum(r.seconds for r in (*shown, rest)) == pytest.approx(sum(r.seconds for r in rows))
    assert facts.cut_after(rows, len(rows)) == (rows, None)


def test_megatrons_reductions_are_in_every_layer(compilation: Compilation):
    """On y, two sums forward (after o and after proj) of batch/2 x seq x embd, in both layers."""
    forward = [
        c
        for c in compilation.plan.collectives
        if c.axis == "y" and c.region == "layers forward" and c.kind != "slice"
    ]
    sums = [c for c in forward if c.kind in ("all_reduce", "reduce_scatter")]
    assert len(sums) == 2
    assert {c.count for c in sums} == {2}
    assert {c.bytes for c in sums} == {2 * 16 * 32 * 4}


def test_gradients_bear_their_parameters_names(compilation: Compilation):
    names = facts.tensor_names(compilation.plan)
    reduced = {
        names[c.id]
        for c in compilation.plan.collectives
        if c.axis == "x" and c.kind in ("all_reduce", "reduce_scatter")
    }
    assert {"attn.q grad", "mlp.fc grad", "mlp.proj grad"} <= reduced


def test_recomputation_and_padding_are_told_apart():
    config = gpt.Config("odd", 2, 32, 4, vocab=61, seq=16, batch=4, dtype="f32", recompute=True)
    program = neocc.simplify(gpt.train_step(config))
    plan = neocc.make_plan(program, Mesh.parse("2"), neocc.chip("v5e"), "vocab:x")
    done = facts.work(plan)
    assert [(p.dim, p.true, p.padded) for p in plan.paddings] == [("vocab", 61, 62)]
    # Three products of batch x seq x embd with the vocabulary, padded by one row.
    assert done.padding * plan.model_flops == 3 * 2 * 4 * 16 * 32
    assert done.recomputed > 0.1
    assert done.repeated > 0  # the layers run whole on both devices
    more = done.recomputed + done.padding + done.repeated - done.skipped
    total = plan.model_flops * (1 + more)
    assert total == pytest.approx(plan.flops * 2)


def test_json_is_complete(compilation: Compilation):
    report = json.loads(json.dumps(as_json.report(compilation)))
    plan = compilation.plan
    assert report["model"]["parameters"] == compilation.program.parameter_count == 27_840
    assert report["model"]["tokens_per_step"] == 64
    assert len(report["plan"]["collectives"]) == len(plan.collectives)
    assert set(report["plan"]["layouts"]) == {i.name for i in plan.program.inputs}
    assert report["plan"]["step"] == pytest.approx(
        report["plan"]["compute"] + report["plan"]["exposed"]
    )
    assert report["plan"]["memory"]["peak"] == sum(report["plan"]["memory"]["by_kind"].values())
    assert report["plan"]["certificate"]["gap"] < PROVED
    assert report["tokens_per_second"] == pytest.approx(64 / report["plan"]["step"])
    assert [r["name"] for r in report["compared"]][:2] == ["data parallel", "FSDP"]
    assert len(report["compared"]) == 3
    assert report["ok"] is True


def test_no_expert_beats_the_free_plan():
    """Their layouts are some of those that the solver chooses from."""
    model = Model(Path(gpt.__file__), gpt, "tiny", gpt.PRESETS["tiny"])
    found = compile_model(model, Mesh.parse("2x2"), neocc.chip("v5e"))
    assert found.plan.solution.gap < PROVED
    for rival in found.rivals:
        assert rival.plan is not None, rival.reason
        assert rival.plan.solution.objective >= found.plan.solution.objective * (1 - 1e-6)


def test_the_report_fits_on_a_screen(compilation: Compilation):
    console = Console(width=terminal.WIDTH, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print_report(console, compilation)
    lines = console.export_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= terminal.WIDTH
    text = "\n".join(lines)
    for rival in ("data parallel", "FSDP", "Megatron"):
        assert rival in text
    assert "heads on y" in text and "proved optimal" in text


def test_pure_data_parallelism_cuts_nothing_but_the_batch(compilation: Compilation):
    (found,) = (r for r in compilation.rivals if r.name == "data parallel")
    assert found.plan is not None
    for op in found.plan.partitioned.program.body.walk():
        if "strategy" in op.attrs:
            assert {c for c in op.attrs["strategy"].axes if isinstance(c, str)} <= {"batch"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (facts.bytes_text(0), "0 B"),
        (facts.bytes_text(1536), "1.5 KiB"),
        (facts.bytes_text(1023 * 2**20), "1023 MiB"),
        (facts.bytes_text(16_911_433_728), "15.8 GiB"),
        (facts.seconds_text(0.8384), "838 ms"),
        (facts.seconds_text(28.42), "28.4 s"),
        (facts.seconds_text(9.14e-6), "9.14 us"),
        (facts.seconds_text(0), "0 s"),
        (facts.count_text(1_315_575_808), "1.32 B"),
        (facts.count_text(27_840), "27.8 k"),
        (terminal.names_text(("attn.q", "attn.k", "attn.v")), "attn.q, k, v"),
        (terminal.names_text(("mlp.fc grad", "mlp.proj grad")), "grads of mlp.fc, proj"),
        (terminal.names_text(tuple("abcdef")), "a, b, c, d, +2"),
    ],
)
def test_figures_as_text(text: str, wanted: str):
    assert text == wanted
