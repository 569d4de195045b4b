"""``neocc train``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

from benchmarks.train_curves import stdlib_text
from neocc.cli import app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(stdlib_text()[:20_000])
    return path


def train(text: Path, *more: str, mesh: str = "1x1") -> Result:
    jax.devices()  # started with eight devices: the command must not set another number
    arguments = ["train", "gpt.py", "--preset", "tiny", "--mesh", mesh, "--text", str(text)]
    return CliRunner().invoke(app, [*arguments, *more])


def test_it_prints_the_loss_and_logs_every_step(text: Path, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    result = train(text, "--steps", "12", "--set", "layers=1", "--log", str(log))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["tokens"] == 4 * 16 and line["seconds"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    last = result.output.splitlines()[-1]
    assert last.startswith(f"12 steps: loss {lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}, ")
    assert last.endswith(" tokens/s")


def test_a_cut_plan_is_described(text: Path):
    more = ("--layout", "vocab:x", "--tokens", "bpe", "--vocab", "301")
    result = train(text, "--steps", "1", "--set", "layers=1", *more, mesh="2")
    assert result.exit_code == 0, result.output
    assert "2 simulated devices" in result.output
    assert "padded vocab: 301 -> 302" in result.output
    assert "all-reduce" in result.output


def test_a_loss_that_is_not_finite_ends_with_code_1(text: Path, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    result = train(text, "--lr", "1e30", "--steps", "5", "--log", str(log))
    assert result.exit_code == 1
    step = len(log.read_text().splitlines())
    assert f"step {step}: the loss is nan; try a lower learning rate" in result.output
    assert json.loads(log.read_text().splitlines()[-1])["loss"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", "gone.txt"], "cannot read the text gone.txt"),
        (["--seq", "30000"], "the text has 20000 tokens; one batch"),
        (["--seq", "0"], "--seq"),
        (["--batch", "0"], "--batch"),
        (["--vocab", "100"], "need a vocab of 256; the model has 100"),
        (["--set", "vocab=100"], "need a vocab of 256; the model has 100"),
        (["--tokens", "words"], "one of bytes, bpe"),
        (["--set", "layrs=2"], "did you mean 'layers'"),
        (["--mesh", "4x"], "mesh '4x'"),
        (["--mesh", "4x4"], "a mesh of 16 simulated devices: JAX has already started with 8"),
        (["--layout", "btch:x"], "did you mean 'batch'"),
        (["--target", "v9"], "unknown chip 'v9'"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_bad_input_ends_with_code_2_and_nothing_written(
    text: Path, tmp_path: Path, more: list[str], message: str
):
    log = tmp_path / "log.jsonl"
    result = train(text, "--log", str(log), *more)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not log.exists()


HOST = "from neocc.backends.cpu.host import host_devices\nimport jax\n"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(len(host_devices(6)), len(jax.devices()))", "6 6"),
        ("jax.devices('cpu'); print(len(host_devices(1)))", "1"),
    ],
)
def test_host_devices(code: str, printed: str):
    assert run_python(HOST + code) == printed


def test_host_devices_asked_for_too_late():
    code = "jax.numpy.zeros(1)\ntry: host_devices(3)\nexcept Exception as e: print(e)"
    assert "JAX has already started with 1. Ask for them before" in run_python(HOST + code)


def run_python(code: str) -> str:
    """In a process of its own, where JAX has not started."""
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
