"""neocc's plan against experts' plans and hand layouts, under one cost model, on 128 devices.

    python -m benchmarks.experts FOLDER [--write benchmarks/results/experts.json]

FOLDER has GPT-Neo model configs. Each, and GPT-3 175B, is planned on 8x16 for v5e, v5p, A100 and
H100: by neocc (its own choice of what to recompute), by the three experts' rules, and by the
config's own hand layout where its axes fit the mesh. A rival is in as many microbatches as it
needs. Printed is a rival's step over neocc's; below 1 would be a case that neocc loses.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from models import gpt
from neocc.cost.hardware import chip
from neocc.frontends import gptneo
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.passes.layout.rules import experts
from neocc.passes.layout.within import TOLERANCE
from neocc.passes.plan import Plan
from neocc.passes.rivals import restricted_plan
from neocc.passes.search import parts_of, search
from neocc.passes.simplify import simplify

MESH = Mesh.parse("8x16")
TARGETS = ("v5e", "v5p", "a100", "h100")
MOST = 8  # microbatches


def cases(folder: Path) -> list[tuple[str, gpt.Config, str]]:
    """Name, config and hand layout (in the mesh's own axis names)."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        read = gptneo.read(data)
        config = replace(gpt.config_from_gptneo(data, path.stem), recompute=None)
        # The one axis of a data-parallel config is both of the mesh's.
        layout = (read.layout or "").replace("batch:all", "batch:x,batch:y")
        found.append((path.stem, config, layout))
    return [*found, ("gpt3-175b", gpt.PRESETS["gpt3-175b"], "")]


def rival(plan: Plan, **how) -> Plan | None:
    """A rival's plan that fits, with the fewest microbatches, if there is one. One whose fastest
    layout needs far more memory than there is, is not sought among slower ones."""
    try:
        made = restricted_plan(plan, parts_of(plan.ready.source, MOST), **how)
    except NeoccError:
        return None
    return made if made.fits else None


def measure(name: str, config: gpt.Config, layout: str, target: str) -> dict[str, object]:
    program = simplify(gpt.train_step(config))
    parts = parts_of(program, MOST)
    plan = search(program, chip(target), [MESH], parts, seconds=5.0).best
    row: dict[str, object] = {"case": name, "target": target, "fits": False}
    if plan is None or not plan.fits:
        return row
    step = plan.timeline.step
    row |= {"fits": True, "microbatches": plan.ready.microbatches, "step": round(step, 5)}
    row["gap"] = plan.solution.gap if plan.solution.gap > TOLERANCE else 0.0
    rivals = {e.name: {"rules": e.rules} for e in experts(MESH)}
    if layout:
        rivals["hand layout"] = {"layout": layout}
    for rival_name, how in rivals.items():
        made = rival(plan, **how)
        row[rival_name] = round(made.timeline.step / step, 4) if made else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    found = cases(options.folder)
    if len(found) == 1:
        sys.exit(f"no configs in {options.folder}")
    rows = []
    for target in options.target or TARGETS:
        for name, config, layout in found:
            rows.append(measure(name, config, layout, target))
            print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
            if options.write:
                options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
