"""A compilation as JSON: everything that the terminal shows, and each thing by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from neocc import __version__
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Op
from neocc.passes.plan import Collective, Plan, attention_in_kernels, bodies
from neocc.report import facts
from neocc.report.certificate import MODEL, SPACE, verdict
from neocc.runtime import Compilation

SCHEMA = 1  # raised when a field changes its meaning or goes


def report(compilation: Compilation) -> dict[str, Any]:
    """The whole report; plain dicts, lists, strings and numbers (bytes, seconds, FLOPs)."""
    c, plan = compilation, compilation.plan
    return {
        "schema": SCHEMA,
        "neocc": __version__,
        "model": {
            "name": c.model.name,
            "program": c.program.name,
            "parameters": c.program.parameter_count,
            "tokens_per_step": c.tokens,
            "dims": {d.name: d.size for d in c.program.dims.values()},
        },
        "plan": plan_document(plan),
        "tokens_per_second": c.tokens / plan.timeline.step,
        "work": dataclasses.asdict(facts.work(plan)),
        "best": brief(c.best) | {"verdict": verdict(c.best)} if c.best else None,
        "compared": [
            {
                "name": r.name,
                "reason": r.reason,
                "fits": r.fits,
                **({"plan": brief(r.plan)} if r.plan else {}),
                **({"ratio": r.plan.timeline.step / plan.timeline.step} if r.plan else {}),
            }
            for r in c.rivals
        ],
        "remedies": [dataclasses.asdict(r) for r in c.remedies],
        "audit": audit_document(c),
        "stages": {t.stage: t.seconds for t in c.timings},
        "notes": list(c.notes),
        "ok": c.ok,
    }


def brief(plan: Plan) -> dict[str, Any]:
    """What one line of a comparison needs."""
    t = plan.timeline
    return {
        "step": t.step,
        "compute": t.compute,
        "exposed": t.exposed,
        "hidden": t.hidden,
        "attention": (own := attention_in_kernels(plan)) and dataclasses.asdict(own),
        "mfu": plan.mfu,
        "flops_utilisation": facts.utilisation(plan),
        "flops": plan.flops,
        "model_flops": plan.model_flops,
        "peak_memory": plan.memory.peak,
    }


def plan_document(plan: Plan) -> dict[str, Any]:
    """What is said of a plan by itself; a file that can be read back has more."""
    mesh, program = plan.mesh, plan.partitioned.program
    solution = plan.solution
    names = facts.tensor_names(plan)
    return {
        "schema": SCHEMA,
        "neocc": __version__,
        "mesh": [{"axis": name, "size": size} for name, size in mesh.axes],
        "chip": {
            "name": plan.chip.name,
            "title": plan.chip.title,
            "hbm": plan.chip.hbm_bytes,
            "calibration": plan.chip.calibration and dataclasses.asdict(plan.chip.calibration),
        },
        **brief(plan),
        "fits": plan.fits,
        "given": plan.given,
        "memory": {
            "limit": plan.memory_limit,
            "peak": plan.memory.peak,
            "by_kind": dict(plan.memory.by_kind),
            "point": plan.memory.point,
            "largest": [{"tensor": t, "bytes": b} for t, b in plan.memory.largest],
        },
        "layouts": {
            info.name: {
                "role": info.role,
                "dtype": value.type.dtype,
                "dims": {d.name: d.size for d in value.type.dims},
                "axes": placements(value.type.layout, mesh),
                "words": facts.layout_words(value.type, mesh),
                "bytes": value.type.local_bytes(mesh),
            }
            for info, value in program.named_inputs
        },
        "activations": [
            {
                "name": row.names[0],
                "dims": {d.name: d.size for d in row.type.dims},
                "axes": placements(row.type.layout, mesh),
                "words": facts.layout_words(row.type, mesh),
                "bytes": row.bytes,
            }
            for row in facts.activations(plan)
        ],
        "strategies": [
            strategy(op, body.name, mesh)
            for body in bodies(program.body)
            for op in body.region.ops
            if "strategy" in op.attrs
        ],
        "collectives": [collective(c, names.get(c.id, c.tensor)) for c in plan.collectives],
        "paddings": [{"dim": p.dim, "from": p.true, "to": p.padded} for p in plan.paddings],
        "certificate": {
            "verdict": verdict(plan),
            "objective": solution.objective,
            "bound": solution.bound,
            "gap": solution.gap,
            "seconds": solution.seconds,
            "options": solution.whole.options,
            "options_left": solution.left.options,
            "columns": solution.whole.columns,
            "columns_left": solution.left.columns,
            "rows": solution.rows,
            "nodes": solution.nodes,
            "cost_model": MODEL,
            "search_space": SPACE,
        },
    }


def placements(layout: Layout | None, mesh: Mesh) -> dict[str, str | None]:
    """Per mesh axis the dim it cuts, ``+sum`` for partial sums, or null."""
    axes = layout.axes if layout else (None,) * len(mesh)
    return {n: None if p is None else str(p) for n, p in zip(mesh.names, axes, strict=True)}


def strategy(op: Op, region: str, mesh: Mesh) -> dict[str, Any]:
    chosen = op.attrs["strategy"].axes
    return {
        "id": op.attrs["id"],
        "op": op.kind,
        "line": str(op.loc) if op.loc else None,
        "region": region,
        "axes": {n: None if c is None else str(c) for n, c in zip(mesh.names, chosen, strict=True)},
    }


def collective(c: Collective, tensor: str) -> dict[str, Any]:
    return {
        "id": c.id,
        "kind": c.kind,
        "axis": c.axis,
        "dim": c.dim,
        "tensor": tensor,
        "line": str(c.loc) if c.loc else None,
        "bytes": c.bytes,
        "result_bytes": c.result_bytes,
        "count": c.count,
        "seconds": c.seconds,
        "hideable": c.hideable,
        "region": c.region,
        "algorithm": c.algorithm,
        "lossy": facts.is_lossy(c.kind, c.algorithm),
        "grid": list(c.grid),
        "standard_seconds": c.standard,
        "inside": None if c.inside is None else dataclasses.asdict(c.inside),
    }


def audit_document(compilation: Compilation) -> dict[str, Any] | None:
    audit = compilation.audit
    if audit is None:
        return None
    return {
        "ok": audit.ok,
        "flops": {"plan": audit.planned_flops, "compiled": audit.compiled_flops},
        "peak_memory": {"plan": audit.planned_peak, "compiled": audit.compiled_peak},
        "reserved_memory": audit.reserved,
        "hiding": {kind: dataclasses.asdict(h) for kind, h in audit.hiding.items()},
        "findings": [
            {
                "planned": f.planned and f.planned.id,
                "compiled": f.compiled and f.compiled.instruction,
                "verdict": f.verdict,
                "ok": f.ok,
            }
            for f in audit.findings
        ],
    }
