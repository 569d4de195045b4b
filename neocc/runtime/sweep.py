"""Plan a model on every mesh of several chip counts, with several batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from neocc.cost.choice import STANDARD_ONLY, Collectives
from neocc.cost.hardware import Chip
from neocc.passes.plan import Plan
from neocc.passes.search import Tried, meshes_of, parts_of, search
from neocc.passes.simplify import simplify
from neocc.runtime.compilation import Model

SECONDS = 3.0  # of each search within memory: a gap that is left is told


@dataclass(frozen=True, eq=False)
class Row:
    """What a mesh can do with a batch (None: the model's own): its best plan in some number of
    parts, or why it has none. ``tokens`` of a step."""

    chips: int
    batch: int | None
    tokens: int
    tried: Tried

    @property
    def plan(self) -> Plan | None:
        plan = self.tried.plan
        return plan if plan is not None and plan.fits else None


def sweep(
    model: Model,
    target: Chip,
    chips: Sequence[int],
    batches: Sequence[int | None] = (None,),
    layout: str = "",
    memory: float | None = None,
    watch: Callable[[int, int], None] = lambda done, of: None,
    collectives: Collectives = STANDARD_ONLY,
) -> Iterator[Row]:
    """The rows of each chip count and batch, the fastest first. ``watch(done, of)``: meshes.
    ``collectives``: what may run them; where none can on a mesh, that mesh has no plan.

    Raises:
        NeoccError: the model or the layout is not right.
        HardwareError: no slice of the chip has as many devices.
    """
    meshes = {count: meshes_of(target, count) for count in chips}
    total = len(batches) * sum(map(len, meshes.values()))
    before = 0
    for batch in batches:
        asked = model if batch is None else model.with_fields(batch=batch)
        program = simplify(asked.train_step())
        named = program.named_inputs
        tokens = max((v.type.size for i, v in named if i.role == "data"), default=0)
        for count in chips:
            done = before

            def seen(part: int, of: int, done: int = done, size: int = len(meshes[count])) -> None:
                watch(done + part * size // of, total)

            found = search(
                program, target, meshes[count], parts_of(program), layout, memory, True, seen,
                SECONDS, collectives=collectives,
            )  # fmt: skip
            before += len(meshes[count])
            rows = (Row(count, batch, tokens, tried) for tried in one_of_each(found.tried))
            yield from sorted(rows, key=speed)


def one_of_each(tried: Iterable[Tried]) -> list[Tried]:
    """Of each mesh the fastest number of parts that fits, else what came of the first; with the
    bound of all numbers of parts."""
    best: dict[object, Tried] = {}
    bounds: dict[object, float] = {}
    for t in tried:
        bounds[t.mesh] = min(t.bound, bounds.get(t.mesh, math.inf))
        other = best.get(t.mesh)
        if other is None or rank(t) < rank(other):
            best[t.mesh] = t
    return [replace(t, bound=bounds[mesh]) for mesh, t in best.items()]


def rank(t: Tried) -> tuple[int, float]:
    if t.plan is None:
        return (2, t.bound)
    return (not t.plan.fits, t.plan.timeline.step if t.plan.fits else t.plan.memory.peak)


def speed(row: Row) -> tuple[int, float]:
    return rank(row.tried)


def frontier(rows: Sequence[Row]) -> set[Row]:
    """Rows that no other one beats: with no more chips and no more memory, more tokens a second
    (or as many with less)."""

    def figures(row: Row, plan: Plan) -> tuple[float, float, float]:
        return (row.chips, plan.memory.peak, plan.timeline.step / max(row.tokens, 1))

    known = [(row, figures(row, row.plan)) for row in rows if row.plan is not None]
    return {
        row
        for row, mine in known
        if not any(
            o != mine and all(a <= b for a, b in zip(o, mine, strict=True)) for _, o in known
        )
    }
