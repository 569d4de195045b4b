"""Text to tokens and back, as a model's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neocc.data.text import BYTES
from neocc.ir.errors import NeoccError

FILE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
END = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """``encode`` a text, ``decode`` tokens, the ``token`` called like a text if there is one;
    ``vocab``: how many there are."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    token: Callable[[str], int | None]
    vocab: int


def byte_tokenizer() -> Tokenizer:
    """A token for each byte of UTF-8, as ``neocc train`` has them."""

    def token(text: str) -> int | None:
        data = text.encode()
        return data[0] if len(data) == 1 else None

    def decode(tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < BYTES).decode("utf-8", "replace")

    return Tokenizer(lambda text: list(text.encode()), decode, token, BYTES)


def of_library(made: Any) -> Tokenizer:
    """One of the package ``tokenizers``. Special tokens are not left out of a text."""
    return Tokenizer(
        lambda text: made.encode(text, add_special_tokens=False).ids,
        lambda tokens: made.decode(list(tokens), skip_special_tokens=False),
        made.token_to_id,
        made.get_vocab_size(),
    )


def find_tokenizer(place: Path) -> Path | None:
    """The tokenizer's file in a checkpoint's folder, if it has one."""
    for name in (FILE, VOCAB):
        if (place / name).is_file():
            return place / name
    return None


def read_tokenizer(given: str | None, checkpoint: Path, vocab: int | None) -> Tokenizer:
    """``bytes``, a tokenizer.json, a vocab.json with its merges.txt, or a folder that has one;
    where none is given, what lies beside the checkpoint, or bytes if its vocab has no more.

    Raises:
        NeoccError: there is none, it cannot be read, it needs the package ``tokenizers``, or has
            more tokens than the model's ``vocab``.
    """
    if given == "bytes":
        return checked(byte_tokenizer(), "bytes", vocab)
    path = checkpoint if given is None else Path(given)
    found = find_tokenizer(path) if path.is_dir() else path
    if given is None and found is None:
        if vocab == BYTES:
            return byte_tokenizer()
        raise NeoccError(
            f"{checkpoint} has no tokenizer ({FILE}, or {VOCAB} and {MERGES}): give --tokenizer, a "
            "file, a folder or bytes"
        )
    if found is None or not found.is_file():
        raise NeoccError(f"there is no tokenizer at {path}: a {FILE}, or {VOCAB} and {MERGES}")
    return checked(of_library(from_file(found)), str(found), vocab)


def checked(tokenizer: Tokenizer, name: str, vocab: int | None) -> Tokenizer:
    if vocab is not None and tokenizer.vocab > vocab:
        raise NeoccError(f"{name} has {tokenizer.vocab} tokens; the model's vocab is {vocab}")
    return tokenizer


def from_file(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise NeoccError(
            f"{path} needs the package `tokenizers`: pip install 'neocc[hf]'"
        ) from None
    merges = path.with_name(MERGES)
    if path.name == VOCAB and not merges.is_file():
        raise NeoccError(f"{path} goes with {MERGES}, which is not beside it")
    try:
        if path.name != VOCAB:
            return tokenizers.Tokenizer.from_file(str(path))
        # GPT-2's files: byte pairs, and one token that stands for no text.
        made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(path), str(merges)))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        if made.token_to_id(END) is not None:
            made.add_special_tokens([END])
        return made
    except Exception as error:  # the library raises its own and plain exceptions
        raise NeoccError(f"{path} is no tokenizer that `tokenizers` reads: {error}") from None
