"""A text file as token ids: its bytes, or byte pairs learnt from the text itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neocc.ir.errors import NeoccError

BYTES = 256


@dataclass(frozen=True, eq=False)
class Text:
    """A text as ``tokens[position]`` (i32), each below ``vocab``."""

    tokens: np.ndarray
    vocab: int


def byte_tokens(data: bytes, vocab: int | None) -> Text:
    return Text(np.frombuffer(data, np.uint8).astype(np.int32), BYTES)


def bpe_tokens(data: bytes, vocab: int | None) -> Text:
    """Byte-level BPE with at most ``vocab`` tokens: fewer where the text has no more pairs."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise NeoccError(
            "BPE tokens need the package `tokenizers`: pip install 'neocc[hf]'; or use byte tokens"
        ) from None
    if vocab is None or vocab < BYTES:
        raise NeoccError(f"BPE on bytes needs a vocab of {BYTES} or more, not {vocab}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NeoccError(f"BPE needs a text in UTF-8: {error}; or use byte tokens") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator([text], trainer)
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    return Text(ids, tokenizer.get_vocab_size())


TOKENIZERS: dict[str, Callable[[bytes, int | None], Text]] = {
    "bytes": byte_tokens,
    "bpe": bpe_tokens,
}


def read_text(path: Path, tokens: str = "bytes", vocab: int | None = None) -> Text:
    """The file's text as tokens of a kind in ``TOKENIZERS``; ``vocab``: the most that there may
    be of them.

    Raises:
        NeoccError: no such file or kind, the kind needs a larger vocab, a text that is not UTF-8,
            or a package that is not installed.
    """
    if tokens not in TOKENIZERS:
        raise NeoccError(f"no tokens {tokens!r}; one of {', '.join(TOKENIZERS)}")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise NeoccError(f"cannot read the text {path}: {error.strerror}") from None
    text = TOKENIZERS[tokens](data, vocab)
    if vocab is not None and text.vocab > vocab:
        raise NeoccError(
            f"{tokens} tokens need a vocab of {text.vocab}; the model has {vocab}: "
            f"--vocab {text.vocab}"
        )
    return text
