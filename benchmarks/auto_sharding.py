"""neocc's plans beside those of XLA's auto-sharding and of Mesh TensorFlow's auto layout.

    python -m benchmarks.auto_sharding --auto PYTHON --mtf PYTHON    run what has no figures yet
    python -m benchmarks.auto_sharding                               print the kept results

``--auto`` is the Python of an environment with ``jax[tpu]==0.6.2``, the last series with
auto-sharding; ``--mtf`` of one with ``mesh-tensorflow==0.1.21 tensorflow-cpu==2.12.1
ortools==9.9.3963``. Three models, each laid out in six ways and compiled by a real TPU compiler:

- in jax 0.6.2, the plain JAX step of ``auto_sharding_step.py``, by XLA's auto-sharding; and by
  GSPMD from neocc's layouts (of inputs and of the values that the step names) and from Mesh
  TensorFlow's. One program and one compiler: what differs is the plan. Collectives are left whole
  (``WHOLE``), so that the plan's are seen;
- by neocc as it compiles (jax 0.10.2): its plan of that same step, its plan with nothing
  prescribed, and the best plan that Mesh TensorFlow's layout allows.

The figures are read off the compiled text by the same code (``auto_sharding_judge.py``). Each run
is a process of its own: a minute or two, and some four of auto-sharding.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.auto_sharding_cases import (
    CASES,
    Case,
    by_plan,
    by_rules,
    neocc_rules,
    planned,
    request,
)
from benchmarks.auto_sharding_judge import figures
from models import gpt
from neocc.ir.errors import NeoccError
from neocc.passes.plan import Plan

RESULTS = Path(__file__).parent / "results" / "auto_sharding.json"
STEP = Path(__file__).parent / "auto_sharding_step.py"
MTF = Path(__file__).parent / "auto_sharding_mtf.py"
TIMEOUT = 1200.0  # seconds of one run
AUTO, NEOCC_GSPMD, MTF_GSPMD = "XLA auto", "neocc, by GSPMD", "Mesh TF, by GSPMD"
SAME, MTF_NEOCC, DEFAULT = "neocc, same step", "Mesh TF, by neocc", "neocc"
WAYS = (AUTO, NEOCC_GSPMD, SAME, DEFAULT, MTF_GSPMD, MTF_NEOCC)
# Else XLA makes loops of permutes and slices of a product out of gathers beside products.
WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Auto-sharding tells its time in its log only.
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_MIN_LOG_LEVEL": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Mesh TensorFlow picks among ties by the order of a set.
    "PYTHONHASHSEED": "0",
}
Row = dict[str, Any]


def run(command: list[str], log: Path | None = None) -> Row:
    """The JSON object that a command prints last.

    Raises:
        NeoccError: it fails or takes more than ``TIMEOUT``; with its last words.
    """
    # Without the place of libtpu, which JAX writes there when it is imported: each has its own.
    own = {name: text for name, text in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    environment = {**own, **ENVIRONMENT}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise NeoccError(f"not done within {TIMEOUT:.0f} s") from None
    if log:
        log.write_text(done.stderr)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise NeoccError(reason(done.stderr))
    return json.loads(rows[-1])


def reason(log: str) -> str:
    """Of a failure: the compiler's word on memory, else the last line."""
    if found := re.search(r"Ran out of memory[^\n]*", log):
        return found[0][:300]
    lines = [line for line in log.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])[:300] if lines else "no message"


def auto_log(log: str) -> Row:
    """What auto-sharding says of itself: whole seconds of the pass, seconds in its solver (once for
    each axis of the mesh), and how many of these solves ended without proof."""
    found = re.search(r"Auto Sharding took (\d+) seconds", log)
    if not found:
        raise NeoccError("the compiler's log does not tell what auto-sharding took")
    return {
        "seconds": int(found[1]),
        "solver_seconds": [int(ms) / 1000 for ms in re.findall(r"Solver took (\d+) ms", log)],
        "not_proved": log.count("could only find a non-optimal solution"),
    }


def compile_plain(case: Case, way: str, layouts: Row | None, options: argparse.Namespace) -> Row:
    """The plain step in the other environment; without ``layouts``, by auto-sharding."""
    asked = request(case) | {"auto": layouts is None, "options": WHOLE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asked | (layouts or {})))
        command = [str(options.auto), str(STEP), str(folder / "request.json"), name]
        made = run(command, folder / "log.txt")
        log, text = (folder / "log.txt").read_text(), (folder / "hlo.txt").read_text()
    row = {
        "compiler": f"jax {made['jax']}, libtpu {made['libtpu']}",
        "compile_seconds": made["compile_seconds"],
        "compile_processor_seconds": made["compile_processor_seconds"],
        "reserved": made["argument"] + made["output"] - made["alias"] + made["temp"],
        **asdict(figures(text, case.laid)),
    }
    if layouts is None:
        row |= {"planner": auto_log(log), "layouts": made["layouts"]}
        row["rematerialised"] = log.count("Involuntary full rematerialization")
    kept(options.keep, case, way, text)
    return row


