"""Memory at every point of a program where it can peak, linear in the layout problem's choices.

A point is an op of some region, with what is live there: each live value holds its block in the
layout that its source makes, and a resharded copy lives from its first to its last reader. What a
compiler fuses into its readers is never stored. Loops hold their stacked operands and results
whole, and, inside, what the body holds at its own points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from neocc.ir.mesh import Layout
from neocc.ir.ops import ELEMENTWISE
from neocc.ir.program import Op, Region, Value
from neocc.passes.layout.objective import Limit
from neocc.passes.layout.problem import Choice, End, Flow, Problem
from neocc.passes.layout.solve import Solution

MOVED = {"rename", "split", "merge", "shift", "pad", "slice"}
FUSED = ELEMENTWISE | MOVED | {"either", "iota", "constant"}
ROLES = {"parameter": "parameters", "state": "optimizer state", "data": "data"}
KINDS = (*ROLES.values(), "saved for backward", "gradients", "temporaries")


@dataclass(frozen=True, eq=False)
class Live:
    """One value that is held at a point, as what; with ``copies``, its resharded copies."""

    value: Value
    kind: str
    source: End
    copies: Flow | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """An op and all that is live while it runs."""

    op: Op
    live: tuple[Live, ...]

    @property
    def name(self) -> str:
        return f"{self.op.kind} at {self.op.loc}" if self.op.loc else self.op.kind


@dataclass(frozen=True)
class Memory:
    """Bytes per device at the point where they peak, by kind; where that is; and the largest
    tensors held there."""

    by_kind: dict[str, int]
    point: str
    largest: tuple[tuple[str, int], ...]

    @property
    def peak(self) -> int:
        return sum(self.by_kind.values())


def points(problem: Problem, picked: Mapping[Choice, int] | None = None) -> list[Point]:
    """Every point of the problem's program; with ``picked``, without what is off. Where that is
    open, a value is held until the last op that may read it."""
    flows = {f.value: f for f in problem.flows}
    take = (lambda region: region) if picked is None else without_off(problem, picked)
    return list(region_points(problem, flows, take, problem.program.body, ()))


def without_off(problem: Problem, picked: Mapping[Choice, int]) -> Callable[[Region], Region]:
    """A region's ops that are on, each ``either`` with the one operand that it takes."""
    off = problem.dropped(picked)

    def take(region: Region) -> Region:
        ops: list[Op] = []
        for op in region.ops:
            if op.kind == "either":
                operand = op.operands[problem.recomputes(picked, op)]
                ops.append(Op("either", [operand], op.results, loc=op.loc))
            elif op not in off.ops:
                ops.append(op)
        gone = off.outputs[region]
        outputs = tuple(v for i, v in enumerate(region.outputs) if i not in gone)
        return Region(region.args, tuple(ops), outputs)

    return take


def region_points(
    problem: Problem,
    flows: dict[Value, Flow],
    take: Callable[[Region], Region],
    whole: Region,
    outside: tuple[Live, ...],
) -> Iterator[Point]:
    program = problem.program
    region = take(whole)
    kinds = value_kinds(problem, region, whole is program.body)
    stored = materialised(region)
    last = last_use(region, stored)
    held: list[tuple[int, int, Live]] = []

    def hold(begin: int, end: int, value: Value) -> None:
        held.append((begin, end, Live(value, kinds[value], problem.sources[value][0])))

    if whole is program.body:
        replacing = {
            program.output_value(i.name) for i in program.inputs if i.name in program.outputs
        }
        for v in region.args:
            hold(-1, len(region.ops), v)
    else:
        replacing = set()
        # Slices of stacked operands are read in place; carried values are the loop's own.
        for v in region.args[: len(region.args) - problem.slices[whole]]:
            hold(-1, last.get(v, -1), v)
    for i, op in enumerate(region.ops):
        for v in op.results:
            # A new parameter is written into the buffer of the one that it replaces.
            if v in stored and v not in replacing:
                hold(i, last.get(v, i), v)
    for v, flow in flows.items():
        readers = [i for i, op in enumerate(region.ops) if v in op.operands]
        if flow.region is whole and readers:
            live = Live(v, "temporaries", problem.sources[v][0], flow)
            held.append((readers[0], readers[-1], live))
    for i, op in enumerate(region.ops):
        here = tuple(live for begin, end, live in held if begin <= i <= end)
        if op.kind == "repeat":
            yield from region_points(problem, flows, take, op.regions[0], (*outside, *here))
        else:
            yield Point(op, (*outside, *here))


