"""Predicted against measured iteration times of the vTrain project: GPTs on A100s, under tensor,
data and pipeline parallelism, on one host (single.csv) and on many (multi.csv).

    python -m benchmarks.vtrain ../shared/data/vtrain [--write FILE]

The A100's efficiency is the one that ``benchmarks.published_runs`` fitted, read from its results.
One number is fitted here, on the third of single.csv whose hash says so: the seconds that the host
takes to launch a kernel, which is what bounds its small models. multi.csv is only predicted.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.dense_models import Dense
from benchmarks.published_runs import Errors
from benchmarks.step_time import Run, predict
from benchmarks.training_systems import MEGATRON_2021
from neocc.cost.hardware import chip

RESULTS = Path(__file__).parent / "results" / "published_runs.json"
VOCAB = 51200  # GPT-2's, padded as Megatron does
MICROSECONDS = range(101)


@dataclass(frozen=True)
class Iteration:
    table: str
    run: Run
    plan: str
    key: str
    measured: float

    @property
    def train(self) -> bool:
        return self.table == "single" and int(self.key, 16) % 3 == 0


def iteration(table: str, row: Mapping[str, str]) -> Iteration:
    """A line of the CSV file. What it does not say: Megatron of its time, scores stored, with full
    recomputation, since the times are those of 8 FLOPs a weight and token (predicted without it,
    multi.csv comes out 31 % too fast)."""
    hidden, heads, layers, seq, gpus, batch, micro = (
        int(row[name])
        for name in (
            "hidden size",
            "attention heads",
            "# layers",
            "sequence length",
            "# GPUs",
            "global batch",
            "micro batch",
        )
    )
    tensor, data, stages = (int(row[f"{n} parallelism"]) for n in ("tensor", "data", "pipeline"))
    model = Dense(layers, hidden, heads, heads, hidden // heads, 4 * hidden, VOCAB, seq)
    run = Run(
        model=model,
        chip=chip("a100-80gb"),
        system=MEGATRON_2021,
        data=data,
        batch=micro,
        microbatches=batch // (data * micro),
        tensor=tensor,
        stages=stages,
        recompute="full",
        dtype="f16",
    )
    plan = f"h{hidden} l{layers} s{seq} n{gpus} b{batch} mb{micro} tp{tensor} dp{data} pp{stages}"
    key = hashlib.sha256(json.dumps(dict(row), sort_keys=True).encode()).hexdigest()[:12]
    return Iteration(table, run, plan, key, float(row["iteration time (ms)"]) / 1e3)


def read(folder: Path) -> list[Iteration]:
    found = []
    for table in ("single", "multi"):
        with (folder / f"{table}.csv").open() as file:
            found += [iteration(table, row) for row in csv.DictReader(file)]
    return found


def seconds(it: Iteration, efficiency: float, host: float) -> float:
    return predict(replace(it.run, system=replace(it.run.system, host=host)), efficiency)


def fitted_host(iterations: Sequence[Iteration], efficiency: float) -> float:
    """Seconds a launch, of least mean |log(predicted / measured)|, to the microsecond."""

    def loss(us: int) -> float:
        pairs = [(seconds(it, efficiency, us * 1e-6), it.measured) for it in iterations]
        return sum(abs(math.log(p / m)) for p, m in pairs)

    return min(MICROSECONDS, key=loss) * 1e-6


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of sequences whose values differ: the correlation of ranks."""
    first, second = (np.argsort(np.argsort(np.asarray(x))) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description="vTrain's iterations, predicted")
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if not (options.data / "single.csv").is_file():
        parser.error(f"no single.csv in {options.data}")
    console = Console(width=140)
    iterations = read(options.data)
    efficiency = json.loads(RESULTS.read_text())["efficiency"]["A100"]
    host = fitted_host([it for it in iterations if it.train], efficiency)
    predicted = [seconds(it, efficiency, host) for it in iterations]
    rows: list[dict[str, Any]] = []
    table = Table(title="vTrain's iterations on A100", title_justify="left")
    for name in ("table", "model and plan", "set", "predicted s", "measured s", "error"):
        table.add_column(name, justify="left" if name in ("table", "model and plan") else "right")
    for it, p in zip(iterations, predicted, strict=True):
        error = p / it.measured - 1
        part = "fit" if it.train else "test"
        numbers = (f"{p:.3f}", f"{it.measured:.3f}", f"{100 * error:+.1f} %")
        table.add_row(it.table, it.plan, part, *numbers)
        rows.append(
            {
                "table": it.table,
                "plan": it.plan,
                "set": part,
                "predicted": round(p, 4),
                "measured": round(it.measured, 4),
                "error": round(error, 4),
            }
        )
    console.print(table)
    console.print(f"A100 at {efficiency:.2f}; {1e6 * host:.0f} us a launch, fitted")
    summary: dict[str, Any] = {}
    for name in ("single", "multi"):
        for part in ("all", "fit", "test"):
            here = [r for r in rows if r["table"] == name and part in ("all", r["set"])]
            if len(here) < 2 or (name == "multi" and part != "all"):
                continue
            errors = Errors.of(r["error"] for r in here)
            rho = rank_correlation(*([r[k] for r in here] for k in ("predicted", "measured")))
            console.print(f"{name}, {part}: {errors}; rank correlation {rho:.4f}")
            summary[f"{name}, {part}"] = vars(errors) | {"rank_correlation": round(rho, 4)}
    if options.write:
        found = {"efficiency": efficiency, "host": host, "summary": summary, "rows": rows}
        lines = json.dumps(found).replace('{"table"', '\n{"table"')
        options.write.write_text(lines + "\n")


if __name__ == "__main__":
    main()
