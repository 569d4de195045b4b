"""Plans written, read back, changed, refused and costed again."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neocc
from models import gpt
from neocc.cost.choice import Collectives
from neocc.cost.hardware import HardwareError, chip
from neocc.cost.mappings import mappings
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.decisions import decisions
from neocc.passes.layout.algebra import strategies
from neocc.passes.layout.notation import (
    cuts_text,
    move_text,
    parse_layout_text,
    parse_strategy_text,
)
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.names import program_names, resharded
from neocc.passes.pad import pad_inputs, unpad_outputs
from neocc.passes.partition import simulate
from neocc.passes.partition.verify import layout_of
from neocc.passes.plan import Plan, make_plan
from neocc.runtime.plan_check import Checked, plan_of
from neocc.runtime.plan_file import ModelSource, document, fingerprint, read
from tests.numpy_executor import run_numpy
from tests.passes.layout import programs as small
from tests.random_programs import assert_close, inputs_for, meshes, programs

V5E = chip("v5e")
MESH = Mesh.parse("2x4")


def line(text: str) -> int:
    """The number of the model's first line that holds a text."""
    lines = inspect.getsource(gpt).splitlines()
    return next(i for i, found in enumerate(lines, 1) if text in found)


FC = "einsum gpt.py:" + str(line('w["fc"]'))


def written(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(data, indent=1))
    return path


def again(folder: Path, data: dict[str, Any], program: Program) -> Checked:
    return plan_of(read(written(folder, data)), program, None, chip(data["chip"]))


@pytest.fixture(scope="module")
def program() -> Program:
    return neocc.simplify(gpt.train_step(gpt.PRESETS["tiny"]))


@pytest.fixture(scope="module")
def plan(program: Program) -> Plan:
    return make_plan(program, MESH, V5E, "batch:x,heads:y,mlp:y")


@pytest.fixture
def data(plan: Plan) -> dict[str, Any]:
    return document(plan, ModelSource("models/gpt.py", "tiny"))


# Round trip


@given(st.data())
@settings(max_examples=15)
def test_a_plan_read_back_has_its_figures_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: st.DataObject
):
    program = drawn.draw(programs(max_ops=8))
    mesh = drawn.draw(meshes(max_axes=2, big=False))
    try:
        plan = make_plan(program, mesh, chip(drawn.draw(st.sampled_from(["v5e", "h100"]))))
    except HardwareError:  # a GPU multiplies no integers
        return
    data = document(plan)
    back = again(tmp_path_factory.mktemp("plan"), data, program)
    assert back.notes == ()
    assert back.plan.timeline == plan.timeline
    assert back.plan.memory == plan.memory
    assert back.plan.collectives == plan.collectives
    assert document(back.plan) == data


@pytest.mark.parametrize("layout", ["", "batch:x", "batch:x,heads:y,mlp:y,vocab:y"])
def test_a_training_step_read_back_is_the_same_plan(tmp_path: Path, layout: str, program: Program):
    plan = make_plan(program, MESH, V5E, layout)
    back = again(tmp_path, document(plan), program).plan
    # Casts to what a TPU multiplies are priced by themselves where what they read is open.
    assert back.timeline.compute == pytest.approx(plan.timeline.compute, rel=1e-3)
    assert back.timeline.exposed == plan.timeline.exposed and back.memory == plan.memory
    assert back.given and not plan.given
    assert document(back) == document(plan)


def test_a_mapping_that_is_not_the_default_is_kept(tmp_path: Path):
    program = small.trained()
    other = mappings(chip("v5p"), (2, 4, 2))[-1]
    mesh = Mesh.parse("2x4x2")
    plan = make_plan(program, mesh, chip("v5p"), topology=other)
    assert again(tmp_path, document(plan), program).plan.topology == other


FORCED = Collectives.asked("standard", ["all_gather=dma", "all_reduce=torus"])


def by_algorithms(data: dict[str, Any], move: str) -> tuple[dict[str, str], str]:
    """A value's algorithms by move, and the one whose name starts with the move's."""
    return next(
        (chosen, text)
        for region in data["regions"]
        for chosen in region.get("algorithms", {}).values()
        for text in chosen
        if re.search(move, text)
    )


