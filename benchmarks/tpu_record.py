"""What is stored of a case: its plan as the solver's picks, and what the TPU compiler made of
it."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tpu_buffers import HBM, ON_CHIP, peak_bytes, until_buffers
from benchmarks.tpu_cases import Case
from models import gpt
from neocc.backends.target import compile_for_target, lower_for_target
from neocc.backends.tpu import BACKEND
from neocc.cost.hardware import chip
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.text import print_program
from neocc.lower.audit import pair
from neocc.lower.hlo import HloFacts, axes_of, axes_of_pairs, read_hlo
from neocc.passes.layout.build import build
from neocc.passes.layout.memory import peak
from neocc.passes.layout.problem import Case as Followed
from neocc.passes.layout.problem import Choice, Problem
from neocc.passes.layout.rules import given_layout
from neocc.passes.layout.solve import Solution
from neocc.passes.plan import Plan, bodies, costed, make_plan, prepare


class StaleError(NeoccError):
    """A stored plan is of another program than the case builds now."""


@dataclass(frozen=True)
class Record:
    """Bytes, FLOPs and cycles are of one device and one step.

    picks: the option of each choice that no others decide, in the problem's order; moves: of each
    flow, its moves as ``source>target``; both as numbers into ``words``. peak: what is live at the
    fullest moment;
    held: the same, with what lies in on-chip memory; None where buffers were not looked at.
    reserved: arguments and the block for temporaries, None where code was not generated; then
    cycles is 0 too. collectives: rows (kind, axes, bytes in, bytes out, runs, how many) of the
    compiled program. findings: the audit's verdicts, with how many of each. loops: rows (region
    of the plan, trips, estimated cycles of one trip).
    """

    program: str
    words: list[str]
    picks: list[int]
    moves: list[list[int]]
    compiler: str
    seconds: float
    peak: int
    reserved: int | None
    flops: int
    cycles: int
    loops: list[list[Any]]
    collectives: list[list[Any]]
    findings: dict[str, int]
    unexplained: list[str]
    held: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        return Record(**data)


def plan_case(case: Case) -> Plan:
    """The case's plan by the planner as it is."""
    layout = case.layout if ":" in case.layout else ""
    mesh = Mesh.parse(case.mesh)
    return make_plan(gpt.train_step(case.config), mesh, chip(case.chip), layout, case.rules)


