"""Tokenizers: which one is taken, and what it makes of texts."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from neocc.data.tokenizer import read_tokenizer
from neocc.ir.errors import NeoccError

TEXT = "the cat sat on the mat. Ünïcode, and the end"


def written(folder: Path) -> Path:
    """A small byte-pair tokenizer as the library saves it, and as GPT-2's two files."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator([TEXT] * 3, trainer)
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    made.save(str(folder / "one" / "tokenizer.json"))
    made.model.save(str(folder / "two"))
    return folder


def test_a_text_comes_back_whichever_files_there_are(tmp_path: Path):
    folder = written(tmp_path)
    one = read_tokenizer(None, folder / "one", 300)
    two = read_tokenizer(str(folder / "two"), folder / "gone", 300)
    file = read_tokenizer(str(folder / "one" / "tokenizer.json"), folder / "gone", None)
    tokens = one.encode(TEXT)
    assert len(tokens) < len(TEXT.encode()) and one.decode(tokens) == TEXT
    assert two.encode(TEXT) == file.encode(TEXT) == tokens and two.decode(tokens) == TEXT
    end = one.token("<|endoftext|>")
    assert end is not None and two.token("<|endoftext|>") == end
    assert two.encode("a<|endoftext|>")[-1] == end
    assert one.token("no such token") is None


def test_bytes_need_no_file_where_the_vocab_is_of_bytes(tmp_path: Path):
    found = read_tokenizer(None, tmp_path, 256)
    assert found.decode(found.encode(TEXT)) == TEXT and found.vocab == 256
    assert found.token("a") == 97 and found.token("ab") is None
    assert read_tokenizer("bytes", tmp_path, 300).decode([72, 105, 299]) == "Hi"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "has no tokenizer .*: give --tokenizer"),
        ("gone", "there is no tokenizer at gone"),
        (".", "there is no tokenizer at ."),
        ("bytes", "bytes has 256 tokens; the model's vocab is 64"),
        ("tokenizer.json", "no tokenizer that `tokenizers` reads"),
        ("sub/vocab.json", "goes with merges.txt, which is not beside it"),
    ],
)
def test_what_cannot_be_read_is_told(
    given: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    if given not in (None, "."):
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "sub" / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(NeoccError, match=message):
        read_tokenizer(given, tmp_path / "empty", 64)


def test_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NeoccError, match=r"needs the package `tokenizers`: pip install 'neocc\[hf"):
        read_tokenizer(None, tmp_path, None)