def test_what_runs_each_move_is_kept(tmp_path: Path, program: Program):
    layout = "batch:x,heads:y,mlp:y,vocab:y"
    plan = make_plan(program, MESH, V5E, layout, collectives=FORCED)
    data = document(plan)
    assert data["collectives"] == {"choose": "standard", "forced": dict(FORCED.forced)}
    ran = {(c.kind, c.axis, c.algorithm) for c in plan.collectives}
    assert {("all_reduce", "x", "standard"), ("all_reduce", "y", "torus")} <= ran
    assert "dma" in {c.algorithm for c in plan.collectives if c.kind == "all_gather"}
    back = again(tmp_path, data, program).plan
    assert back.collectives == plan.collectives and document(back) == data
    # One that is taken out of the file is run by XLA's own again, whatever was asked for then.
    for region in data["regions"]:
        region.pop("algorithms", None)
    assert {c.algorithm for c in again(tmp_path, data, program).plan.collectives} == {"standard"}


@pytest.mark.parametrize(
    ("move", "name", "said"),
    [
        (r"\+sum:y", "ring3", "no algorithm 'ring3' runs all_reduce; one of ring,"),
        (r"\+sum:y", "shifts", "no algorithm 'shifts' runs all_reduce"),
        (r"\+sum:x", "torus", "torus cannot run on the 2 devices of x"),
        (r"\+sum:y", "dma", "dma is a kernel of TPUs, and h100 is a GPU"),
    ],
)
def test_an_algorithm_that_cannot_run_a_move_is_refused(
    tmp_path: Path, program: Program, move: str, name: str, said: str
):
    all_rings = Collectives.asked("standard", ["all_reduce=ring"])
    of = chip("h100") if name == "dma" else V5E
    data = document(make_plan(program, MESH, of, "batch:x,heads:y,mlp:y", collectives=all_rings))
    chosen, text = by_algorithms(data, move)
    chosen[text] = name
    with pytest.raises(NeoccError, match=said):
        again(tmp_path, data, program)


def test_the_order_of_a_ring_is_kept(tmp_path: Path, program: Program):
    asked = Collectives.asked(forced=["attention=ring"])
    plan = make_plan(program, MESH, V5E, "batch:x,seq:y", collectives=asked)
    ring = MESH.sizes[1]
    assert plan.ready.zigzag == ring
    data = document(plan)
    assert data["zigzag"] == ring
    back = again(tmp_path, data, program).plan
    assert back.collectives == plan.collectives and document(back) == data
    data["zigzag"] = 3
    with pytest.raises(NeoccError, match="zigzag: 3: the program has no sequences in the order"):
        again(tmp_path, data, program)
    del data["zigzag"]
    with pytest.raises(NeoccError, match="the plan is of a region with other ops"):
        again(tmp_path, data, program)


def test_what_runs_inside_products_is_kept(tmp_path: Path, program: Program):
    asked = Collectives.asked(forced=["all_gather=products", "reduce_scatter=products"])
    rules = tensor_parallel(MESH)[1].rules
    plan = make_plan(program, MESH, V5E, rules=rules, collectives=asked)
    inside = [c for c in plan.collectives if c.inside]
    assert {c.kind for c in inside} == {"all_gather", "reduce_scatter"}
    data = document(plan)
    back = again(tmp_path, data, program).plan
    assert back.collectives == plan.collectives and document(back) == data
    # The gather of something that no product reads.
    alone = next(c for c in plan.collectives if c.kind == "all_gather" and not c.inside)
    value, op = next(
        (v, op)
        for v, op in resharded(plan.program, plan.partitioned.program)
        if op.attrs["id"] == alone.id
    )
    names = next(n for n in program_names(plan.program) if value in n.values.values())
    entry = next(name for name, v in names.values.items() if v is value)
    region = next(r for r in data["regions"] if r["name"] == names.body.name)
    move = move_text(layout_of(op.operands[0]), layout_of(op.result), MESH)
    region.setdefault("algorithms", {}).setdefault(entry, {})[move] = "products"
    with pytest.raises(NeoccError, match="is to run inside products, and has none beside it"):
        again(tmp_path, data, program)


def test_an_algorithm_of_a_move_that_a_plan_does_not_make_is_refused(
    tmp_path: Path, data: dict[str, Any], program: Program
):
    region = data["regions"][0]
    value = next(iter(region["moves"]))
    region["algorithms"] = {value: {"batch:y -> ": "ring"}}
    with pytest.raises(NeoccError, match=r"the plan has no move 'batch:y -> .*' of it"):
        again(tmp_path, data, program)


