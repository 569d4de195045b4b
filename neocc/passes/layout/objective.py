"""What the solver minimises beside seconds, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass

from neocc.ir.mesh import Layout
from neocc.passes.layout.problem import Choice, Flow, Option, Problem

TIE = 5e-8  # seconds that a cut counts for, so that of equal plans the one that reads well wins

MICRO = 1e6  # the program is in microseconds: columns near 1 suit the solver


@dataclass(frozen=True)
class Limit:
    """A memory row: bytes that options hold, and that targets of moves hold, at one point."""

    name: str
    limit: float
    options: dict[Choice, list[float]]
    moves: dict[Flow, dict[Layout, float]]


def ugliness(problem: Problem, choice: Choice, option: Option) -> float:
    """Cuts of an option: a dim that less of the program has counts more (``head_dim`` after
    ``heads`` after ``embd``), and so do several dims rather than one. To be off is best."""
    if option is None:
        return 0.0
    cuts = [p for p in option.axes if p is not None]
    common = [d.name for d in sorted(choice.dims, key=lambda d: -problem.frequency[d.name])]
    ranks = sum(common.index(p) for p in cuts if isinstance(p, str) and p in common)
    return choice.can_be_off + len(cuts) + 0.5 * ranks + 0.25 * max(0, len(set(cuts)) - 1)
