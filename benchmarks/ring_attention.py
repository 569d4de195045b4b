"""Ring attention in whole training steps: what the plan predicts, and what the TPU compiler makes.

    python -m benchmarks.ring_attention [--only 0] [--write FILE] [--hlo FOLDER]

Of each case up to three plans: ``gathered``, the best one where keys and values are gathered
wherever the sequence is cut in attention; ``ring``, where they may also go round; and ``layout``,
that plan's layout with keys and values gathered. All are compiled for the chip by its real
compiler; where the planner takes no ring there is one plan, and nothing is compiled.

causes: seconds of ``exposed``: of transfers that cannot hide, of the share of the others that never
does, of what finds no compute to hide behind, of the permutes of rings within their turns, and of
those to another order or home.

pairs: starts and ends of permutes in the text; overlapped: those with a matrix product between.
cycles: the compiler's estimates with trip counts, in seconds of its clock. Of collectives it gives
no estimate, so the cost model's prices go through its schedule: alone, seconds of those that it
starts and ends at once; waited: in which it stands at the end of one that runs meanwhile, each
direction of an axis carrying one at a time; behind: what passes meanwhile. sent: bytes that a
device sends in a step; columns: of the solver's program.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.schedule import Schedule, arguments, as_planned, schedule, sent_bytes
from models import gpt
from neocc.backends.target import compile_for_target
from neocc.cost.choice import Collectives
from neocc.cost.hardware import chip
from neocc.cost.rounds import permute_seconds
from neocc.ir.mesh import Mesh, Strategy
from neocc.ir.ops import ATTENTION
from neocc.lower.audit import device_pairs, ids_of
from neocc.lower.hlo import Collective, read_hlo
from neocc.passes.decisions import decisions
from neocc.passes.plan import Plan, Ready, bodies, compute_of, make_plan
from neocc.passes.recost import recost

RESULTS = Path(__file__).parent / "results" / "ring_attention.json"
OWN = [f"{kind}=standard" for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")]
MODES = {
    "gathered": Collectives.asked("standard"),
    "ring": Collectives.asked("auto", OWN),  # nothing else of neocc's own
}

SEQ, MEMORY = "seq", "memory"  # the model's dims of queries and of keys


@dataclass(frozen=True)
class Case:
    preset: str
    seq: int
    batch: int
    target: str
    mesh: str


CASES = (
    Case("gpt3-175b", 32768, 2, "v5p", "8x16"),
    Case("gpt3-13b", 32768, 8, "v5e", "8x16"),
    Case("gpt3-175b", 8192, 4, "v5p", "8x16"),
    Case("gpt3-xl", 65536, 2, "v5e", "8x8"),
    Case("gpt3-175b", 2048, 512, "v5p", "8x16"),
    Case("gpt3-xl", 2048, 512, "v5e", "8x16"),
)


@dataclass(frozen=True)
class Predicted:
    """Of one plan; seconds and bytes of one device's step."""

    attention: tuple[str, ...]
    step: float
    compute: float
    exposed: float
    hidden: float
    peak: int
    columns: int
    solving: float
    causes: dict[str, float]
    permutes: float  # seconds of all that rings send
    within: float  # those of them that pass behind the op's products
    replaced: float  # seconds of the gathers and scatters whose place they take


@dataclass(frozen=True)
class Compiled(Schedule):
    flops: int
    peak: int
    sent: dict[str, int]
    as_planned: bool


def planned(case: Case, mode: str) -> Plan:
    config = replace(gpt.PRESETS[case.preset], seq=case.seq, batch=case.batch)
    program, mesh = gpt.train_step(config), Mesh.parse(case.mesh)
    return make_plan(program, mesh, chip(case.target), collectives=MODES[mode])


def predicted(plan: Plan) -> Predicted:
    ops = [op for op in plan.partitioned.program.body.walk() if op.kind in ATTENTION]
    rings = [c for c in plan.collectives if c.pairs]
    t = plan.timeline
    return Predicted(
        tuple(f"{op.kind} {op.attrs['strategy']}" for op in ops),
        *(t.step, t.compute, t.exposed, t.hidden, plan.memory.peak),
        plan.solution.whole.columns,
        plan.solution.seconds,
        causes(plan),
        sum(c.seconds * c.count for c in rings),
        sum(c.within * c.count for c in rings),
        sum(c.standard * c.count for c in rings),
    )


