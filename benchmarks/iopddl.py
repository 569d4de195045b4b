"""Problems that neocc did not make: Google's ASPLOS 2025 contest on intra-operator parallelism.

    python -m benchmarks.iopddl ../shared/data/iopddl/*.json.gz [--write FILE]

Solves each problem in a process of its own within the contest's time for it, from the start of the
process to the answer: reading, set-up and loading of compiled loops included. (Compiling them,
once per machine, is done first and not counted, as the contest did not count its C++ compilers.)
Prints the cost, the best that any contest team got on 8 cores, their ratio, a proved lower bound,
the gap to it, and the part of the bound that the messages prove without HiGHS. Cost and memory are
checked by `evaluate`, which shares nothing with the solver: integers out of the file, as the
contest's rules count them.

The format: ``nodes`` have ``costs`` and ``usages`` per strategy and an interval [begin, end) of
times at which they use memory; ``edges`` have a cost per pair of strategies, row-major; at no time
may the sum of usages pass ``usage_limit``. 10^18 means that it is not allowed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORBIDDEN = 10**18
RESERVE = 1.0  # seconds kept for handing over the answer

# Name of the problem: best cost of any team, seconds allowed (the contest's results).
CONTEST = {
    "asplos-2025-iopddl-A": (6548641531, 60.0),
    "asplos-2025-iopddl-G": (217039, 120.0),
    "asplos-2025-iopddl-M": (49928460991, 180.0),
    "asplos-2025-iopddl-S": (1534613444, 240.0),
}


def read(path: Path) -> dict[str, Any]:
    """The ``problem`` of a file, gzipped or not."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["problem"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a problem in the contest's format ({error})")


def to_problem(data: dict[str, Any]) -> Any:
    """The package's problem."""
    from neocc.passes.layout.pairwise.problem import make_problem

    def allowed(costs: list[int]) -> list[float]:
        return [math.inf if c >= FORBIDDEN else c for c in costs]

    return make_problem(
        [allowed(c) for c in data["nodes"]["costs"]],
        data["nodes"]["usages"],
        data["nodes"]["intervals"],
        data["edges"]["nodes"],
        [allowed(c) for c in data["edges"]["costs"]],
        data.get("usage_limit"),
    )


def evaluate(data: dict[str, Any], picked: list[int]) -> tuple[int, int]:
    """Cost and peak usage of one strategy per node, by the contest's definition."""
    nodes, edges = data["nodes"], data["edges"]
    assert len(picked) == len(nodes["costs"])
    assert all(0 <= s < len(c) for s, c in zip(picked, nodes["costs"], strict=True))
    cost = sum(c[s] for c, s in zip(nodes["costs"], picked, strict=True))
    for ends, table in zip(edges["nodes"], edges["costs"], strict=True):
        index = 0
        for node in ends:
            index = index * len(nodes["costs"][node]) + picked[node]
        cost += table[index]
    change: dict[int, int] = {}
    for (begin, end), usages, s in zip(nodes["intervals"], nodes["usages"], picked, strict=True):
        if begin < end:
            change[begin] = change.get(begin, 0) + usages[s]
            change[end] = change.get(end, 0) - usages[s]
    peak = now = 0
    for when in sorted(change):
        now += change[when]
        peak = max(peak, now)
    return cost, peak


def row(path: Path, seconds: float | None, begin: float) -> dict[str, Any]:
    """Solve one file; ``begin`` is when its clock started (``time.time()``)."""
    data = read(path)
    best, allowed = CONTEST.get(data["name"], (None, None))
    limit = seconds or allowed
    if limit is None:
        sys.exit(f"{path}: {data['name']} was not in the contest; give --seconds")
    from neocc.passes.layout.pairwise.solve import solve

    result = solve(to_problem(data), limit - RESERVE - (time.time() - begin))
    taken = time.time() - begin
    # Costs are whole numbers, so the bound may be rounded up (but for what rounding added).
    bound, dual = (
        math.ceil(b - 1e-6) if math.isfinite(b) else None for b in (result.bound, result.dual)
    )
    found: dict[str, Any] = {
        "problem": data["name"],
        "cost": None,
        "best_of_contest": best,
        "ratio": None,
        "bound": bound,
        "gap": None,
        "bound_of_messages": dual,
        "seconds": round(taken, 1),
        "allowed": limit,
        "nodes": len(data["nodes"]["costs"]),
        "nodes_left": result.nodes,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of the machine: what else ran on these cores
    }
    if result.picked is None:
        return found
    cost, peak = evaluate(data, result.picked.tolist())
    if peak > data.get("usage_limit", peak) or cost >= FORBIDDEN or (bound and bound > cost):
        sys.exit(f"{path}: wrong: cost {cost}, bound {bound}, peak {peak}")
    found["cost"] = cost
    found["gap"] = round((cost - (bound or 0)) / cost, 7) if cost else 0.0
    found["ratio"] = round(cost / best, 5) if best else None
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--seconds", type=float, help="in place of the contest's time")
    parser.add_argument("--write", type=Path, help="write the rows as JSON")
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.files:
        parser.error("no files: give some of ../shared/data/iopddl/*.json.gz")
    missing = [str(f) for f in options.files if not f.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if options.begin is not None:
        print(json.dumps(row(options.files[0], options.seconds, options.begin)))
        return
    from neocc.passes.layout.pairwise.solve import compile_loops

    begin = time.time()
    compile_loops()
    print(f"loops compiled or loaded in {time.time() - begin:.1f} s", flush=True)
    rows = []
    for path in options.files:
        command = [sys.executable, "-m", "benchmarks.iopddl", str(path)]
        if options.seconds:
            command += ["--seconds", str(options.seconds)]
        command += ["--begin", repr(time.time())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if options.write:
        options.write.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
