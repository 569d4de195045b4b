"""The audit with every algorithm for collectives forced in turn, by the TPU compiler.

    python -m benchmarks.forced_algorithms [--target v5e] [--only TEXT]
        [--write benchmarks/results/forced_algorithms.json]

A small training step on 8 chips, under FSDP for gathers and scatters, experts' exchange for
all-to-alls and Megatron's layout for sums. Per algorithm: how many of the plan's collectives it
runs, how many transfers the audit checks, each message of an algorithm by itself, and what of them
is not as planned. Exit code 1 where one is not. Each in a process of its own, about a minute of
one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benchmarks.apart import run_apart
from models import gpt
from neocc.backends import backend
from neocc.backends.target import compile_for_target
from neocc.cost.algorithms import FORMULAS, PRODUCTS
from neocc.cost.choice import Collectives
from neocc.cost.hardware import Chip, chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import pair
from neocc.nn import Experts
from neocc.passes.layout.rules import experts, tensor_parallel
from neocc.passes.plan import Plan, make_plan

SMALL = replace(gpt.PRESETS["tiny"], dtype="f32", embd=64, batch=8, vocab=104, layers=2)
MOE = replace(SMALL, moe_layers=(1,), experts=Experts(8, 256, group=64), recompute=False)
KEYS = [*FORMULAS]
RULES = {"all_gather": "FSDP", "reduce_scatter": "FSDP", "all_to_all": "GShard on y"}
TIMEOUT = 900.0  # seconds


def forced_to(kind: str, name: str) -> Collectives:
    """And what would take the kind's place is as slow."""
    beside = {"reduce_scatter": [f"all_reduce={name}"], "all_to_all": ["all_gather=ring"]}
    others = beside.get(kind, []) if name != PRODUCTS else []
    return Collectives.asked(forced=[f"{kind}={name}", *others])


def planned(kind: str, name: str, target: Chip) -> Plan:
    """A step whose collectives of a kind all run by one algorithm, where they can."""
    program = gpt.train_step(MOE if kind == "all_to_all" else SMALL)
    mesh = Mesh.parse("8" if RULES.get(kind) == "FSDP" and name != PRODUCTS else "2x4")
    forced = forced_to(kind, name)
    if name == PRODUCTS:
        rules = tensor_parallel(mesh)[1].rules
        return make_plan(program, mesh, target, rules=rules, collectives=forced)
    if kind in RULES:
        named = {e.name: e.rules for e in experts(mesh, program.dims)}
        return make_plan(program, mesh, target, rules=named[RULES[kind]], collectives=forced)
    layout = "batch:x,heads:y,mlp:y,vocab:y"
    return make_plan(program, mesh, target, layout, collectives=forced)


def measure(kind: str, name: str, target: str) -> dict[str, object]:
    plan = planned(kind, name, chip(target))
    own = backend(plan.chip.kind)
    found = pair(plan, own.read(compile_for_target(plan).hlo), own.calls)
    bad = [f for f in found if not f.ok]
    by = Counter(c.algorithm for c in plan.collectives if c.kind != "slice")
    return {
        "kind": kind,
        "algorithm": name,
        "target": target,
        "mesh": str(plan.mesh),
        "runs": by[name],
        "collectives": sum(by.values()),
        "checked": len(found),
        "as planned": len(found) - len(bad),
        "not": [f"{f.verdict}: {f.planned or f.compiled}"[:300] for f in bad],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--only", default="", help="of kind-algorithm, those with this text")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ALGORITHM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.target)))
        return
    rows = []
    for kind, name in KEYS:
        own = FORMULAS[kind, name].kernel in ("", chip(options.target).kind)
        if options.only not in f"{kind}-{name}" or not own:
            continue
        command = ["benchmarks.forced_algorithms", "--one", kind, name, "--target", options.target]
        row = run_apart(f"{kind} {name}", command, TIMEOUT, {"TPU_SKIP_MDS_QUERY": "1"})
        rows.append(row or {"kind": kind, "algorithm": name, "not": ["not compiled"]})
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        if options.write:
            options.write.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["not"] for row in rows))


if __name__ == "__main__":
    main()
