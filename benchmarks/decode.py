"""Decode steps: predicted time a token against what reading weights and cache takes, and the audit.

    python -m benchmarks.decode

Each case is planned and compiled for its slice by the real TPU compiler. ``floor``: seconds to read
what a device stores once, at the full bandwidth of its memory; ``cycles``: the compiler's estimated
cycles of a step with trip counts, in seconds of the chip's clock, collectives and waits left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from models import gpt
from neocc.backends.target import compile_for_target
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.lower.audit import audit
from neocc.lower.hlo import read_hlo
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from neocc.report.certificate import PROVED
from neocc.report.facts import stored_bytes

RESULTS = Path(__file__).parent / "results/decode.json"
# preset, chip, mesh, sequences
CASES = (
    ("gpt2-xl", "v5e", "1", 1),
    ("gpt2-xl", "v5e", "1", 8),
    ("gpt2-xl", "v5e", "2x4", 64),
    ("gpt3-13b", "v5e", "2x4", 16),
    ("gpt3-13b", "v5p", "2x2", 32),
    ("gpt3-13b", "v5e", "4x8", 128),
    ("gpt3-175b", "v5e", "8x16", 32),
    ("gpt3-175b", "v5e", "8x16", 128),
    ("gpt3-175b", "v5p", "4x8", 64),
)


@dataclass(frozen=True)
class Row:
    """Seconds of a step, bytes of a device."""

    preset: str
    chip: str
    mesh: str
    batch: int
    stored: int
    floor: float
    compute: float
    exposed: float
    step: float
    proved: bool
    fits: bool
    cycles: float
    memory_error: float
    collectives_ok: bool
    flops_equal: bool


def measure(preset: str, name: str, mesh: str, batch: int) -> Row:
    config = replace(gpt.PRESETS[preset], batch=batch)
    target = chip(name)
    plan = make_plan(simplify(gpt.decode_step(config)), Mesh.parse(mesh), target)
    compiled = compile_for_target(plan)
    found = audit(plan, compiled.hlo, compiled.peak, compiled.reserved)
    stored, time = stored_bytes(plan), plan.timeline
    assert target.vector_clock is not None
    return Row(
        preset,
        name,
        mesh,
        batch,
        stored,
        stored / target.hbm_bandwidth,
        time.compute,
        time.exposed,
        time.step,
        plan.solution.gap <= PROVED,
        plan.fits,
        read_hlo(compiled.hlo).estimated_cycles / (target.vector_clock / target.cores),
        found.memory_error,
        found.collectives_ok,
        found.flops_equal,
    )


def main() -> None:
    print("preset     chip mesh  batch  stored   floor  compute  exposed   step  cycles  audit")
    rows = []
    for case in CASES:
        r = measure(*case)
        rows.append(asdict(r))
        ok = "agrees" if r.collectives_ok and r.flops_equal else "DIFFERS"
        print(
            f"{r.preset:10} {r.chip:4} {r.mesh:5} {r.batch:5} {r.stored / 2**30:7.2f} "
            f"{1e3 * r.floor:7.2f} {1e3 * r.compute:8.2f} {1e3 * r.exposed:8.2f} "
            f"{1e3 * r.step:6.2f} {1e3 * r.cycles:7.2f}  {ok}, memory {100 * r.memory_error:+.1f} %"
            f"{'' if r.fits else ', does not fit'}{'' if r.proved else ', not proved'}",
            flush=True,
        )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
