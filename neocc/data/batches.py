"""Batches of sequences out of one long text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neocc.ir.errors import NeoccError


@dataclass(frozen=True, eq=False)
class Batches:
    """``batch`` sequences of ``seq`` tokens per step, from pseudo-random places of
    ``tokens[position]``.

    What a step gets depends on the text, the seed and the step's number alone, so a run can go on
    from any step, and is the same on every mesh.
    """

    tokens: np.ndarray
    batch: int
    seq: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq < 1:
            raise NeoccError(f"a batch of {self.batch} sequences of {self.seq}: 1 is the least")
        need = self.batch * self.seq + 1  # the last position's label is one further
        if len(self.tokens) < need:
            raise NeoccError(
                f"the text has {len(self.tokens)} tokens; one batch of {self.batch} sequences of "
                f"{self.seq} needs {need}: give a longer text, or a smaller batch or seq"
            )

    def at(self, step: int) -> dict[str, np.ndarray]:
        """tokens[batch, seq] and labels[batch, seq], each position's next token, of a step."""
        # The raw words of a counter-based generator: NumPy promises that they stay as they are.
        key = np.array([self.seed, step], np.uint64)
        words = np.random.Philox(key=key).random_raw(self.batch)
        starts = (words % np.uint64(len(self.tokens) - self.seq)).astype(np.int64)
        window = starts[:, None] + np.arange(self.seq + 1)
        taken = self.tokens[window]
        return {"tokens": taken[:, :-1], "labels": taken[:, 1:]}
