"""``neocc evaluate``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

from neocc.cli import app
from tests.frontends import hf_models

CONFIG = hf_models.NEO | {
    "vocab_size": 256, "num_layers": 1, "attention_types": [[["local"], 1]],
}  # fmt: skip


def run(*arguments: object) -> Result:
    jax.devices()  # started with eight devices: the command must not set another number
    return CliRunner().invoke(app, ["evaluate", *(str(a) for a in arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    hf_models.write(tmp_path / "neo", CONFIG, hf_models.tensors(CONFIG))
    (tmp_path / "last.jsonl").write_text('{"text": "a big cat"}\n{"text": "it is so"}\n')
    (tmp_path / "wiki.txt").write_text(" = A = \n \n It is , so . \n")
    (tmp_path / "t.txt").write_text("some text that is longer than the context of the model")
    (tmp_path / "bad.jsonl").write_text('{"page": 3}\n')
    return tmp_path


def test_all_measures_at_once_and_as_json(folder: Path):
    common = ("neo", "--mesh", "2x2", "--batch", 2, "--text", "t.txt", "--wikitext", "wiki.txt")
    result = run(*common, "--lambada", "last.jsonl", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["lambada"]["passages"] == 2 and 0 <= found["lambada"]["accuracy"] <= 1
    text = found["text"]
    assert (text["documents"], text["bytes"], text["tokens"]) == (1, 54, 53)
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"]))
    assert text["bits_per_byte"] == pytest.approx(text["loss"] * 53 / 54 / math.log(2))
    assert found["wikitext"]["words"] == 10 and found["wikitext"]["tokens"] < 27
    told = run("neo", "--mesh", 1, "--lambada", "last.jsonl", "--text", "t.txt", "--limit", 1)
    assert told.stdout.startswith("lambada: 1 passages, accuracy ")
    loss = re.search(r"loss ([\d.]+)", told.stdout)
    assert loss and float(loss[1]) == pytest.approx(text["loss"], abs=1e-4)
    assert "note: the first token of a document is not scored" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neo"], "say what to evaluate on: --lambada, --wikitext or --text FILE"),
        (["neo", "--text", "gone"], "cannot read gone"),
        (["neo", "--lambada", "gone"], "cannot read gone"),
        (["neo", "--wikitext", "bad.jsonl"], "bad.jsonl:1: no JSON object with a text 'page'"),
        (["gone", "--text", "t.txt"], "there is nothing at gone"),
        (["neo", "--lambada", "wiki.txt"], "has no word before its last"),
    ],
)
def test_bad_input_ends_with_code_2(arguments: list, message: str, folder: Path):
    (folder / "wiki.txt").write_text("alone\n")
    result = run(*arguments, "--mesh", 1)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