def compile_neocc(case: Case, way: str, layout: str, keep: Path | None) -> Row:
    """By neocc, in this process."""
    from neocc.backends.target import compile_for_target

    config = case.config if way == DEFAULT else case.plain
    plan, took = timed_plan(case, config, layout)
    row: Row = {"planner": took}
    if not plan.fits:
        raise NeoccError(f"needs {plan.memory.peak / 1e9:.1f} GB of {plan.memory_limit / 1e9:.1f}")
    begin = time.perf_counter()
    made = compile_for_target(plan)
    row |= {
        "compiler": f"jax {version('jax')}, libtpu {version('libtpu')}",
        "compile_seconds": round(time.perf_counter() - begin, 1),
        "reserved": made.reserved,
        "peak": made.peak,
        "planned_peak": plan.memory.peak,
        "planned_step": plan.timeline.step,
        **asdict(figures(made.hlo, case.laid)),
    }
    kept(keep, case, way, made.hlo)
    return row


def timed_plan(case: Case, config: gpt.Config, layout: str = "") -> tuple[Plan, Row]:
    """neocc's plan, with its seconds from the model on and its proof."""
    begin, busy = time.perf_counter(), time.process_time()
    plan = planned(case, config, layout)
    took = {
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
        "gap": plan.solution.gap,
    }
    return plan, took


def kept(folder: Path | None, case: Case, way: str, text: str) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.]+", "-", f"{case.name}-{way}")
        (folder / f"{name}.hlo.gz").write_bytes(gzip.compress(text.encode()))


def picked_by_mtf(case: Case, python: Path) -> Row:
    """Mesh TensorFlow's layout, its seconds and what it minimised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request(case)))
        return run([str(python), str(MTF), str(path)])


def measure(case: Case, way: str, mtf: Row, options: argparse.Namespace) -> Row:
    """One row. ``mtf``: what Mesh TensorFlow picked."""
    if way == AUTO:
        return compile_plain(case, way, None, options)
    if way == MTF_GSPMD:
        made = compile_plain(case, way, by_rules(case, mtf["layout"]), options)
        return {"planner": mtf} | made
    if way == NEOCC_GSPMD:
        plan, took = timed_plan(case, case.plain)
        return {"planner": took} | compile_plain(case, way, by_plan(plan), options)
    layout = neocc_rules(mtf["layout"]) if way == MTF_NEOCC else ""
    command = [sys.executable, "-m", "benchmarks.auto_sharding", "--one", case.name, way]
    command += ["--layout", layout] + (["--keep", str(options.keep)] if options.keep else [])
    made = run(command)
    if way == MTF_NEOCC:
        made["planner"] = {**mtf, "layout": layout}
    return made


def fill(results: dict[str, dict[str, Row]], options: argparse.Namespace) -> None:
    """Runs what has no figures yet and keeps each as it comes."""
    for case in (c for c in CASES if options.only in c.name):
        rows = results.setdefault(case.name, {})
        mtf: Row = {}
        for way in (w for w in WAYS if "planner" not in rows.get(w, {})):
            try:
                if way in (MTF_GSPMD, MTF_NEOCC) and not mtf:
                    mtf = picked_by_mtf(case, options.mtf)
                rows[way] = measure(case, way, mtf, options)
            except NeoccError as error:
                rows[way] = {"failed": str(error)}
                if way in (MTF_GSPMD, MTF_NEOCC):
                    rows[way]["picked"] = mtf
            print(case.name, line(way, rows[way]), sep="\n", flush=True)
            ordered = {w: rows[w] for w in WAYS if w in rows}
            results[case.name] = ordered
            options.results.write_text(json.dumps(results, indent=1) + "\n")


def line(way: str, row: Row) -> str:
    if "failed" in row:
        return f"  {way:20} {row['failed']}"
    planner = row["planner"]
    found = (
        f"  {way:20} {planner['seconds']:7.1f} s  {row['reserved'] / 1e9:6.2f} GB"
        f"  {row['cycles'] / 1e6:8.1f} M cycles  {row['flops'] / 1e12:7.2f} TFLOP"
        f"  sent {row['sent'] / 1e9:6.2f} GB in {row['collectives']:5}"
        f"  compute {row['compute'] * 1e3:6.1f} ms, wires {row['wires'] * 1e3:6.1f} ms"
    )
    return found + (f"  {planner['layout']}" if "layout" in planner else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--auto", type=Path, help="Python with jax[tpu]==0.6.2")
    parser.add_argument("--mtf", type=Path, help="Python with mesh-tensorflow")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--keep", type=Path, help="a folder for the compiled text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, way = options.one
        case = next(c for c in CASES if c.name == name)
        print(json.dumps(compile_neocc(case, way, options.layout, options.keep)), flush=True)
        os._exit(0)  # libtpu may not end by itself
    if (options.auto is None) != (options.mtf is None):
        sys.exit("give --auto and --mtf, or neither to print what is kept")
    results: dict[str, dict[str, Row]] = {}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    if options.auto:
        fill(results, options)
        return
    for name, rows in results.items():
        print(name, *(line(way, row) for way, row in rows.items()), sep="\n")


if __name__ == "__main__":
    main()
