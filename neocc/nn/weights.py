"""Parameters before they are there."""

from __future__ import annotations

from dataclasses import dataclass

from neocc.ir.types import Dim
from neocc.optim import Matrix


@dataclass(frozen=True)
class Weight:
    """A parameter: its dims, and how it starts: normal with ``std``, or all ``fill``.

    As a matrix: after ``stacked`` dims of layers, ``rows`` dims of what it is multiplied by.
    """

    dims: tuple[Dim, ...]
    std: float = 0.0
    fill: float = 0.0
    rows: int = 1
    stacked: int = 0

    @property
    def decays(self) -> bool:
        """Norms and biases, which start constant, are not decayed."""
        return self.std > 0

    @property
    def matrix(self) -> Matrix:
        own = self.dims[self.stacked :]
        return Matrix(self.dims[: self.stacked], own[: self.rows], own[self.rows :])