def test_lines_may_move(tmp_path: Path, data: dict[str, Any], program: Program):
    """A comment in the model shifts the lines by which the file calls its ops."""
    text = re.sub(r"gpt\.py:(\d)", r"gpt.py:9\1", json.dumps(data))
    back = again(tmp_path, json.loads(text), program)
    assert document(back.plan)["regions"] == data["regions"]


def test_constants_are_no_part_of_the_model_and_dims_are():
    import dataclasses

    tiny = gpt.PRESETS["tiny"]
    one, faster, wider = (
        neocc.simplify(gpt.train_step(dataclasses.replace(tiny, **change)))
        for change in ({}, {"lr": 7e-3}, {"mlp": 64} if hasattr(tiny, "mlp") else {"embd": 64})
    )
    assert fingerprint(one) == fingerprint(faster) != fingerprint(wider)


# Changes


def group(data: dict[str, Any], region: str, start: str) -> tuple[dict[str, str], str]:
    """The strategies of a region, and the one of them whose name starts like that."""
    (found,) = [r for r in data["regions"] if r["name"] == region]
    return found["strategies"], next(n for n in found["strategies"] if n.startswith(start))


def test_a_changed_strategy_is_costed_with_moves_of_its_own(
    tmp_path: Path, plan: Plan, data: dict[str, Any], program: Program
):
    table, name = group(data, "layers forward", FC)
    assert table[name] == "batch:x, mlp:y"
    table[name] = "batch:x"
    back = again(tmp_path, data, program)
    op = next(
        op
        for op in back.plan.partitioned.program.body.walk()
        if op.kind == "einsum" and op.loc and op.loc.line == line('w["fc"]')
    )
    assert op.attrs["strategy"] == parse_strategy_text("batch:x", MESH)
    assert back.plan.timeline.step > plan.timeline.step
    assert any("edited by hand" in note for note in back.notes)
    assert len(back.plan.collectives) > len(plan.collectives)


def test_a_weight_stored_otherwise_is_moved_where_it_is_used(
    tmp_path: Path, plan: Plan, data: dict[str, Any], program: Program
):
    data["stored"]["h0.mlp.fc"] = "embd:x, mlp:y"
    back = again(tmp_path, data, program).plan
    layout = back.partitioned.program.input_value("h0.mlp.fc").type.layout
    assert layout == parse_layout_text("embd:x, mlp:y", MESH)
    gathers = [c for c in back.collectives if c.tensor == "h0.mlp.fc" and c.kind == "all_gather"]
    assert gathers
    assert back.memory.by_kind["parameters"] < plan.memory.by_kind["parameters"]


@given(st.data())
@settings(max_examples=20)
def test_any_legal_change_computes_what_the_program_computes(
    tmp_path_factory: pytest.TempPathFactory, drawn: st.DataObject
):
    made = drawn.draw(st.sampled_from([small.mlp, small.residual, small.layers, small.trained]))()
    mesh = Mesh.parse(drawn.draw(st.sampled_from(["2", "2x2"])))
    plan = make_plan(made, mesh, V5E)
    data = document(plan)
    regions = {n.body.name: n for n in program_names(plan.program)}
    region = drawn.draw(st.sampled_from([r for r in data["regions"] if r["strategies"]]))
    name = drawn.draw(st.sampled_from(sorted(region["strategies"])))
    first = regions[region["name"]].groups[name].ops[0]
    option = drawn.draw(st.sampled_from(strategies(first, mesh)))
    region["strategies"][name] = cuts_text(option.axes, mesh)
    try:
        back = again(tmp_path_factory.mktemp("plan"), data, made).plan
    except NeoccError as error:
        assert "partial sum" in error.message
        return
    inputs = inputs_for(made, np.random.default_rng(0))
    found = unpad_outputs(made, simulate(back.partitioned, pad_inputs(back.program, inputs)))
    for output, value in run_numpy(made, inputs).items():
        assert_close(found[output], value, 1e-4)
    # No layout is faster than the one that was proved to be the fastest.
    assert back.timeline.step >= plan.timeline.step * (1 - 1e-6) - 1e-8


# Refusals: what is there, what is wrong with it


def first_strategy(data: dict[str, Any], text: str) -> None:
    table, name = group(data, "layers forward", FC)
    table[name] = text


def loop(data: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in data["regions"] if r["name"] == "layers forward")


def carried(data: dict[str, Any], text: str) -> None:
    loop(data)["arguments"]["carried 0"] = text


def a_move(data: dict[str, Any], moves: list[str]) -> None:
    loop(data)["moves"]["carried 0"] = moves