def digest(problem: Problem) -> str:
    text = print_program(problem.program, locs=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replay(case: Case, record: Record) -> Plan:
    """The stored plan under the cost model as it is.

    Raises:
        StaleError: the case builds another program, or other choices, than those stored.
    """
    layout = case.layout if ":" in case.layout else ""
    mesh = Mesh.parse(case.mesh)
    ready = prepare(gpt.train_step(case.config), mesh, chip(case.chip), layout)
    problem = build(ready.program, mesh, ready.cost, case.rules or given_layout(ready.given))
    deciding = [c for c in problem.choices if not decided(c)]
    same = len(deciding) == len(record.picks) and len(problem.flows) == len(record.moves)
    if digest(problem) != record.program or not same:
        raise StaleError("its program has changed since it was compiled; compile it again")
    picked: dict[Choice, int] = {}
    used = {}
    for choice, word in zip(deciding, record.picks, strict=True):
        options = list(map(str, choice.options))
        if record.words[word] not in options:
            raise StaleError(f"{choice.name} has no option {record.words[word]} any more")
        picked[choice] = options.index(record.words[word])
    decide(problem, picked)
    for flow, row in zip(problem.flows, record.moves, strict=True):
        wanted = {record.words[i] for i in row}
        arcs = problem.reshards_of(flow).moves if wanted else []
        found = {f"{m.source}>{m.target}": (m.source, m.target) for m in arcs}
        if wanted - set(found):
            raise StaleError(f"{flow.value!r} has no move {min(wanted - set(found))} any more")
        used[flow.value] = frozenset(found[w] for w in wanted)
    solution = Solution(problem.assignment(picked, used), picked, 0, 0, 0, np.zeros(0), 0, 0)
    memory, _ = peak(problem, solution)
    return costed(ready, problem, solution, memory, float(ready.chip.hbm_bytes))


def decided(choice: Choice) -> bool:
    """Whether others decide what a choice is: how many cases it has depends on the cost model."""
    return all(isinstance(o, Followed) for o in choice.options)


def decide(problem: Problem, picked: dict[Choice, int]) -> None:
    """Adds to what is ``picked`` the options of the choices that others decide."""
    left = {c: set(range(len(c.options))) for c in problem.choices if c not in picked}
    while left:
        for a in problem.agreements:
            for choice, keys, other, wanted in (
                (a.a, a.a_keys, a.b, a.b_keys),
                (a.b, a.b_keys, a.a, a.a_keys),
            ):
                if choice in left and other in picked:
                    left[choice] &= set(np.flatnonzero(keys == wanted[picked[other]]).tolist())
        found = {c: min(options) for c, options in left.items() if len(options) == 1}
        if not found:
            raise StaleError(f"nothing decides {next(iter(left)).name}")
        picked.update(found)
        left = {c: options for c, options in left.items() if c not in found}


def measure(plan: Plan) -> tuple[Record, str]:
    """Compiles a plan for its chip; the record, and the optimised HLO."""
    begin = time.perf_counter()
    made = compile_for_target(plan)
    seconds = time.perf_counter() - begin
    return record_of(plan, made.hlo, made.peak, made.reserved, seconds), made.hlo


def measure_buffers(plan: Plan, folder: Path, limit: float) -> tuple[Record, str]:
    """As ``measure``, up to the assignment of buffers, which XLA is to dump into ``folder``. The
    process has to end after it.

    Raises:
        NeoccError: the compiler refuses the program, or takes more than ``limit`` seconds.
    """
    lowered = lower_for_target(plan)
    begin = time.perf_counter()
    stage = lowered.function.lower(*lowered.shape_structs())
    options = BACKEND.compiler_options()
    text = until_buffers(lambda: stage.compile(compiler_options=options), folder, limit)
    seconds = time.perf_counter() - begin
    record = record_of(plan, text, peak_bytes(folder, text), None, seconds)
    return replace(record, held=peak_bytes(folder, text, (HBM, ON_CHIP))), text


def record_of(plan: Plan, text: str, peak: int, reserved: int | None, seconds: float) -> Record:
    facts = read_hlo(text)
    problem, solution = plan.problem, plan.solution
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    deciding = (c for c in problem.choices if not decided(c))
    picks = [word(str(c.options[solution.picked[c]])) for c in deciding]
    moved = solution.assignment.moves or {}
    moves = [sorted(word(f"{s}>{t}") for s, t in moved.get(f.value, ())) for f in problem.flows]
    findings = pair(plan, facts)
    return Record(
        program=digest(problem),
        words=list(words),
        picks=picks,
        moves=moves,
        compiler=f"jax {version('jax')}, libtpu {version('libtpu')}",
        seconds=round(seconds, 1),
        peak=peak,
        reserved=reserved,
        flops=facts.flops,
        cycles=facts.estimated_cycles,
        loops=loops(plan, facts),
        collectives=collectives(plan, facts),
        findings=dict(Counter(short(f.verdict) for f in findings)),
        unexplained=[f"{f.verdict}: {f.planned or f.compiled}"[:300] for f in findings if not f.ok],
    )


def short(verdict: str) -> str:
    """A verdict without names of instructions and counts of what it was combined with."""
    return re.sub(r"combined with \d+ more in \S+", "combined", verdict)


def loops(plan: Plan, facts: HloFacts) -> list[list[Any]]:
    """(region of the plan, trips, cycles of one trip) of each loop that is one of the plan's."""
    names = {b.region: b.name for b in bodies(plan.partitioned.program.body)}
    repeats = [op for op in plan.partitioned.program.body.walk() if op.kind == "repeat"]
    by_scope = {f"neocc.repeat.{op.attrs['id']}/": names[op.regions[0]] for op in repeats}
    found = []
    for loop in facts.loops:
        name = next((n for scope, n in by_scope.items() if scope in loop.op_name + "/"), None)
        if name:
            found.append([name, loop.trip_count, loop.cycles])
    return found


def collectives(plan: Plan, facts: HloFacts) -> list[list[Any]]:
    sizes, names = plan.mesh.sizes, plan.mesh.names
    rows: Counter[tuple[Any, ...]] = Counter()
    for c in facts.collectives:
        read = axes_of_pairs if c.kind == "collective-permute" else axes_of
        axes = read(c.groups, sizes)
        where = "?" if axes is None else "".join(names[a] for a in axes)
        rows[c.kind, where, c.operand_bytes, c.result_bytes, c.trip_count] += 1
    return [[*row, n] for row, n in sorted(rows.items())]
