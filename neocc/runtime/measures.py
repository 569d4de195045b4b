"""What is measured of a language model: LAMBADA, word perplexity, loss and bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neocc.ir.errors import NeoccError
from neocc.runtime.evaluate import Piece, Scorer, windows

Seen = Callable[[int, int], None]  # how many are done, of how many
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Lambada:
    """Of passages whose last word is to be found (Paperno et al., 2016): the share where each of
    its tokens is the likeliest, and exp of the mean of -log of its probability."""

    passages: int
    accuracy: float
    perplexity: float


@dataclass(frozen=True)
class Corpus:
    """Of documents. ``loss``: mean of -log of the probability of a token; per word, exp of the sum
    over the number of words, spaces apart, of the text as it was."""

    documents: int
    tokens: int
    words: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    word_perplexity: float


def pair(context: str, continuation: str, encode: Encode) -> Piece:
    """A continuation's tokens as they are in the whole; a space between belongs to it."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = encode(context)
    return Piece(before, encode(context + continuation)[len(before) :])


def lambada(scorer: Scorer, texts: Sequence[str], encode: Encode, seen: Seen) -> Lambada:
    """Raises:
    NeoccError: there is no text, or one of a single word.
    """
    pieces = []
    for number, text in enumerate(texts, 1):
        context, space, word = text.strip().rpartition(" ")
        if not space:
            raise NeoccError(f"passage {number} has no word before its last: {text!r}")
        pieces.append(pair(context, f" {word}", encode))
    if not pieces:
        raise NeoccError("there is no passage")
    scores = scorer.score(pieces, lambda done: seen(done, len(pieces)))
    mean = sum(s.logp for s in scores) / len(scores)
    return Lambada(len(scores), sum(s.greedy for s in scores) / len(scores), exponential(-mean))


def corpus(
    scorer: Scorer,
    texts: Sequence[str],
    encode: Encode,
    before: int | None,
    seen: Seen,
    clean: Callable[[str], str] = lambda text: text,
) -> Corpus:
    """``before``: a token that each document begins behind, if the model has one; ``clean``: what
    is scored in a text's place; its words and bytes are counted as they were.

    Raises:
        NeoccError: no document has two tokens, or one before which one stands.
    """
    pieces: list[Piece] = []
    for text in texts:
        pieces += windows(encode(clean(text)), before, scorer.context)
    if not pieces:
        raise NeoccError("there is no text to score")
    scores = scorer.score(pieces, lambda done: seen(done, len(pieces)))
    total = -math.fsum(s.logp for s in scores)
    tokens = sum(len(p.tokens) for p in pieces)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return Corpus(
        len(texts),
        tokens,
        words,
        size,
        total / tokens,
        exponential(total / tokens),
        total / math.log(2) / size,
        exponential(total / words),
    )


def exponential(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# Wikitext sets signs apart and marks those inside words and numbers: ` @-@ `, ` @,@ `, ` @.@ `.
MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
ENDS = (":", ";", ".", "!", "?", ",")  # with a space after them
ENCLOSED = (r"\(\s*([^\)]*?)\s*\)", r"\[\s*([^\]]*?)\s*\]", r"{\s*([^}]*?)\s*}",
            r"\"\s*([^\"]*?)\s*\"", r"'\s*([^']*?)\s*'")  # fmt: skip
AROUND = ("()", "[]", "{}", '""', "''")
REST = {"= = = =": "====", "= = =": "===", "= =": "==", " \u00b0 ": "\u00b0", " \n": "\n",
        "\n ": "\n", " N ": " 1 ", " 's": "'s"}  # fmt: skip


def wikitext(text: str) -> str:
    """Wikitext as plain text, by the rules that published word perplexities follow (Megatron-LM's,
    which the lm-evaluation-harness has too)."""
    text = text.replace("s '", "s'")
    for mark, sign in MARKS.items():
        text = text.replace(mark, sign)
    for sign in ENDS:
        text = text.replace(f" {sign} ", f"{sign} ")
    for pattern, (left, right) in zip(ENCLOSED, AROUND, strict=True):
        text = re.sub(pattern, lambda m, a=left, b=right: f"{a}{m[1]}{b}", text)
    for old, new in REST.items():
        text = text.replace(old, new)
    return text
