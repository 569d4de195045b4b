"""A text file becomes tokens, the same ones each time; what cannot is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.train_curves import stdlib_text
from neocc.data import read_text
from neocc.data.text import bpe_tokens, byte_tokens
from neocc.ir.errors import NeoccError


@given(st.binary(max_size=100))
def test_byte_tokens_are_the_bytes(data: bytes):
    text = byte_tokens(data, None)
    assert text.tokens.dtype == np.int32
    assert bytes(text.tokens.tolist()) == data


def test_bpe_is_learnt_from_the_text_alike_each_time():
    data = stdlib_text()[:50_000]
    one, two = bpe_tokens(data, 400), bpe_tokens(data, 400)
    assert one.vocab == 400 and np.array_equal(one.tokens, two.tokens)
    assert one.tokens.dtype == np.int32
    assert one.tokens.min() >= 0 and 256 <= one.tokens.max() < 400
    assert len(one.tokens) < 0.8 * len(data)


def test_bpe_of_a_text_with_few_pairs_has_fewer_tokens():
    assert bpe_tokens(b"ab ab ab", 5000).vocab < 300


def test_a_file_is_read(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\x00\xffab")
    assert read_text(path).tokens.tolist() == [0, 255, 97, 98]


@pytest.mark.parametrize(
    ("tokens", "vocab", "data", "message"),
    [
        ("bytes", 100, b"ab", r"bytes tokens need a vocab of 256; the model has 100"),
        ("words", None, b"ab", r"no tokens 'words'; one of bytes, bpe"),
        ("bpe", 255, b"ab", r"a vocab of 256 or more, not 255"),
        ("bpe", None, b"ab", r"a vocab of 256 or more, not None"),
        ("bpe", 300, b"\xff", r"UTF-8.*byte tokens"),
    ],
)
def test_refused(tmp_path: Path, tokens: str, vocab: int | None, data: bytes, message: str):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(NeoccError, match=message):
        read_text(path, tokens, vocab)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(NeoccError, match=r"cannot read the text .*gone.txt: No such file"):
        read_text(tmp_path / "gone.txt")


def test_bpe_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(NeoccError, match="pip install"):
        bpe_tokens(b"ab", 300)
