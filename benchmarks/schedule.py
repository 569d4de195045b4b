"""A compiler's schedule, walked: how long it stands at ends of permutes, and what runs beside them.

Of permutes a compiler gives no estimate: their seconds are the caller's, and each direction of a
mesh axis carries one block at a time.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.auto_sharding_judge import sent
from neocc.lower.audit import pair
from neocc.lower.hlo import HloFacts
from neocc.lower.hlo_text import Computation, Instruction
from neocc.passes.plan import Plan

START, DONE = "collective-permute-start", "collective-permute-done"
Stood = tuple[float, int, int]
"""Seconds that a schedule stands at ends of permutes, its pairs of start and end, and how many of
these have a product between."""


def walk(
    computation: Computation,
    permute: Callable[[Instruction], tuple[str, float]],
    lasts: Callable[[Instruction], float],
    multiplies: Callable[[Instruction], bool],
) -> Stood:
    """One run of a computation, in the compiler's order. ``permute``: the mesh axis of a permute
    that starts, and its seconds; ``lasts``: seconds of what is neither start nor end of one;
    ``multiplies``: whether that has a matrix product in it."""
    now = waited = 0.0
    free: dict[tuple[str, int], float] = defaultdict(float)  # when a direction of an axis is
    under: dict[str, tuple[float, int]] = {}  # when each permute is there; products before it
    seen = pairs = overlapped = 0
    for inst in computation.instructions:
        if inst.opcode == START:
            axis, taken = permute(inst)
            way = axis, direction(inst)
            free[way] = max(now, free[way]) + taken
            under[inst.name] = (free[way], seen)
        elif inst.opcode == DONE:
            there, before = under[inst.operands[0]]
            waited += max(0.0, there - now)
            now = max(now, there)
            pairs += 1
            overlapped += seen > before
        else:
            now += lasts(inst)
            seen += multiplies(inst)
    return waited, pairs, overlapped


def step_of(
    facts: HloFacts, computations: Iterable[Computation], one: Callable[[Computation], Stood]
) -> Stood:
    """Of a whole step: waits as often as loops run, and the pairs in the text."""
    trips = {loop.body: loop.executions * (loop.trip_count or 1) for loop in facts.loops}
    waited, pairs, overlapped = 0.0, 0, 0
    for computation in computations:
        stood, found, beside = one(computation)
        waited += stood * trips.get(computation.name, 1)
        pairs, overlapped = pairs + found, overlapped + beside
    return waited, pairs, overlapped


def direction(inst: Instruction) -> int:
    """Round an axis: most devices send upward, or downward."""
    ends = inst.integers("source_target_pairs")
    upward = sum((b > a) - (b < a) for a, b in zip(ends[::2], ends[1::2], strict=True))
    return 1 if upward > 0 else -1


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
