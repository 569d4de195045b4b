"""A sweep as a table, a plot in characters, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotext
from rich.table import Table

from neocc.report.facts import bytes_text, count_text, seconds_text
from neocc.runtime import Row, frontier


def table(rows: Sequence[Row]) -> Table:
    """One line a mesh; ``*`` marks those that no other line beats in chips, memory and speed."""
    best = frontier(rows)
    made = Table.grid(padding=(0, 2), pad_edge=False)
    names = ("", "chips", "mesh", "wires", "batch", "parts", "step", "tokens/s", "MFU", "memory")
    for name in names:
        made.add_column(justify="left" if name in ("", "mesh", "wires") else "right")
    made.add_column()
    made.add_row(*names, "at best")
    for row in rows:
        t = row.tried
        batch = "-" if row.batch is None else str(row.batch)
        head = ("*" if row in best else "", str(row.chips), str(t.mesh))
        if row.plan is None:
            why = "does not fit" if t.plan is not None else t.reason
            made.add_row(*head, "", batch, "", "", "", "", "", why)
            continue
        plan = row.plan
        made.add_row(
            *head,
            plan.topology.name,
            batch,
            str(t.microbatches),
            seconds_text(plan.timeline.step),
            count_text(row.tokens / plan.timeline.step),
            f"{100 * plan.mfu:.1f} %",
            bytes_text(plan.memory.peak),
            "proved" if gap(row) <= 1e-6 else f"{100 * gap(row):.2g} % less",
        )
    return made


def gap(row: Row) -> float:
    """How far below a row's step its mesh might still come, as a share."""
    if row.plan is None:
        return 0.0
    objective = row.plan.solution.objective
    return max(0.0, (objective - row.tried.bound) / objective)


def plot(rows: Sequence[Row], width: int) -> str:
    """Step time against memory, a mark for each chip count."""
    plotext.clear_figure()
    plotext.plotsize(width, 20)
    plotext.theme("clear")
    plotext.title("seconds a step against GiB a device")
    marks = "ox+#%@"
    for i, chips in enumerate(dict.fromkeys(row.chips for row in rows)):
        plans = [row.plan for row in rows if row.chips == chips and row.plan is not None]
        memory = [p.memory.peak / 2**30 for p in plans]
        step = [p.timeline.step for p in plans]
        if plans:
            plotext.scatter(memory, step, marker=marks[i % len(marks)], label=f"{chips} chips")
    return plotext.build()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Seconds, bytes, per device and step; ``bound``: of the mesh on any wires."""
    best = frontier(rows)
    return [
        {
            "chips": row.chips,
            "batch": row.batch,
            "mesh": str(row.tried.mesh),
            "microbatches": row.tried.microbatches,
            "wires": row.plan.topology.name if row.plan else None,
            "fits": row.plan is not None,
            "step": row.plan.timeline.step if row.plan else None,
            "bound": row.tried.bound if row.plan else None,
            "tokens_per_second": row.tokens / row.plan.timeline.step if row.plan else None,
            "mfu": row.plan.mfu if row.plan else None,
            "memory": row.plan.memory.peak if row.plan else None,
            "frontier": row in best,
            "reason": row.tried.reason,
        }
        for row in rows
    ]
