"""Ring attention in whole training steps: what the plan predicts, and what the TPU compiler makes.

    python -m benchmarks.ring_attention [--only 0] [--write FILE] [--hlo FOLDER]

Of each case two plans: ``gathered``, the best one where keys and values are gathered wherever the
sequence is cut in attention, and ``ring``, where they may also go round. Both are compiled for the
chip by its real compiler; where the planner takes no ring there is one plan, and nothing is
compiled.

pairs: starts and ends of permutes in the text; overlapped: those with a matrix product between.
cycles: the compiler's estimates with trip counts, in seconds of its clock. Of collectives it gives
no estimate, so the cost model's prices go through its schedule: alone, seconds of those that it
starts and ends at once; waited: in which it stands at the end of a permute, each direction of an
axis carrying one block at a time. sent: bytes that a device sends in a step; columns: of the
solver's program.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.auto_sharding_judge import CLOCK, seconds
from benchmarks.schedule import Stood, arguments, as_planned, sent_bytes, step_of, walk
from models import gpt
from neocc.backends.target import compile_for_target
from neocc.cost.choice import PREMIUM, Collectives
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.ir.ops import ATTENTION
from neocc.lower.audit import SCOPE, device_pairs
from neocc.lower.hlo import HloFacts, read_hlo
from neocc.lower.hlo_text import Computation, Instruction, parse_module
from neocc.passes.plan import Plan, make_plan

RESULTS = Path(__file__).parent / "results" / "ring_attention.json"
OWN = [f"{kind}=standard" for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")]
MODES = {
    "gathered": Collectives.asked("standard"),
    "ring": Collectives.asked("auto", OWN),  # nothing else of neocc's own
}

AT_ONCE = "collective-permute"


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
    permutes: float  # seconds of all that rings send
    within: float  # those of them that pass behind the op's products
    replaced: float  # seconds of the gathers and scatters whose place they take


@dataclass(frozen=True)
class Compiled:
    cycles: float
    alone: float
    waited: float
    pairs: int
    overlapped: int
    flops: int
    peak: int
    sent: dict[str, int]
    as_planned: bool

    @property
    def step(self) -> float:
        return self.cycles + self.alone + self.waited


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
        sum(c.seconds * c.count for c in rings),
        sum(c.within * c.count for c in rings),
        sum(c.standard * c.count for c in rings),
    )


@dataclass(frozen=True)
class Walk:
    """The compiler's schedule of a plan's program."""

    plan: Plan
    text: str
    facts: HloFacts

    @cached_property
    def computations(self) -> dict[str, Computation]:
        return dict(parse_module(self.text).computations)

    @cached_property
    def multiplying(self) -> set[str]:
        """Computations with a matrix product, in what they call too."""
        found = {m.computation for m in self.facts.matmuls}
        size = -1
        while size < len(found):
            size = len(found)
            for name, computation in self.computations.items():
                if any(found.intersection(called(i)) for i in computation.instructions):
                    found.add(name)
        return found

    @cached_property
    def alone(self) -> dict[str, float]:
        """Seconds of each collective that is no permute."""
        found: dict[str, float] = defaultdict(float)
        for c in self.facts.collectives:
            if c.kind != "collective-permute":
                found[c.instruction] += seconds(c, self.plan.topology)
        return found

    def taken(self, inst: Instruction) -> tuple[str, float]:
        """The axis of a permute, and its seconds by the cost model."""
        ids = SCOPE.findall(inst.op_name)
        ends = inst.integers("source_target_pairs")
        pairs = frozenset(zip(ends[::2], ends[1::2], strict=True))
        for c in self.plan.collectives:
            own = ids and c.pairs and c.id == int(ids[-1])
            if own and device_pairs(c, self.plan.mesh) == pairs:
                return c.axis, c.seconds / PREMIUM
        return "", 0.0

    @cached_property
    def loops(self) -> dict[str, int]:
        """Cycles of each loop, all its runs."""
        return {loop.instruction: (loop.trip_count or 1) * loop.cycles for loop in self.facts.loops}

    def schedule(self, computation: Computation) -> Stood:
        """A permute that is started and ended at once is waited for whole."""
        clock = CLOCK[self.plan.chip.name]

        def lasts(inst: Instruction) -> float:
            if inst.opcode == AT_ONCE:
                return 0.0
            cycles = self.loops.get(inst.name, 0) or inst.estimated_cycles
            return cycles / clock + self.alone.get(inst.name, 0.0)

        def multiplies(inst: Instruction) -> bool:
            return inst.opcode != AT_ONCE and bool(self.multiplying.intersection(called(inst)))

        waited, pairs, overlapped = walk(computation, self.taken, lasts, multiplies)
        once = (i for i in computation.instructions if i.opcode == AT_ONCE)
        return waited + sum(self.taken(i)[1] for i in once), pairs, overlapped


def called(inst: Instruction) -> set[str]:
    return {name for attr in ("calls", "body", "to_apply") for name in inst.called(attr)}


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
    whole = Walk(plan, text, facts)
    waited, pairs, overlapped = step_of(facts, whole.computations.values(), whole.schedule)
    once = {c: seconds(c, plan.topology) for c in facts.collectives if c.instruction in whole.alone}
    return Compiled(
        cycles=facts.estimated_cycles / CLOCK[plan.chip.name],
        alone=sum(n * c.trip_count for c, n in once.items()),
        waited=waited,
        pairs=pairs,
        overlapped=overlapped,
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