ILLEGAL: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "no such dim": (
        lambda d: first_strategy(d, "batch:x, heads:y"),
        ("layers forward", FC, "'heads'", "it can along"),
    ),
    "does not divide": (
        lambda d: first_strategy(d, "batch:x, batch:y"),
        (FC, "'batch'", "into 8", "size 4"),
    ),
    "no such axis": (lambda d: first_strategy(d, "batch:z"), ("'z'", "x, y")),
    "an axis twice": (lambda d: first_strategy(d, "batch:x, mlp:x"), ("'x'", "two things")),
    "no form": (lambda d: first_strategy(d, "batch"), ("'batch'", "dim:axis")),
    "partial into what is not linear": (
        lambda d: loop(d)["strategies"].update(
            {next(n for n in loop(d)["strategies"] if n.startswith("reduce gpt.py")): "+0:x"}
        ),
        ("reduce gpt.py", "partial sum", "reduce it before"),
    ),
    "partial into a product": (
        lambda d: first_strategy(d, "+0:x"),
        (FC, "partial sum", "reduce it before"),
    ),
    "stored as a partial sum": (
        lambda d: d["stored"].update({"h0.mlp.fc": "+sum:x"}),
        ("'h0.mlp.fc'", "partial sum"),
    ),
    "stored along a dim that it has not": (
        lambda d: d["stored"].update({"h0.mlp.fc": "vocab:x"}),
        ("'h0.mlp.fc'", "'vocab'", "layers=2"),
    ),
    "stored along the loop's dim": (
        lambda d: d["stored"].update({"h0.mlp.fc": "layers:x"}),
        ("'h0.mlp.fc'", "'layers'", "loop"),
    ),
    "a loop's argument that does not divide": (
        lambda d: carried(d, "batch:x, batch:y"),
        ("layers forward", "'carried 0'", "into 8", "size 4"),
    ),
    "a loop's argument that is partial": (
        lambda d: carried(d, "batch:x, +sum:y"),
        ("layers forward", "'carried 0'", "partial sum"),
    ),
    "no such input": (
        lambda d: d["stored"].update({"h0.mlp.fq": ""}),
        ("'h0.mlp.fq'", "did you mean 'h0.mlp.fc'"),
    ),
    "an input is left out": (lambda d: d["stored"].pop("h0.mlp.fc"), ("nothing of 'h0.mlp.fc'",)),
    "an op is left out": (
        lambda d: loop(d)["strategies"].pop(
            next(n for n in loop(d)["strategies"] if n.startswith(FC))
        ),
        (f"no strategy for '{FC}",),
    ),
    "no such op": (
        lambda d: loop(d)["strategies"].update({f"{FC}0 h9": ""}),
        (f"'{FC}0 h9'", "did you mean"),
    ),
    "a move that is none": (
        lambda d: a_move(d, ["batch:x -> seq:x, embd:y"]),
        ("moves of 'carried 0'", "no one collective"),
    ),
    "a move that is no text": (lambda d: a_move(d, ["batch:x"]), ("is no move",)),
    "a value that is not there": (
        lambda d: loop(d)["moves"].update({"carried 7": ["batch:x ->"]}),
        ("'carried 7'", "did you mean"),
    ),
    "regions of another program": (lambda d: d["regions"].pop(), ("regions", "layers backward")),
    "ops of another program": (
        lambda d: loop(d)["ops"].pop(),
        ("layers forward", "other ops", "plan again"),
    ),
    "microbatches": (lambda d: d.update(microbatches=4), ("regions", "microbatch forward")),
    "recomputation": (lambda d: d.update(saved={"h": "recompute"}), ("saved: 'h'",)),
    "a shape of devices": (
        lambda d: d["devices"].update(shape=[1, 4, 4, 1]),
        ("devices", "1x4x4x1", "8 devices"),
    ),
    "two positions on one device": (
        lambda d: d["devices"]["axes"].update(x=[[2, 2, 1]], y=[[2, 4, 1]]),
        ("devices", "a device of its own"),
    ),
    "a mesh of another size": (
        lambda d: d["devices"]["axes"].update(x=[]),
        ("devices", "mesh of 1x4"),
    ),
}


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: case.replace(" ", "-"))
def test_an_illegal_plan_is_refused_with_the_reason(
    case: str, tmp_path: Path, data: dict[str, Any], program: Program
):
    change, said = ILLEGAL[case]
    data = copy.deepcopy(data)
    change(data)
    with pytest.raises(NeoccError) as caught:
        again(tmp_path, data, program)
    assert caught.value.message.startswith(str(tmp_path / "plan.json"))
    for words in said:
        assert words in caught.value.message


