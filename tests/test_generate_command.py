"""``neocc generate``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

from neocc.cli import app
from neocc.cli.generate import Text
from tests.frontends import hf_models

CONFIG = hf_models.NEO | {
    "vocab_size": 256, "num_layers": 1, "attention_types": [[["local"], 1]], "eos_token_id": 3,
}  # fmt: skip


def run(*arguments: object) -> Result:
    jax.devices()  # started with eight devices: the command must not set another number
    return CliRunner().invoke(app, ["generate", *(str(a) for a in arguments)])


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return hf_models.write(tmp_path / "neo", CONFIG, hf_models.tensors(CONFIG))


def test_one_prompt_is_continued_and_several_are_told_apart(weights: Path):
    common = (weights, "--mesh", 1, "--max-new-tokens", 5, "--seed", 2, "--tokenizer", "bytes")
    lines = run(*common, "--prompt", "Hi", "--prompt", "you", "--json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [f["prompt"] for f in found] == ["Hi", "you"] and [f["number"] for f in found] == [0, 1]
    for f in found:
        assert bytes(f["tokens"]).decode("utf-8", "replace") == f["text"]
        assert f["end"] == "stop" or len(f["tokens"]) == 5
    (weights / "p.txt").write_text("Hi\n\nyou\n")
    told = run(*common, "--prompts", weights / "p.txt", "--batch", 1).stdout
    assert told == "".join(f"[{f['number']}] {f['prompt']}{f['text']}\n" for f in found)
    alone = run(*common, "--prompt", "Hi").stdout
    assert alone == f"Hi{found[0]['text']}\n"
    stop = found[0]["tokens"][2]
    ended = run(*common, "--prompt", "Hi", "--json", "--stop", stop).stdout
    first = found[0]["tokens"].index(stop)
    assert json.loads(ended)["tokens"] == found[0]["tokens"][:first]


def test_a_character_is_shown_when_all_of_it_is_there():
    text = Text("", lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    shown = [text.add(b, None) for b in "aé€".encode()]
    assert shown == ["a", "", "é", "", "", "€"] and text.shown == "aé€"
    assert text.add(0xE2, "length") == "\ufffd"
    assert text.as_json(4)["end"] == "length"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neo"], "give --prompt, once or more often, or --prompts FILE"),
        (["neo", "--prompt", "a", "--prompts", "p"], "give --prompt, once"),
        (["neo", "--prompt", ""], "prompt 0 has no token"),
        (["neo", "--prompts", "gone"], "cannot read gone"),
        (["neo", "--prompts", "empty"], "empty has no prompt"),
        (["neo", "--prompts", "bad.jsonl"], "bad.jsonl:2: no JSON object with a text 'prompt'"),
        (["gone", "--prompt", "a"], "there is nothing at gone"),
        (["neo", "--prompt", "a", "--top-p", 2], "top-p 2.0 is not above 0"),
        (["neo", "--prompt", "a", "--stop", "ab"], "--stop 'ab' is no token"),
        (["neo", "--prompt", "a", "--tokenizer", "gone"], "there is no tokenizer at gone"),
        (["neo", "--prompt", "a", "--layout", "heads:z"], "layout 'heads:z'"),
        (["neo", "--prompt", "a" * 9, "--max-new-tokens", 9], "the context of neo is 16"),
    ],
)
def test_bad_input_ends_with_code_2(arguments: list, message: str, weights: Path):
    Path("empty").write_text("\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    result = run(*arguments, "--mesh", 1)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
