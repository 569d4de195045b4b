"""Text to tokens, tokens to batches."""

from neocc.data.batches import Batches
from neocc.data.text import BYTES, TOKENIZERS, Text, read_text

__all__ = ["BYTES", "TOKENIZERS", "Batches", "Text", "read_text"]
