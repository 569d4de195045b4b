"""neocc's plan and an expert's, both compiled by the real TPU compiler and judged by its figures.

    python -m benchmarks.judged FOLDER [--only TEXT] [--write benchmarks/results/judged.json]

FOLDER has GPT-Neo model configs. For six of the cases of ``benchmarks/experts.py`` on 8x16, neocc's
plan and that of the rival which the cost model thinks best are lowered, compiled for a described
slice, and read: peak bytes of a device, bytes that it puts into collectives in a step, and the
compiler's estimated cycles, loops counted as often as they run. Cycles are of compute alone, so
that a plan that trades transfers for compute loses by them: at the chip's clock and with the
exposed transfers that neocc predicts of either plan, they make a step. Each in a process of its
own, one to six minutes of one core. Cases that have results are not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.apart import run_apart
from benchmarks.experts import MESH, MOST, cases, rival
from benchmarks.tpu_record import measure
from benchmarks.tpu_score import CLOCK
from models import gpt
from neocc.cost.hardware import chip
from neocc.passes.layout.rules import experts
from neocc.passes.plan import Plan
from neocc.passes.search import parts_of, search
from neocc.passes.simplify import simplify

JUDGED = (
    ("v5p", "gpt3_large_256"),
    ("v5e", "gpt3_PAR_small_256"),
    ("v5e", "gpt3_XL_256_Pile"),
    ("v5p", "gpt3_2-7B_256"),
    ("v5p", "gpt3_6-7B_256"),
    ("v5p", "gpt3-175b"),
)
BEST = "best rival"
TIMEOUT = 1800.0  # seconds for one plan and its compile


def plans(name: str, config: gpt.Config, layout: str, target: str) -> tuple[Plan, str, Plan]:
    """neocc's plan; the name and plan of the fastest of the rivals that fit."""
    program = simplify(gpt.train_step(config))
    plan = search(program, chip(target), [MESH], parts_of(program, MOST), seconds=20.0).best
    if plan is None:
        sys.exit(f"{name} on {target}: nothing fits")
    rivals = {e.name: {"rules": e.rules} for e in experts(MESH)}
    if layout:
        rivals["hand layout"] = {"layout": layout}
    found = {n: made for n, how in rivals.items() if (made := rival(plan, **how))}
    best = min(found, key=lambda n: found[n].timeline.step)
    return plan, best, found[best]


def judge(case: tuple[str, gpt.Config, str], target: str, which: str) -> dict[str, object]:
    """Plans, and compiles one of the two."""
    plan, rival_name, theirs = plans(*case, target)
    made = plan if which == "neocc" else theirs
    record, _ = measure(made)
    sent = sum(row[2] * row[4] * row[5] for row in record.collectives)
    return {
        "plan": "neocc" if which == "neocc" else rival_name,
        "microbatches": made.ready.microbatches,
        "predicted step": round(made.timeline.step, 5),
        "predicted exposed": round(made.timeline.exposed, 5),
        "predicted peak": made.memory.peak,
        "peak": record.peak,
        "collective bytes": sent,
        "estimated cycles": record.cycles,
        "compiler": record.compiler,
        "seconds": record.seconds,
    }


def judge_apart(folder: Path, target: str, name: str, which: str) -> dict[str, object] | None:
    command = ["benchmarks.judged", str(folder), "--one", f"{target}/{name}/{which}"]
    return run_apart(f"{target} {name} {which}", command, TIMEOUT, {})


def ratios(row: dict) -> str:
    ours, theirs = row["neocc"], row[BEST]
    fields = ("predicted step", "peak", "collective bytes", "estimated cycles")
    shown = [f"{f} {theirs[f] / ours[f]:.3f}" for f in fields]
    clock = CLOCK[row["target"]]
    step = [r["estimated cycles"] / clock + r["predicted exposed"] for r in (ours, theirs)]
    shown.append(f"cycles with exposed collectives {step[1] / step[0]:.3f}")
    return f"{row['target']} {row['case']}: {theirs['plan']} over neocc: " + ", ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {name: (name, config, layout) for name, config, layout in cases(options.folder)}
    if options.one:
        target, name, which = options.one.split("/")
        print(json.dumps(judge(known[name], target, which)), flush=True)
        os._exit(0)  # the compiler's threads may still run
    rows: list[dict] = []
    if options.write and options.write.exists():
        rows = json.loads(options.write.read_text())
    for target, name in JUDGED:
        if options.only not in f"{target} {name}":
            continue
        row = next((r for r in rows if (r["target"], r["case"]) == (target, name)), None)
        if row is None:
            row = {"case": name, "target": target}
            for which in ("neocc", BEST):
                made = judge_apart(options.folder, target, name, which)
                if made is None:
                    break
                row[which] = made
            else:
                rows.append(row)
        if BEST in row:
            print(ratios(row), flush=True)
        if options.write:
            options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
