"""Predicted against measured step time of published training runs of dense models.

    python -m benchmarks.published_runs ../shared/data/published_runs.json [--write FILE]

Every row of the file is printed, with its error or with the reason why it is not predicted; and the
Megatron iteration times of arXiv 2205.05198 with them. A row's plan becomes rules on the layout
problem of one layer (``benchmarks.stage_cost``), ``neocc.cost.schedule`` puts layers together, and
what a system overlaps is a fact of the system (``benchmarks.training_systems``). One number is
fitted: a factor on the rate of matrix products for each device family, on the third of its rows
whose hash says so. Errors are given apart for these and for the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.run_rows import Case, Row, Unpredicted, case_of, selective_cases
from benchmarks.step_time import Run, predict

SAME = 0.02  # measured times nearer than this say nothing about order


@dataclass(frozen=True)
class Left:
    """A row that is not predicted, and why."""

    source: str
    model: str
    reason: str


@dataclass(frozen=True)
class Result:
    case: Case
    predicted: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.case.measured - 1


@dataclass(frozen=True)
class Errors:
    """Of absolute relative errors."""

    count: int
    mean: float
    median: float
    worst: float

    @staticmethod
    def of(errors: Iterable[float]) -> Errors:
        sizes = sorted(map(abs, errors))
        if not sizes:
            return Errors(0, math.nan, math.nan, math.nan)
        return Errors(len(sizes), statistics.mean(sizes), statistics.median(sizes), sizes[-1])

    def __str__(self) -> str:
        if not self.count:
            return "no row"
        mean, median, worst = (f"{100 * x:.1f} %" for x in (self.mean, self.median, self.worst))
        return f"{self.count} rows: mean {mean}, median {median}, worst {worst}"


def read(rows: Sequence[Row]) -> tuple[list[Case], list[Left]]:
    cases, left = selective_cases(), []
    for row in rows:
        try:
            cases.append(case_of(row))
        except Unpredicted as why:
            left.append(Left(row["source"], row["model"]["name"], str(why)))
    return cases, left


def chosen_run(case: Case) -> Run:
    """What a row leaves open is taken as a planner would take it: the fastest predicted."""
    return case.runs[0] if len(case.runs) == 1 else min(case.runs, key=predict)


def fitted(loss: Callable[[float], float], low: float = 0.5, high: float = 1.5) -> float:
    """The factor of least loss on a grid of hundredths."""
    grid = [x / 100 for x in range(round(100 * low), round(100 * high) + 1)]
    return min(grid, key=loss)


def efficiencies(pairs: Sequence[tuple[Case, Run]]) -> dict[str, float]:
    """One factor a family, of least mean |log(predicted / measured)| on its train rows."""
    found = {}
    for family in dict.fromkeys(case.family for case, _ in pairs):
        train = [(c, r) for c, r in pairs if c.family == family and c.train]

        def loss(e: float, train: Sequence[tuple[Case, Run]] = train) -> float:
            return sum(abs(math.log(predict(r, e) / c.measured)) for c, r in train)

        found[family] = fitted(loss) if train else 1.0
    return found


@dataclass(frozen=True)
class Order:
    """Pairs of plans of one model, of one source, on as many devices with one batch and one
    precision: whether the one measured faster is predicted faster."""

    kept: int
    broken: tuple[str, ...]


def order(results: Sequence[Result]) -> Order:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        run = r.case.runs[0]
        tokens = round(run.data * run.slices * run.batch * run.microbatches)
        same = (r.case.source, r.case.model, r.case.hardware, r.case.precision)
        groups[*same, run.devices, tokens].append(r)
    kept, broken = 0, []
    for group in groups.values():
        for a, b in itertools.combinations(group, 2):
            far = abs(a.case.measured / b.case.measured - 1) > SAME
            if a.case.plan == b.case.plan or not far:
                continue
            if (a.predicted < b.predicted) == (a.case.measured < b.case.measured):
                kept += 1
            else:
                broken.append(f"{a.case.model}: {a.case.plan} / {b.case.plan}")
    return Order(kept, tuple(broken))


def table_of(title: str, results: Sequence[Result]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("source", "model", "chip", "plan", "from", "set"):
        table.add_column(name, overflow="fold")
    for name in ("predicted s", "measured s", "error"):
        table.add_column(name, justify="right")
    for r in results:
        c = r.case
        plan = f"{c.plan} (open: {c.opened})" if c.opened else c.plan
        table.add_row(
            c.source,
            c.model,
            c.hardware,
            plan,
            c.how,
            "fit" if c.train else "test",
            f"{r.predicted:.3f}",
            f"{c.measured:.3f}",
            f"{100 * r.error:+.1f} %",
        )
    return table


def report(
    console: Console,
    results: Sequence[Result],
    left: Sequence[Left],
    factors: Mapping[str, float],
) -> dict[str, Any]:
    for family, factor in factors.items():
        here = [r for r in results if r.case.family == family]
        title = f"{family}: products at {factor:.2f} of the table's efficiency"
        console.print(table_of(title, here))
        console.print(f"{Errors.of(r.error for r in here)}\n")
    table = Table(title="Not predicted", title_justify="left")
    for name in ("source", "model", "rows", "why"):
        table.add_column(name, overflow="fold")
    for row, count in Counter(left).items():
        table.add_row(row.source, row.model, str(count), row.reason)
    console.print(table)
    summary = {
        "all": Errors.of(r.error for r in results),
        "fit": Errors.of(r.error for r in results if r.case.train),
        "test": Errors.of(r.error for r in results if not r.case.train),
    }
    for name, errors in summary.items():
        console.print(f"{name:>4}: {errors}")
    ordered = order(results)
    total = ordered.kept + len(ordered.broken)
    console.print(f"order of two plans of one model kept in {ordered.kept} of {total} pairs")
    for pair in ordered.broken:
        console.print(f"  not kept: {pair}")
    return {
        "efficiency": dict(factors),
        "summary": {n: vars(e) for n, e in summary.items()},
        "families": {
            f: vars(Errors.of(r.error for r in results if r.case.family == f)) for f in factors
        },
        "order": {"kept": ordered.kept, "broken": list(ordered.broken)},
        "rows": [
            {
                "source": r.case.source,
                "model": r.case.model,
                "chip": r.case.hardware,
                "plan": r.case.plan,
                "set": "fit" if r.case.train else "test",
                "predicted": round(r.predicted, 4),
                "measured": round(r.case.measured, 4),
                "error": round(r.error, 4),
            }
            for r in results
        ],
        "not_predicted": [vars(row) | {"rows": n} for row, n in Counter(left).items()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Published runs, predicted")
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"no file {options.data}")
    console = Console(width=180)
    cases, left = read(json.loads(options.data.read_text()))
    pairs = [(case, chosen_run(case)) for case in cases]
    factors = efficiencies(pairs)
    results = [Result(case, predict(run, factors[case.family])) for case, run in pairs]
    found = report(console, results, left, factors)
    if options.write:
        options.write.write_text(json.dumps(found).replace('{"source"', '\n{"source"') + "\n")


if __name__ == "__main__":
    main()
