"""Collectives inside products: what the plan predicts, and what the TPU compiler makes of it.

    python -m benchmarks.collective_matmul [--only 0] [--write FILE]

Of each case up to three steps are compiled for the chip by its real compiler: ``standard``, the
best plan without; ``products``, the plan that may run collectives inside products; ``layout``, that
plan's layout without them, where it is another one. Where the planner declines, ``declined`` is the
plan with all inside that can be, to see whether it was right.

pairs: starts and ends of permutes in the text; overlapped: those with a matrix product between.
cycles: the compiler's estimates with trip counts, in seconds of its clock. Of the rest it gives no
estimate, so the cost model's prices go through its schedule: alone, seconds of collectives that it
starts and ends at once; waited: in which it stands at the end of a permute or a gather that runs
meanwhile, each direction of an axis carrying one at a time (waiting: what the plan says of permutes
inside products); behind: what passes meanwhile (hidden: what the plan says of that). ``compiled``:
cycles, alone and waited. sent: bytes that a device sends in a step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.schedule import arguments, as_planned, counted, schedule, sent_bytes
from models import gpt
from neocc.backends.target import compile_for_target
from neocc.cost.choice import AUTO, STANDARD_ONLY, Collectives
from neocc.cost.hardware import chip
from neocc.cost.products import step_seconds
from neocc.ir.mesh import Mesh
from neocc.lower.audit import ids_of
from neocc.lower.hlo import Collective, read_hlo
from neocc.passes.layout.build import build
from neocc.passes.layout.memory import peak
from neocc.passes.layout.problem import Rules
from neocc.passes.layout.solve import solve
from neocc.passes.overlap import overlapped
from neocc.passes.plan import USABLE, Plan, costed, prepare

RESULTS = Path(__file__).parent / "results" / "collective_matmul.json"
LIMIT = 1800.0  # seconds to prove the plan without
NO_RINGS = ("attention=standard",)
EVERY = ("all_gather=products", "reduce_scatter=products")


@dataclass(frozen=True)
class Case:
    preset: str
    mesh: str
    target: str
    batch: int


CASES = (
    Case("gpt3-175b", "8x16", "v5p", 16),
    Case("gpt3-175b", "8x16", "v5p", 32),
    Case("gpt3-13b", "8x16", "v5p", 16),
    Case("gpt3-xl", "8x16", "v5e", 128),
    Case("gpt3-175b", "8x16", "v5p", 64),
)


@dataclass(frozen=True)
class Step:
    """Of one plan; seconds and bytes of one device's step."""

    inside: dict[str, int]
    step: float
    compute: float
    exposed: float
    waiting: float
    hidden: float
    planned_peak: int
    compiled: float
    cycles: float
    waited: float
    alone: float
    behind: float
    pairs: int
    overlapped: int
    sent: dict[str, int]
    as_planned: bool


def plans(case: Case) -> dict[str, Plan]:
    """The plans to compare, by name."""
    config = replace(gpt.PRESETS[case.preset], batch=case.batch)
    ready = prepare(gpt.train_step(config), Mesh.parse(case.mesh), chip(case.target))
    problem = build(ready.program, ready.mesh, ready.cost, Rules())
    solution = solve(problem, time_limit=LIMIT)
    memory, _ = peak(problem, solution)
    standard = costed(ready, problem, solution, memory, USABLE * ready.chip.hbm_bytes)
    if not standard.fits or solution.gap > 1e-6:
        raise SystemExit(f"{case}: not proved, or it does not fit; give it more time")
    found = overlapped(with_collectives(standard, Collectives.asked(AUTO, NO_RINGS)))
    if not any(c.inside for c in found.collectives):
        forced = with_collectives(standard, Collectives.asked(forced=EVERY))
        return {"declined": forced, "standard": standard}
    plain = with_collectives(found, STANDARD_ONLY)
    same = plain.timeline == standard.timeline
    return {"products": found, **({} if same else {"layout": plain}), "standard": standard}


def with_collectives(plan: Plan, collectives: Collectives) -> Plan:
    """The same layout, run by others."""
    cost = replace(plan.ready.cost, collectives=collectives)
    ready = replace(plan.ready, cost=cost, products=collectives.products)
    problem = replace(plan.problem, cost=cost)
    return costed(ready, problem, plan.solution, plan.memory, plan.memory_limit)


def measured(plan: Plan, kept: Path | None = None) -> Step:
    """Compiles a plan, or reads what was ``kept`` of that, and walks the schedule."""
    if kept and kept.exists():
        text = kept.read_text("utf-8")
    else:
        text = compile_for_target(plan).hlo
        if kept:
            kept.write_text(text, "utf-8")
    facts = read_hlo(text)
    compiled = schedule(plan, facts, text, lambda c: block(plan, c))
    return Step(
        inside=counted((c.kind, c.count) for c in plan.collectives if c.inside),
        step=plan.timeline.step,
        compute=plan.timeline.compute,
        exposed=plan.timeline.exposed,
        waiting=sum(c.inside.waiting * c.count for c in plan.collectives if c.inside),
        hidden=plan.timeline.hidden,
        planned_peak=plan.memory.peak,
        compiled=compiled.step,
        **asdict(compiled),
        sent=sent_bytes(facts),
        as_planned=as_planned(plan, facts),
    )


def block(plan: Plan, c: Collective) -> float:
    """Seconds of a permute: a block of what its plan's row sends; 0 of the compiler's own."""
    row = next((r for r in plan.collectives if [r.id] == ids_of(c)), None)
    if row is None:
        return 0.0
    size = min(row.bytes, row.result_bytes)
    return step_seconds(plan.problem.cost, plan.mesh.index(row.axis), size, both=True)


def main() -> None:
    args = arguments(__doc__, RESULTS)
    known = json.loads(args.write.read_text("utf-8")) if args.write.exists() else []
    for number in args.only or range(len(CASES)):
        case = CASES[number]
        row = next((r for r in known if r["case"] == asdict(case)), None)
        row = row or {"case": asdict(case), "steps": {}}
        for name, plan in plans(case).items():
            kept = args.hlo and args.hlo / f"{number}-{name}.txt"
            row["steps"][name] = asdict(measured(plan, kept))
            print(case, name, shown(row["steps"][name]), flush=True)
            known = [r for r in known if r["case"] != row["case"]] + [row]
            args.write.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def shown(step: dict) -> str:
    """The line of one step."""
    total = sum(step["sent"].values())
    return (
        f"planned {step['step']:.4f} s, exposed {step['exposed']:.4f} (inside products "
        f"{step['waiting']:.4f}); compiled "
        f"{step['compiled']:.4f} s = cycles {step['cycles']:.4f} + alone {step['alone']:.4f} + "
        f"waited {step['waited']:.4f}, behind {step['behind']:.4f}; "
        f"{step['overlapped']} of {step['pairs']} permutes beside products; sent "
        f"{total / 2**30:.2f} GiB; audit {'exact' if step['as_planned'] else 'differs'}"
    )


if __name__ == "__main__":
    main()