def value_kinds(problem: Problem, region: Region, outermost: bool) -> dict[Value, str]:
    """What each value of a region is, for the report."""
    kinds = {v: "temporaries" for op in region.ops for v in op.results}
    kinds.update(dict.fromkeys(region.args, "temporaries"))
    if outermost:
        kinds.update({v: ROLES[i.role] for i, v in problem.program.named_inputs})
    read_by_loops = {v for op in region.ops if op.kind == "repeat" for v in op.operands}
    for op in region.ops:
        if op.kind == "repeat":
            for v in op.results[op.attrs["carries"] :]:
                kinds[v] = "saved for backward" if v in read_by_loops else "gradients"
    return kinds


def materialised(region: Region) -> set[Value]:
    """Values that get a buffer: everything but what is fused into its readers."""
    found: set[Value] = set(region.outputs)
    for op in region.ops:
        if op.kind not in FUSED:
            found.update(op.results)
            if op.kind != "reduce":
                found.update(op.operands)
    # An either is a name of what it takes.
    names = {op.result for op in region.ops if op.kind == "either"}
    return {v for v in found - names if v.type.dims}


def last_use(region: Region, stored: set[Value]) -> dict[Value, int]:
    """The last op that reads each value, itself or through values that are fused into it."""
    found: dict[Value, int] = dict.fromkeys(region.outputs, len(region.ops))
    for i, op in reversed(list(enumerate(region.ops))):
        # What a fused op makes is made again where it is read: there its operands are read too.
        fused = op.kind in FUSED and not any(r in stored for r in op.results)
        until = max((found.get(r, i) for r in op.results), default=i) if fused else i
        for v in op.operands:
            found[v] = max(found.get(v, -1), until)
    return found


def measure(problem: Problem, solution: Solution) -> Callable[[Live], int]:
    """Bytes per device of a live value in a solution."""
    mesh = problem.mesh
    moves = solution.assignment.moves or {}
    cache: dict[Live, int] = {}

    def size(live: Live) -> int:
        if live not in cache:
            if live.copies is None:
                made = live.source.layouts[solution.picked[live.source.choice]]
                held = set() if made is None else {made}
            else:
                held = {target for _, target in moves.get(live.value, ())}
            cache[live] = sum(live.value.type.local_bytes(mesh, lay) for lay in held)
        return cache[live]

    return size


def peak(problem: Problem, solution: Solution) -> tuple[Memory, Op]:
    """The memory of a solution, and the op at which it peaks."""
    size = measure(problem, solution)
    point = max(points(problem, solution.picked), key=lambda p: sum(map(size, p.live)))
    by_kind = dict.fromkeys(KINDS, 0)
    for live in point.live:
        by_kind[live.kind] += size(live)
    largest = sorted(point.live, key=size, reverse=True)[:8]
    named = tuple((live.value.name or str(live.value.type), size(live)) for live in largest)
    return Memory(by_kind, point.name, named), point.op


def limit(problem: Problem, point: Point, available: float) -> Limit:
    """The solver's row that keeps one point within ``available`` bytes per device."""
    mesh = problem.mesh
    options: dict[Choice, list[float]] = {}
    moves: dict[Flow, dict[Layout, float]] = {}
    for live in point.live:
        type, choice = live.value.type, live.source.choice
        if live.copies is None:
            held = options.setdefault(choice, [0.0] * len(choice.options))
            for i, layout in enumerate(live.source.layouts):
                held[i] += 0 if layout is None else type.local_bytes(mesh, layout)
        else:
            graph = problem.reshards_of(live.copies)
            targets = {m.target for m in graph.moves}
            moves[live.copies] = {t: float(type.local_bytes(mesh, t)) for t in targets}
    return Limit(point.name, available, options, moves)
