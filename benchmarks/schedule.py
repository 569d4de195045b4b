"""A compiler's schedule, walked: what runs by itself, and how long it stands at ends of the others.

Of collectives a compiler gives no estimate: their seconds are the cost model's, and each direction
of a mesh axis carries one of them at a time.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.auto_sharding_judge import CLOCK, seconds, sent
from neocc.lower.audit import compiled_axes, pair
from neocc.lower.hlo import Collective, HloFacts
from neocc.lower.hlo_text import Computation, parse_module
from neocc.passes.plan import Plan

PERMUTE = "collective-permute"


@dataclass(frozen=True)
class Schedule:
    """Seconds of a device's step. cycles: the compiler's estimates with trip counts, by its clock;
    alone: collectives that it starts and ends at once; waited: in which it stands at the end of
    others; behind: those of the others that pass meanwhile. pairs: starts and ends of permutes in
    the text; overlapped: those with a matrix product between."""

    cycles: float
    alone: float
    waited: float
    behind: float
    pairs: int
    overlapped: int

    @property
    def step(self) -> float:
        return self.cycles + self.alone + self.waited


def schedule(
    plan: Plan,
    facts: HloFacts,
    text: str,
    permute: Callable[[Collective], float],
    clock: float | None = None,
) -> Schedule:
    """``text``: what was compiled of the plan, read as ``facts``; ``permute``: seconds of a permute
    by the plan's prices; ``clock``: cycles a second, by default the chip's."""
    clock = clock or CLOCK[plan.chip.name]

    def price(c: Collective) -> float:
        return permute(c) if c.kind == PERMUTE else seconds(c, plan.topology)

    prices = [(c, price(c)) for c in facts.collectives]
    begun: dict[str, list[tuple[Collective, float]]] = defaultdict(list)
    lasts: dict[str, float] = defaultdict(float)
    for c, taken in prices:
        if c.start:
            begun[c.start].append((c, taken))
        else:
            lasts[c.instruction] += taken
    for loop in facts.loops:
        lasts[loop.instruction] += (loop.trip_count or 1) * loop.cycles / clock
    trips = {loop.body: loop.executions * (loop.trip_count or 1) for loop in facts.loops}
    waited = 0.0
    for computation in parse_module(text).computations.values():
        once = walk(computation, begun, plan.mesh.sizes, lasts, clock)
        waited += once * trips.get(computation.name, 1)
    meanwhile = sum(taken * c.trip_count for c, taken in prices if c.start)
    permutes = [c for c in facts.collectives if c.start and c.kind == PERMUTE]
    return Schedule(
        cycles=facts.estimated_cycles / clock,
        alone=sum(taken * c.trip_count for c, taken in prices if not c.start),
        waited=waited,
        behind=meanwhile - waited,
        pairs=len(permutes),
        overlapped=sum(c.beside > 0 for c in permutes),
    )


def walk(
    computation: Computation,
    begun: dict[str, list[tuple[Collective, float]]],
    sizes: tuple[int, ...],
    lasts: dict[str, float],
    clock: float,
) -> float:
    """Seconds waited in one run of a computation, in the compiler's order. ``begun``: collectives
    and their seconds by the instruction that starts them; ``lasts``: of instructions, beside their
    cycles."""
    now = waited = 0.0
    free: dict[tuple[int, int], float] = defaultdict(float)  # when a direction of an axis is
    there: dict[str, float] = {}
    for inst in computation.instructions:
        for c, taken in begun.get(inst.name, ()):
            ways = [(a, w) for a in compiled_axes(c, sizes) or () for w in directions(c)]
            end = max(now, *(free[way] for way in ways), 0.0) + taken
            free.update(dict.fromkeys(ways, end))
            there[c.end] = max(end, there.get(c.end, 0.0))
        if inst.name in there:
            waited += max(0.0, there[inst.name] - now)
            now = max(now, there[inst.name])
        else:
            now += inst.estimated_cycles / clock + lasts.get(inst.name, 0.0)
    return waited


def directions(c: Collective) -> tuple[int, ...]:
    """Round an axis: of a permute upward or downward, as most devices send; else both."""
    if c.kind != PERMUTE:
        return 1, -1
    upward = sum((b > a) - (b < a) for a, b in c.groups)
    return (1,) if upward > 0 else (-1,)


def sent_bytes(facts: HloFacts) -> dict[str, int]:
    """Bytes that a device sends in a step, by kind of collective."""
    return counted((c.kind, round(sent(c)) * c.trip_count) for c in facts.collectives)


def counted(rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for kind, count in rows:
        found[kind] += count
    return dict(found)


def as_planned(plan: Plan, facts: HloFacts) -> bool:
    """Whether every collective and all FLOPs are the plan's."""
    return all(f.ok for f in pair(plan, facts)) and facts.flops == plan.flops


def arguments(about: str | None, results: Path) -> Any:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", type=int, action="append", help="numbers of cases")
    parser.add_argument("--write", type=Path, default=results)
    parser.add_argument(
        "--hlo", type=Path, help="a folder for what the compiler printed; what is there is read"
    )
    return parser.parse_args()
