"""Score texts with a model on a mesh: log probabilities of what follows a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from neocc.backends.here import Here, present
from neocc.cost.hardware import Chip
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.lower.jax import Lowered
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.checkpoint import Checkpoint
from neocc.runtime.state import restore
from neocc.runtime.train import grow

SHORTEST = 32  # tokens of the smallest program


class Scorable(Protocol):
    """A model that scores: ``neocc.frontends.model_file.Model``, or the like."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any: ...

    def train_step(self) -> Program: ...

    def scoring(self, length: int) -> Program: ...

    def with_fields(self, **fields: Any) -> Scorable: ...


@dataclass(frozen=True)
class Piece:
    """Tokens to score behind a context of at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Score:
    """``logp``: the natural log of the probability of a piece's tokens; ``greedy``: whether each is
    the likeliest one."""

    logp: float
    greedy: bool


@dataclass(frozen=True)
class Compiled:
    plan: Plan
    lowered: Lowered
    run: Any
    parameters: dict[str, Any]


class Scorer:
    """A model on a mesh, ready to score ``batch`` pieces at a time. A piece runs in the shortest of
    a few programs that it fits, each planned when it is first needed."""

    def __init__(
        self,
        model: Scorable,
        saved: Checkpoint,
        mesh: Mesh,
        target: Chip,
        batch: int,
        layout: str = "",
        here: Here | None = None,
    ):
        self.model, self.saved, self.mesh, self.target = model, saved, mesh, target
        self.batch, self.layout, self.here = batch, layout, here or present()
        self.context: int = model.config.seq
        self.programs: dict[int, Compiled] = {}

    def score(
        self, pieces: Sequence[Piece], seen: Callable[[int], None] = lambda done: None
    ) -> list[Score]:
        """The score of each. A context that is too long loses its first tokens. ``seen`` is told
        how many are done.

        Raises:
            NeoccError: a piece has no context or no token, or more tokens than the model's context.
        """
        for number, piece in enumerate(pieces):
            if not piece.context or not 0 < len(piece.tokens) <= self.context:
                raise NeoccError(
                    f"piece {number} has {len(piece.tokens)} tokens behind {len(piece.context)}: 1 "
                    f"to {self.context} behind 1 or more are right"
                )
        lengths = [self.length(p) for p in pieces]
        order = sorted(range(len(pieces)), key=lambda i: lengths[i], reverse=True)
        found: dict[int, Score] = {}
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            scores = self.together([pieces[i] for i in some], max(lengths[i] for i in some))
            found.update(zip(some, scores, strict=True))
            seen(len(found))
        return [found[i] for i in range(len(pieces))]

    def length(self, piece: Piece) -> int:
        """Tokens of the program for a piece: a power of two, or the whole context."""
        given = min(len(piece.context) + len(piece.tokens) - 1, self.context)
        return min(max(SHORTEST, 2 ** (given - 1).bit_length()), self.context)

    def together(self, pieces: Sequence[Piece], length: int) -> Iterator[Score]:
        """Up to ``batch`` pieces in one run. Attention is causal, so what pads them is not seen."""
        made = self.compiled(length)
        tokens = np.zeros((self.batch, length), np.int32)
        labels = np.zeros((self.batch, length), np.int32)
        spans = []
        for row, piece in enumerate(pieces):
            line = [*piece.context, *piece.tokens][-(self.context + 1) :]
            end = len(line) - 1
            tokens[row, :end], labels[row, :end] = line[:-1], line[1:]
            spans.append(slice(end - len(piece.tokens), end))
        program = made.lowered.partitioned.program
        types = {i.name: v.type for i, v in program.named_inputs}
        data = {"tokens": tokens, "labels": labels}
        grown = {n: grow(a, types[n].shape) for n, a in data.items()}
        arrays = made.lowered.place({**made.parameters, **grown})
        out = dict(zip(program.outputs, made.run(*arrays), strict=True))
        logp, best = np.asarray(out["logp"]), np.asarray(out["best"])
        for row, span in enumerate(spans):
            total = math.fsum(logp[row, span].tolist())
            yield Score(total, bool((best[row, span] == labels[row, span]).all()))

    def compiled(self, length: int) -> Compiled:
        if length not in self.programs:
            program = simplify(self.model.with_fields(batch=self.batch).scoring(length))
            laid = self.here.topology(self.target, self.mesh)
            plan = make_plan(program, self.mesh, self.target, self.layout, topology=laid)
            lowered = self.here.lower(plan.partitioned, self.here.mesh(plan))
            compiled = self.here.compile(lowered)
            names = [i.name for i in program.inputs if i.role == "parameter"]
            parameters = restore(self.saved, self.model.train_step(), lowered, names)
            self.programs[length] = Compiled(plan, lowered, compiled, parameters)
        return self.programs[length]


def windows(tokens: Sequence[int], before: int | None, context: int) -> list[Piece]:
    """A text of any length as pieces that score each of its tokens once: the first behind the
    token ``before``, or not at all where there is none; the others behind what precedes them, as
    far as a window of ``context`` tokens begins there; the last window is full, so that its tokens
    have a long context."""
    line = [*([] if before is None else [before]), *tokens]
    found, done = [], 1
    while done < len(line):
        end = min(done + context, len(line))
        start = max(0, end - context - 1) if end == len(line) else done - 1
        found.append(Piece(line[start:done], line[done:end]))
        done = end
    return found
