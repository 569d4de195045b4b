"""A mixture of experts on 8x16 chips: the report of ``neocc compile --audit``, and each all-to-all
of the plan beside the one that the TPU compiler made of it.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m benchmarks.moe_audit [--preset gpt-moe]
        [--targets v5e,v5p] [--write benchmarks/results]

Exit code 1 where an audit fails, or a plan cuts no experts.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console

from neocc.cost.hardware import chip
from neocc.frontends import model_file
from neocc.ir.mesh import Mesh
from neocc.report.terminal import print_report
from neocc.runtime import Compilation, compile_model

MESH = "8x16"


def compiled(preset: str, target: str) -> Compilation:
    model = model_file.load("models/gpt.py", preset)
    return compile_model(model, Mesh.parse(MESH), chip(target), audit=True)


def experts_cut(c: Compilation) -> str:
    """Along what each expert weight is cut, by mesh axis."""
    found = []
    for info, value in c.plan.partitioned.program.named_inputs:
        layout = value.type.layout
        if info.role == "parameter" and value.type.has("expert_hidden") and layout is not None:
            axes = [f"{n}: {place or '-'}" for n, place in zip("xy", layout.axes, strict=True)]
            found.append(f"{info.name} {', '.join(axes)}")
    return "; ".join(found)


def travels(c: Compilation) -> list[str]:
    """A line for each all-to-all of the plan: where it is, its bytes and runs, and the compiled
    instruction that it is."""
    assert c.audit is not None
    rows = []
    for f in c.audit.findings:
        if f.planned is None or f.planned.kind != "all_to_all":
            continue
        made = f.compiled and (
            f"{f.compiled.instruction} {f.compiled.dtype}{list(f.compiled.operand_shape)}, "
            f"{f.compiled.trip_count} times"
        )
        size = f"{f.planned.bytes / 2**20:.4g} MiB, {f.planned.count} times"
        rows.append(f"{f.planned.region} on {f.planned.axis}: {size}; {f.verdict}: {made}")
    return rows


def text_of(c: Compilation) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=100), c)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    lines += [f"Experts' weights: {experts_cut(c)}", "All-to-alls, planned and compiled"]
    return "\n".join([*lines, *(f"  {row}" for row in travels(c))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt-moe")
    parser.add_argument("--targets", default="v5e,v5p")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    fine = True
    for target in options.targets.split(","):
        c = compiled(options.preset, target)
        text = text_of(c)
        print(text)
        if options.write:
            (options.write / f"audit-moe-{target}-{MESH}.txt").write_text(text)
        fine &= c.audit is not None and c.audit.ok and ": experts" in experts_cut(c)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
