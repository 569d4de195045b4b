"""How fast layout problems are solved: models on 2 and 3 axes, all choices on, within memory.

    python -m benchmarks.solver_speed [--write benchmarks/results/solver_speed.json] [CASE ...]

A case is PRESET,MESH,CHIP. Per case: options and columns before and after pruning, seconds to state
the problem and to solve it (of the clock, and of all processor time), nodes of the last program,
gap, and whether the plan fits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.layout.build import build
from neocc.passes.layout.within import solve_within
from neocc.passes.plan import SEARCH, USABLE, prepare

CASES = (
    "tiny,2x2,v5e",
    "tiny,2x2x2,v5e",
    "gpt3-xl,8x16,v5e",
    "gpt3-xl,4x4x8,v5e",
    "gpt3-xl,16x16,v5e",
    "gpt3-13b,8x16,v5e",
    "gpt3-13b,8x16,v5p",
    "gpt3-13b,4x4x8,v5p",
    "gpt3-175b,8x16,v5p",
    "gpt3-175b,8x16,h100",
    "gpt3-175b,16x16,v5p",
    "gpt3-175b,4x4x8,v5p",
)


def measure(case: str) -> dict:
    """One row. Times are of this process alone on as many cores as it gets."""
    preset, mesh, target = case.split(",")
    ready = prepare(gpt.train_step(gpt.PRESETS[preset]), Mesh.parse(mesh), chip(target))
    begin = time.perf_counter()
    problem = build(ready.program, ready.mesh, ready.cost)
    stated, busy = time.perf_counter(), time.process_time()
    available = USABLE * chip(target).hbm_bytes
    solution, memory = solve_within(problem, available, SEARCH)
    solved, worked = time.perf_counter(), time.process_time()
    return {
        "case": case,
        "options": solution.whole.options,
        "options_left": solution.left.options,
        "columns": solution.whole.columns,
        "columns_left": solution.left.columns,
        "state_seconds": round(stated - begin, 2),
        "solve_seconds": round(solved - stated, 2),
        "processor_seconds": round(worked - busy, 2),
        "nodes": solution.nodes,
        "gap": solution.gap,
        "objective_seconds": solution.objective,
        "fits": memory.peak <= available,
        "memory_gb": round(memory.peak / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=CASES)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = []
    for case in options.cases or CASES:
        row = measure(case)
        rows.append(row)
        print(*(f"{k}={v}" for k, v in row.items()), flush=True)
        if options.write:
            options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
