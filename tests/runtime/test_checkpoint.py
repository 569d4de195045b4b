"""Checkpoints of runs: saved on one mesh, restored on another, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train_curves import batches
from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.checkpoint import ModelOf, read_checkpoint, whole
from neocc.runtime.safetensors import CheckpointError
from neocc.runtime.train import Run

CONFIG = gpt.Config(
    "small", 2, 16, 2, vocab=259, seq=32, batch=8, dtype="f32", lr=3e-3, warmup=2, steps=40
)
MODEL = ModelOf("gpt.py", "small", dataclasses.asdict(CONFIG))
LAYOUTS = {"2x4": "batch:x,vocab:y", "1x1": ""}


@functools.cache
def plan_of(mesh: str) -> Plan:
    program = simplify(gpt.train_step(CONFIG))
    return make_plan(program, Mesh.parse(mesh), chip("v5e"), LAYOUTS[mesh])


def begin(mesh: str, seed: int = 0) -> Run:
    return Run(plan_of(mesh), gpt.init(CONFIG), seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], Run]:
    """A run on 2x4, saved after 3 of 6 steps; the losses of all six."""
    run = begin("2x4")
    path = tmp_path_factory.mktemp("run") / "saved"
    losses = [r.loss for r in run.train(batches(CONFIG), 3)]
    run.save(path, MODEL, 3)
    return path, losses + [r.loss for r in run.train(batches(CONFIG), 3, 3)], run


def test_a_resumed_run_is_bit_equal_on_the_same_mesh(saved: tuple[Path, list[float], Run]):
    path, losses, first = saved
    run = begin("2x4", seed=9)
    run.restore(read_checkpoint(path))
    blocks = [b for a in run.state.values() for b in a.addressable_shards]
    assert len({b.data.unsafe_buffer_pointer() for b in blocks}) == len(blocks)  # no memory shared
    assert [r.loss for r in run.train(batches(CONFIG), 3, 3)] == losses[3:]
    for name, array in run.state.items():
        assert np.asarray(array).tobytes() == np.asarray(first.state[name]).tobytes(), name


def test_a_run_resumes_on_another_mesh(saved: tuple[Path, list[float], Run], tmp_path: Path):
    """Without padding there. Before it: one of another model, and the parameters alone."""
    path, losses, _ = saved
    run = begin("1x1", seed=9)
    other = copied(path, tmp_path / "other")
    edit(other, '"seq": 32', '"memory": 32')
    before = dict(run.state)
    with pytest.raises(
        CheckpointError, match=r"tensor 'wpe' of .* is f32\[memory=32.*has f32\[seq=32"
    ):
        run.restore(read_checkpoint(other))
    assert run.state == before
    run.restore(read_checkpoint(path), parameters_only=True)
    assert int(run.state["step"]) == 0 and not np.asarray(run.state["wte.m"]).any()
    assert np.array_equal(np.asarray(run.state["wte"]), read_checkpoint(path).tensors["wte"].read())
    run.restore(read_checkpoint(path))
    found = [r.loss for r in run.train(batches(CONFIG), 3, 3)]
    np.testing.assert_allclose(found, losses[3:], rtol=1e-5)
    with pytest.raises(CheckpointError, match="there already"):
        run.save(path, MODEL, 3)


def test_what_is_saved_has_no_padding_and_is_what_was_there(
    saved: tuple[Path, list[float], Run],
):
    path, _, _ = saved
    checkpoint = read_checkpoint(path)
    checkpoint.verify()
    assert checkpoint.step == 3 and int(checkpoint.tensors["step"].read()) == 3
    assert checkpoint.dims["wte"] == (("vocab", 259), ("embd", 16))
    assert checkpoint.dims["h0.attn.o.v"][0] == ("layers", 2)
    assert checkpoint.model.config == json.loads(json.dumps(MODEL.config))
    assert len(checkpoint.tensors) == 3 * len(gpt.weights(CONFIG)) + 1


def edit(path: Path, old: str, new: str) -> None:
    """Of the manifest, where it is of tensors or else before."""
    head, mark, tensors = (path / "manifest.json").read_text().partition('"tensors"')
    assert old in head + tensors
    head, tensors = (
        (head, tensors.replace(old, new, 1))
        if old in tensors
        else (head.replace(old, new), tensors)
    )
    (path / "manifest.json").write_text(head + mark + tensors)


def copied(path: Path, to: Path) -> Path:
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_files_that_are_not_whole_are_refused(saved: tuple[Path, list[float], Run], tmp_path: Path):
    path = copied(saved[0], tmp_path / "a")
    (weights,) = path.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"tensor 'step' .*truncated"):
        read_checkpoint(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'wte': its file .* is missing"):
        read_checkpoint(path)
    weights.write_bytes(data)
    manifest = path / "manifest.json"
    text = manifest.read_text()
    for change, message in {
        '"kind": "neocc checkpoint"|"kind": "neocc plan"': "kind is",
        '"vocab": 259|"vocab": 260': r"'wte' of .* says float32\[260, 16\]",
        '"file": "weights.safetensors"|"file": "../weights.safetensors"': "no file name",
        '"step": 3|"step": -3': "step is -3",
        '"wte": {|"wtf": {': "'wtf' is not in",
    }.items():
        manifest.write_text(text)
        edit(path, *change.split("|"))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
    manifest.write_text(text[:-20])
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_checkpoint(path)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        read_checkpoint(path)


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), whole(tmp_path / "x") as folder:
        (folder / "half").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole(tmp_path / "deep" / "x") as folder:
        (folder / "all").write_text(json.dumps(1))
    assert [p.name for p in (tmp_path / "deep" / "x").iterdir()] == ["all"]
