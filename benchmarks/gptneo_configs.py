"""Plan and lower every GPT-Neo model config on 8x16, for v5p and v5e.

    python benchmarks/gptneo_configs.py FOLDER [--write benchmarks/results/gptneo_configs.json]

Per config and chip: parameters, whether the plan fits and by how much, step time, gap, seconds to
plan, and the size of the StableHLO that the plan lowers to.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from models import gpt
from neocc.backends.target import lower_for_target
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.partition import verify_partitioned
from neocc.passes.plan import make_plan


def measure(path: Path, target: str) -> dict:
    """One row: a config planned for a chip, the partitioned program verified and lowered."""
    config = gpt.config_from_gptneo(json.loads(path.read_text()), path.stem)
    program = gpt.train_step(config)
    begin = time.perf_counter()
    plan = make_plan(program, Mesh.parse("8x16"), chip(target))
    planned = time.perf_counter() - begin
    verify_partitioned(plan.partitioned, plan.program)
    text = lower_for_target(plan).stage.as_text()
    return {
        "config": path.stem,
        "target": target,
        "parameters": program.parameter_count,
        "fits": plan.fits,
        "memory_gb": round(plan.memory.peak / 1e9, 2),
        "limit_gb": round(plan.memory_limit / 1e9, 2),
        "step_seconds": round(plan.timeline.step, 4),
        "mfu": round(plan.mfu, 3),
        "gap": plan.solution.gap,
        "plan_seconds": round(planned, 1),
        "stablehlo_kb": len(text) // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.json"))
    if not files:
        sys.exit(f"no configs in {options.folder}")
    rows = []
    for path in files:
        for target in ("v5p", "v5e"):
            row = measure(path, target)
            rows.append(row)
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    if options.write:
        options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
