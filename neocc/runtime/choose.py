"""Choose a token by its logits: the greatest, or at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neocc.ir.errors import NeoccError


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen. ``temperature`` 0: the one with the greatest logit. Else one is drawn,
    with logits divided by it, among the ``top_k`` greatest (with those that equal the last of
    them), and among the fewest that have ``top_p`` of the probability together.

    What is drawn depends on the seed, the number of the sequence, how many tokens it has so far
    and the logits: not on the mesh, nor on what else is in the batch.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise NeoccError(f"a temperature of {self.temperature}; 0 is the least")
        if self.top_k is not None and self.top_k < 1:
            raise NeoccError(f"the {self.top_k} greatest logits; 1 is the least")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise NeoccError(f"top-p {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise NeoccError(f"seed {self.seed} is not between 0 and {2**64 - 1}")

    def pick(self, logits: np.ndarray, sequence: int, number: int) -> int:
        """The token for logits[vocab] that a sequence gets as its ``number``-th new one."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        scaled = self.kept(logits.astype(np.float64) / self.temperature)
        # The raw words of a counter-based generator: NumPy promises that they stay as they are.
        key = np.array([self.seed, (sequence << 32) + number], np.uint64)
        words = np.random.Philox(key=key).random_raw(len(scaled)) >> np.uint64(11)
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return int(np.argmax(scaled - np.log(-np.log(uniform))))

    def kept(self, logits: np.ndarray) -> np.ndarray:
        """The logits, minus infinity where a token is not to be drawn."""
        if self.top_k is not None and self.top_k < len(logits):
            least = np.partition(logits, -self.top_k)[-self.top_k]
            logits = np.where(logits >= least, logits, -np.inf)
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-logits, kind="stable")
            p = np.exp(logits[order] - logits[order[0]])
            before = np.cumsum(p) - p
            dropped = order[before >= self.top_p * p.sum()]
            logits = logits.copy()
            logits[dropped] = -np.inf
        return logits
