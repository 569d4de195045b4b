"""Scores against a plain forward pass; what LAMBADA, Wikitext and texts come to."""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import chip
from neocc.frontends.weights.load import loaded
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.runtime.evaluate import Piece, Scorer, windows
from neocc.runtime.measures import corpus, lambada, pair, wikitext
from tests.frontends import hf_models

CONFIG = hf_models.NEO | {
    "max_position_embeddings": 40, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
W = hf_models.tensors(CONFIG)
PIECES = [
    Piece([3], [5, 9, 2]),
    Piece([1, 2, 3, 4, 5], [6]),
    Piece(list(range(20)), list(range(30, 50))),
    Piece(list(range(35)), list(range(12))),  # the context loses its first tokens
    Piece([7, 7], [7] * 40),
]
LAYOUTS = {"1": "", "2x4": "batch:x,heads:y,vocab:y"}


@cache
def scorer(mesh: str = "1") -> Scorer:
    with tempfile.TemporaryDirectory() as folder:
        path = hf_models.write(Path(folder) / "neo", CONFIG, W)
        with loaded(path) as (model, saved):
            made = Scorer(model, saved, Mesh.parse(mesh), chip("v5e"), 2, LAYOUTS[mesh])
            made.compiled(32), made.compiled(40)
            return made


def plainly(piece: Piece) -> tuple[float, list[int]]:
    """Log probability of a piece's tokens, and the likeliest one at each place, in float64."""
    line = [*piece.context, *piece.tokens][-41:]
    logits = hf_models.logits(CONFIG, W, np.array([line[:-1]]))[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    count = len(piece.tokens)
    places = np.arange(len(line) - 1 - count, len(line) - 1)
    return float(logp[places, line[-count:]].sum()), logits[places].argmax(-1).tolist()


def likeliest(context: list[int], count: int) -> Piece:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(plainly(Piece(context, [*tokens, 0]))[1][-1])
    return Piece(context, tokens)


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_scores_are_those_of_a_plain_forward_pass(mesh: str):
    """In any order, batches that are not full, programs of two lengths, a padded vocabulary."""
    greedy = likeliest([4, 2], 3)
    pieces = [*PIECES, greedy, Piece(greedy.context, [*greedy.tokens[:-1], 0])]
    seen: list[int] = []
    found = scorer(mesh).score(pieces, seen.append)
    for piece, score in zip(pieces, found, strict=True):
        logp, best = plainly(piece)
        assert score.logp == pytest.approx(logp, rel=1e-5)
        assert score.greedy == (best == list(piece.tokens))
    assert [s.greedy for s in found[-2:]] == [True, False]
    assert seen[-1] == len(pieces)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece([], [1]), "piece 1 has 1 tokens behind 0"),
        (Piece([1], []), "piece 1 has 0 tokens behind 1"),
        (Piece([1], [1] * 41), "piece 1 has 41 tokens behind 1: 1 to 40"),
    ],
)
def test_pieces_that_cannot_be_scored_are_refused(piece: Piece, message: str):
    with pytest.raises(NeoccError, match=message):
        scorer().score([PIECES[0], piece])


@given(st.integers(0, 60), st.integers(1, 9), st.booleans())
def test_windows_score_each_token_once_behind_what_precedes_it(
    count: int, context: int, prefixed: bool
):
    tokens = list(range(100, 100 + count))
    found = windows(tokens, 7 if prefixed else None, context)
    scored = [t for p in found for t in p.tokens]
    assert scored == (tokens if prefixed else tokens[1:])
    line = [7, *tokens]
    for piece in found:
        whole = [*piece.context, *piece.tokens]
        assert piece.context and len(whole) <= context + 1
        at = line.index(whole[0])
        assert line[at : at + len(whole)] == whole
    if len(found) > 1:
        last = found[-1]
        assert len(last.context) + len(last.tokens) == context + 1


def encode(text: str) -> list[int]:
    return [b % 61 for b in text.encode()]


def test_lambada_is_the_last_word_behind_the_others():
    texts = ["a big cat", "the cat sat "]
    found = lambada(scorer(), texts, encode, lambda done, of: None)
    pieces = [Piece(encode("a big"), encode(" cat")), Piece(encode("the cat"), encode(" sat"))]
    logs = [plainly(p)[0] for p in pieces]
    assert found.perplexity == pytest.approx(math.exp(-sum(logs) / 2), rel=1e-4)
    assert (found.passages, found.accuracy) == (2, 0.0)
    with pytest.raises(NeoccError, match="passage 2 has no word before its last: 'alone'"):
        lambada(scorer(), ["a b", "alone"], encode, lambda done, of: None)
    assert pair("a big ", "cat", encode) == pieces[0]


def test_a_corpus_counts_words_and_bytes_of_the_text_as_it_was():
    texts, clean = ["so it is , at 3 @,@ 000 .\n", "x" * 70], wikitext
    found = corpus(scorer(), texts, encode, 60, lambda done, of: None, clean)
    pieces = [p for t in texts for p in windows(encode(clean(t)), 60, 40)]
    total = -sum(plainly(p)[0] for p in pieces)
    assert (found.documents, found.words, found.bytes) == (2, 11, 26 + 70)
    assert found.tokens == len(clean(texts[0])) + 70
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / found.tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 96, rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(total / 11), rel=1e-3)
    with pytest.raises(NeoccError, match="there is no text to score"):
        corpus(scorer(), ["a"], encode, None, lambda done, of: None)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a , b . c ; d", "a, b. c; d"),
        ("well @-@ known 3 @.@ 5 and 1 @,@ 000", "well-known 3.5 and 1,000"),
        ("( like this ) , \" that \" ' and '", "(like this), \"that\" 'and'"),
        (" = = Head = = \n text \n", " == Head ==\ntext\n"),
        ("the dogs ' bone", "the dogs' bone"),
        ("Bob 's own", "Bob's own"),
    ],
)
def test_wikitext_becomes_plain_text(raw: Any, text: str):
    assert wikitext(raw) == text
