"""``neocc convert``, and ``neocc train`` from and to checkpoints: what they print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

from benchmarks.train_curves import stdlib_text
from neocc.cli import app
from tests.frontends import hf_models


def run(*arguments: object) -> Result:
    jax.devices()  # started with eight devices: train must not set another number
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(stdlib_text()[:5000])
    return path


@pytest.fixture
def neo(tmp_path: Path) -> Path:
    return hf_models.write(tmp_path / "neo", hf_models.NEO, hf_models.tensors(hf_models.NEO))


def test_it_says_what_it_converted(neo: Path, tmp_path: Path):
    result = run("convert", neo, tmp_path / "ours")
    assert result.exit_code == 0, result.output
    size = 4 * sum(a.size for a in hf_models.tensors(hf_models.NEO).values())
    assert f"neo (hf) -> {tmp_path / 'ours'} (neocc): 30 tensors, {size:,} bytes" in result.output
    result = run("convert", tmp_path / "ours", tmp_path / "back", "--to", "hf", "--shard", "30kB")
    assert result.exit_code == 0 and "56 tensors" in result.output
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "out"], "there is nothing at gone"),
        ([".", "out"], "nothing that neocc knows is at ."),
        (["neo", "out", "--to", "onnx"], "no kind of checkpoint 'onnx'; one of neocc, hf, mtf"),
        (["neo", "neo"], "neo is there already"),
        (["neo", "out", "--shard", "much"], "--shard 'much' is no amount"),
        (["neo", "out", "--config", "x.json"], "leave --config out"),
        (["neo", "out", "--model", "gone.py"], "no file 'gone.py'"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str], message: str, neo: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(neo.parent)
    result = run("convert", *arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not (neo.parent / "out").exists()


def test_training_goes_from_converted_weights_and_can_be_resumed(text: Path, tmp_path: Path):
    """The model is the checkpoint's where none is named."""
    config = hf_models.NEO | {
        "vocab_size": 256,
        "num_layers": 1,
        "attention_types": [[["local"], 1]],
    }
    neo = hf_models.write(tmp_path / "neo", config, hf_models.tensors(config))
    assert run("convert", neo, tmp_path / "ours").exit_code == 0
    common = ("train", "gpt.py", "--mesh", "1", "--text", text)
    more = ("--batch", 2, "--set", "steps=4", "--set", "warmup=1")
    saved, log = tmp_path / "saved", tmp_path / "log.jsonl"
    start = ("--init-from", tmp_path / "ours")
    result = run(*common, *more, "--steps", 2, *start, "--save", saved)
    assert result.exit_code == 0, result.output
    assert "initial parameters: " in result.output and "saved step 2 to " in result.output
    result = run(*common, *more, "--steps", 4, "--resume", saved, "--log", log)
    assert result.exit_code == 0, result.output
    assert "resumed at step 2" in result.output
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [3, 4]
    result = run(*common, *more, "--steps", 2, "--resume", saved)
    assert result.exit_code == 2 and "is of step 2: give more --steps" in result.output
    result = run(*common, *more, "--steps", 4, "--resume", saved, *start)
    assert result.exit_code == 2 and "not both" in result.output
    result = run("convert", saved, tmp_path / "back", "--to", "hf")
    assert result.exit_code == 0 and "neo (neocc, step 2)" in result.output
    assert "no optimizer state: left out" in result.output