def test_an_op_fused_with_another_names_the_one_to_change(
    tmp_path: Path, plan: Plan, data: dict[str, Any], program: Program
):
    names = next(n for n in program_names(plan.program) if n.body.name == "layers forward")
    labels = {op: name for name, op in names.ops.items()}
    first, cluster = next((n, c) for n, c in names.groups.items() if len(c.ops) > 1)
    loop(data)["strategies"][labels[cluster.ops[1]]] = "batch:x"
    with pytest.raises(NeoccError, match="is fused with") as caught:
        again(tmp_path, data, program)
    assert repr(first) in caught.value.message


# Plans for something else


def test_another_mesh_chip_and_model_are_told_apart(
    tmp_path: Path, data: dict[str, Any], program: Program
):
    file = read(written(tmp_path, data))
    with pytest.raises(NeoccError, match="for the mesh x:2,y:4, not for x:4,y:2"):
        plan_of(file, program, Mesh.parse("4x2"), V5E)
    with pytest.raises(NeoccError, match="for v5e, not for v5p"):
        plan_of(file, program, None, chip("v5p"))
    with pytest.raises(NeoccError, match="another model: that has a dim"):
        plan_of(file, small.mlp(), None, V5E)


def test_another_version_is_noted_and_another_schema_refused(
    tmp_path: Path, data: dict[str, Any], program: Program
):
    older = again(tmp_path, {**data, "neocc": "0.0.9"}, program)
    assert any("neocc 0.0.9" in note for note in older.notes)
    with pytest.raises(NeoccError, match=r"schema 99, written by neocc '0.1.0'.* reads schema 1"):
        again(tmp_path, {**data, "schema": 99}, program)


def test_figures_that_are_no_longer_so_are_noted(
    tmp_path: Path, data: dict[str, Any], program: Program
):
    faster = {**data["predicted"], "step": data["predicted"]["step"] / 2}
    (note,) = again(tmp_path, {**data, "predicted": faster}, program).notes
    assert "the cost model has changed" in note
    (note,) = again(tmp_path, {**data, "predicted": faster, "hardware": "sha256:0"}, program).notes
    assert "the figures of v5e have changed" in note


# Files that are no plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "holds no JSON object"),
        ('{"kind": "neocc plan", "kind": "neocc plan"}', "'kind' is there twice"),
        ('{"kind": "something"}', "is no plan"),
        ('{"kind": "neocc plan", "schema": 1}', "has no 'neocc'"),
    ],
)
def test_what_is_no_plan_is_told(tmp_path: Path, text: str, said: str):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(NeoccError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"microbatches": 0}, "microbatches is 0; it must be at least 1"),
        ({"microbatches": True}, "microbatches is true; it must be an integer"),
        ({"stored": []}, r"stored is \[\]; it must be an object"),
        ({"stored": {"w": 3}}, "stored.w is 3; it must be a string"),
        ({"saved": {"h": "forget"}}, 'one of "keep", "recompute"'),
        ({"what": 1}, "'what', which means nothing here"),
    ],
)
def test_a_plan_of_another_form_is_told_with_the_place(
    tmp_path: Path, data: dict[str, Any], change: dict[str, Any], said: str
):
    with pytest.raises(NeoccError, match=said):
        read(written(tmp_path, {**data, **change}))


def test_decisions_leave_out_what_follows(plan: Plan):
    """A cast of a weight that is cast where it lies needs no entry of its own."""
    entries = sum(len(r.strategies) for r in decisions(plan).regions)
    groups = sum(len(n.groups) for n in program_names(plan.program))
    assert 0 < entries < groups


def test_errors_of_the_algebra_are_layout_errors():
    with pytest.raises(LayoutError):
        parse_layout_text("batch:x, +mean:y", MESH)


def test_a_partial_sum_asked_of_what_is_whole_is_told(tmp_path: Path):
    """The sum of two gradients may pass partial sums on; not where the products are cut."""
    made = small.trained()
    data = document(make_plan(made, Mesh.parse("2"), V5E))
    table, name = group(data, "layers backward", "add")
    table[name] = "+0+1:x"
    for other in table:
        if other != name:
            table[other] = ""
    with pytest.raises(NeoccError, match=r"asks for '\+sum:x' of it.*cut that op instead"):
        again(tmp_path, data, made)