def causes(plan: Plan) -> dict[str, float]:
    """What a plan's exposed seconds come from."""
    compute, share = compute_of(plan.problem, plan.solution), plan.problem.cost.overlap
    found: dict[str, float] = defaultdict(float)
    for body in bodies(plan.problem.program.body):
        here = [c for c in plan.collectives if c.region == body.name]
        can = sum(c.behind for c in here)
        found["cannot hide"] += sum(c.seconds * c.count - c.behind for c in here if not c.pairs)
        found["never hides"] += (1 - share) * can
        found["no compute left"] += max(0.0, share * can - compute.get(body.region, 0.0))
        for c in here:
            if c.pairs:
                what = "turns" if c.dim == MEMORY else "swaps"
                found[what] += (c.seconds - c.within) * c.count
    return dict(found)


def gathered_in(plan: Plan, ready: Ready) -> Plan:
    """A plan's layout with keys and values gathered in place of rings; ``ready``: of the same
    program, with its sequences as they come."""
    made = decisions(plan)

    def stays(name: str) -> bool:
        return name.split()[0] != "reorder"

    def plain(name: str, s: Strategy) -> Strategy:
        ring = name.split()[0] in ATTENTION and MEMORY in s.axes
        return s.replace(s.axes.index(MEMORY), SEQ) if ring else s

    regions = tuple(
        replace(
            r,
            ops=tuple(filter(stays, r.ops)),
            strategies={n: plain(n, s) for n, s in r.strategies.items() if stays(n)},
            moves={n: moves for n, moves in r.moves.items() if stays(n)},
        )
        for r in made.regions
    )
    given = replace(made, regions=regions, zigzag=None)
    return recost(ready, given, plan.memory_limit).plan


def turn(plan: Plan, c: Collective) -> float:
    """Seconds of a permute of a ring, by the cost model; 0 of any other."""
    cost = plan.problem.cost
    for row in plan.collectives:
        own = row.pairs and [row.id] == ids_of(c) and row.bytes == c.operand_bytes
        if own and device_pairs(row, plan.mesh) == frozenset(c.groups):
            links = cost.links[cost.mesh.index(row.axis)]
            return min(permute_seconds(row.pairs, row.bytes, link) for link in links)
    return 0.0


def compiled(plan: Plan, kept: Path | None) -> Compiled:
    """Compiles a plan, or reads what was ``kept`` of that, and walks the schedule."""
    peaks = kept and kept.with_suffix(".peak")
    if kept and peaks and kept.exists():
        text, peak = kept.read_text("utf-8"), int(peaks.read_text())
    else:
        target = compile_for_target(plan)
        text, peak = target.hlo, target.peak
        if kept and peaks:
            kept.write_text(text, "utf-8")
            peaks.write_text(str(peak))
    facts = read_hlo(text)
    found = schedule(plan, facts, text, lambda c: turn(plan, c))
    return Compiled(
        **asdict(found),
        flops=facts.flops,
        peak=peak,
        sent=sent_bytes(facts),
        as_planned=as_planned(plan, facts),
    )


def main() -> None:
    args = arguments(__doc__, RESULTS)
    known = json.loads(args.write.read_text("utf-8")) if args.write.exists() else []
    for number in args.only or range(len(CASES)):
        case = CASES[number]
        plans = {mode: planned(case, mode) for mode in MODES}
        row: dict[str, object] = {"case": asdict(case)}
        takes = any(c.pairs for c in plans["ring"].collectives)
        if takes:
            plans["layout"] = gathered_in(plans["ring"], plans["gathered"].ready)
        for mode, plan in plans.items():
            said = asdict(predicted(plan))
            if takes:
                made = compiled(plan, args.hlo and args.hlo / f"{number}-{mode}.txt")
                said["compiled"] = {"step": made.step, **asdict(made)}
            row[mode] = said
            print(case, mode, json.dumps(said), flush=True)
        known = [r for r in known if r["case"] != row["case"]] + [row]
        args.write.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
