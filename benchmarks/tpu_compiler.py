"""Hold the cost model against the TPU compiler over many programs: memory, collectives, cycles.

    python -m benchmarks.tpu_compiler                 compile what has no results yet, then score
    python -m benchmarks.tpu_compiler --rescore       score the stored results, compile nothing
    python -m benchmarks.tpu_compiler --only TEXT     cases whose name has the text
    python -m benchmarks.tpu_compiler --buffers       stop each compile before code is generated
    python -m benchmarks.tpu_compiler --held          add what the stored plans hold on chip
    python -m benchmarks.tpu_compiler --keep FOLDER   keep the compiled text there

Each case of ``benchmarks/tpu_cases.py`` is planned, lowered and compiled by the real TPU compiler
for a described slice, in a process of its own: 20 to 100 seconds of one core, or 4 with
``--buffers``, which has all but the estimated cycles. Stored are the plan (the option of each
choice, the moves of each flow) and the compiler's figures, so that a changed cost model predicts
the same programs again in seconds. A case whose program changed has to be compiled again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.apart import run_apart
from benchmarks.tpu_buffers import FLAGS
from benchmarks.tpu_cases import CASES, Case
from benchmarks.tpu_record import Record, StaleError, measure, measure_buffers, plan_case, replay
from benchmarks.tpu_score import Score, report, score

RESULTS = Path(__file__).parent / "results" / "tpu_compiler.json"
TIMEOUT = 1200.0  # seconds that planning and compiling one case may take


def compile_apart(case: Case, options: argparse.Namespace) -> Record | None:
    """Compiles a case in a process of its own."""
    command = ["benchmarks.tpu_compiler", "--one", case.name]
    command += ["--keep", str(options.keep)] if options.keep else []
    command += ["--buffers"] if options.buffers else []
    command += ["--held", "--buffers", "--results", str(options.results)] if options.held else []
    with tempfile.TemporaryDirectory() as folder:
        dump = {"XLA_FLAGS": FLAGS.format(folder), "NEOCC_XLA_DUMP": folder}
        made = run_apart(
            case.name, command, TIMEOUT, dump if options.buffers or options.held else {}
        )
    return Record.from_json(made) if made else None


def compile_here(case: Case, buffers: bool, keep: Path | None, stored: Record | None) -> Record:
    """Plans, if no plan is ``stored``, and compiles; with ``keep``, the HLO text is written there
    (gzip)."""
    plan = plan_case(case) if stored is None else replay(case, stored)
    if buffers:
        record, text = measure_buffers(plan, Path(os.environ["NEOCC_XLA_DUMP"]), TIMEOUT / 2)
    else:
        record, text = measure(plan)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{slug(case)}.hlo.gz").write_bytes(gzip.compress(text.encode()))
    return record


def slug(case: Case) -> str:
    return re.sub(r"[^\w.]+", "-", case.name).strip("-")


def load(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    return {name: Record.from_json(row) for name, row in json.loads(path.read_text()).items()}


def store(path: Path, records: dict[str, Record]) -> None:
    """One line a case, in the order of the cases."""
    order = {c.name: i for i, c in enumerate(CASES)}
    names = sorted(records, key=lambda n: order.get(n, len(order)))
    lines = (f"{json.dumps(n)}: {json.dumps(records[n].to_json())}" for n in names)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def scored(case: Case, record: Record) -> Score | None:
    """None where the stored plan is of another program than the case now builds."""
    try:
        return score(case.name, replay(case, record), record)
    except StaleError as error:
        print(f"{case.name}: {error}", file=sys.stderr)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rescore", action="store_true")
    parser.add_argument("--buffers", action="store_true")
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = next(c for c in CASES if c.name == options.one)
        stored = load(options.results).get(case.name) if options.held else None
        record = compile_here(case, options.buffers, options.keep, stored)
        print(json.dumps(record.to_json()), flush=True)
        os._exit(0)  # a compile may still run in a thread
    cases = [c for c in CASES if options.only in c.name]
    if not cases:
        sys.exit(f"no case has {options.only!r} in its name")
    records = load(options.results)
    stored_only = options.rescore or options.held
    found: list[Score] = []
    for case in cases:
        record = records.get(case.name)
        if options.held and record is not None and record.held is None:
            looked = compile_apart(case, options)
            if looked:
                record = records[case.name] = replace(record, held=looked.held)
                store(options.results, records)
        done = record is not None and (record.cycles > 0 or options.buffers or stored_only)
        result = scored(case, record) if record and done else None
        if result is None and not stored_only:
            record = compile_apart(case, options)
            result = scored(case, record) if record else None
            if record and result:
                records[case.name] = record
                store(options.results, records)
        if result:
            found.append(result)
            print(result.line(), flush=True)
    print(report(found))


if __name__ == "__main__":
    main()
