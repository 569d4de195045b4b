"""Memory at every point of a program where it can peak, linear in the layout problem's choices.

A point is an op of some region, with what is live there: each live value holds its block in the
layout that its source makes, and a resharded copy lives from its first to its last reader. What a
compiler fuses into its readers is never stored. Loops hold their stacked operands and results
whole, and, inside, what the body holds at its own points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from neocc.cost.tiling import LANES, stored_bytes
from neocc.ir.mesh import Layout
from neocc.ir.program import Op, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.cluster import accumulates
from neocc.passes.layout.liveness import FUSED, epilogues, fused, last_use, materialised
from neocc.passes.layout.objective import Limit
from neocc.passes.layout.problem import Choice, End, Flow, Problem
from neocc.passes.layout.solve import Solution

ROLES = {"parameter": "parameters", "state": "optimizer state", "data": "data"}
KINDS = (*ROLES.values(), "saved for backward", "gradients", "temporaries")

# A reader's place in the region, the last place where it reads through values that are fused into
# it, and the flow's end; None for one that reads the value as it is made.
Read = tuple[int, int, End | None]


@dataclass(frozen=True, eq=False)
class Live:
    """One value that is held at a point, as what; or, with ``copies``, its resharded copies.

    ``before`` and ``after``: the ends of the flow that read it here or have read it, and those that
    read it here or later: a copy is made just before its first reader. ``bound``: something reads
    it as it is made, here or later, or it is being made here. ``passing``: only partial sums of
    it are stored. ``replaces``: where an input lies that it is written over if it lies alike.
    ``turned``: it is a copy that a loop reads, made where its last dim was not along the lanes.
    """

    value: Value
    kind: str
    source: End
    copies: Flow | None = None
    before: tuple[End, ...] = ()
    after: tuple[End, ...] = ()
    bound: bool = True
    passing: bool = False
    replaces: End | None = None
    turned: bool = False


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
    outermost = whole is program.body
    region = take(whole)
    kinds = value_kinds(problem, region, outermost)
    stored = materialised(region, apart=problem.cost.chip.kind == "gpu")
    passing = epilogues(region, stored)
    last = last_use(region, stored)
    begins: dict[Value, int] = {}
    replacing: dict[Value, End] = {}
    updates: dict[Value, Choice] = {}
    if outermost:
        ends = dict(zip(whole.outputs, problem.boundaries[whole][1], strict=True))
        for info, v in program.named_inputs:
            if info.name in program.outputs:
                new = program.output_value(info.name)
                replacing[new] = ends[new]
                # What replaces an input reads it where it is stored, which is why it is there.
                updates[v] = problem.sources[new][0].choice
        begins.update(dict.fromkeys(region.args, -1))
        last.update(dict.fromkeys(region.args, len(region.ops)))
    else:
        # Slices of stacked operands are read in place; carried values are the loop's own, and
        # accumulators are added to in place.
        carried = len(region.args) - problem.slices[whole]
        begins.update(dict.fromkeys(region.args[:carried], -1))
        for v, out, end in zip(
            region.args, region.outputs, problem.boundaries[whole][0], strict=False
        ):
            if accumulates(region, v):
                replacing[out] = end
                last[v] = len(region.ops)
    for i, op in enumerate(region.ops):
        begins.update((v, i) for v in op.results if v in stored)
    readers = {
        v: read_by(problem, flow, whole, region, last, stored)
        for v, flow in flows.items()
        if flow.region is whole
    }

    held: list[list[Live]] = [[] for _ in region.ops]

    def hold(
        first: int, end: int, ends: Sequence[Read], live: Callable[[int], Live | None]
    ) -> None:
        """Notes a value's ``live`` at ops ``first`` to ``end``: it changes where readers do."""
        changes = {first + 1, *(at for at, _, _ in ends), *(at + 1 for at, _, _ in ends)}
        changes.update(until + 1 for _, until, _ in ends)
        first, end = max(first, 0), min(end, len(region.ops) - 1)
        starts = sorted({first, *(i for i in changes if first < i <= end)})
        for start, stop in itertools.pairwise([*starts, end + 1]):
            if (found := live(start)) is not None:
                for i in range(start, stop):
                    held[i].append(found)

    for v, begin in begins.items():
        ends = readers.get(v, [])

        def block(
            i: int, v: Value = v, begin: int = begin, ends: Sequence[Read] = ends
        ) -> Live | None:
            if v in passing and i > min((at for at, _, _ in ends), default=begin):
                return None
            before = tuple(e for at, _, e in ends if e is not None and at <= i)
            after = tuple(e for _, until, e in ends if e is not None and until >= i)
            as_made = any(e is None and until >= i for _, until, e in ends)
            bound = as_made or not ends or i <= begin or (outermost and begin < 0)
            source = problem.sources[v][0]
            over = replacing.get(v)
            return Live(v, kinds[v], source, None, before, after, bound, v in passing, over)

        hold(begin, last.get(v, begin), ends, block)
    for v, ends in readers.items():

        def copies(i: int, v: Value = v, ends: Sequence[Read] = ends) -> Live | None:
            updating = updates.get(v)
            reading = [(at, until, e) for at, until, e in ends if e is not None]
            before = tuple(e for at, _, e in reading if at <= i)
            after = tuple(
                e
                for at, until, e in reading
                if until >= i and (e.choice is not updating or at <= i)
            )
            source = problem.sources[v][0]
            if not (before and after):
                return None
            return Live(v, "temporaries", source, flows[v], before, after)

        hold(0, len(region.ops), ends, copies)
    for i, op in enumerate(region.ops):
        if op.kind == "repeat":
            # What a loop carries lies where it came in, if that is its last use, and goes out.
            carries = op.attrs["carries"]
            own = {v for v in op.operands[:carries] if last.get(v, i) <= i}
            own.update(op.results[:carries])
            around = [h for h in held[i] if h.value not in own or h.copies]
            around += turned(problem, region, op, around)
            live = (*outside, *around)
            inner = list(region_points(problem, flows, take, op.regions[0], live))
            yield from inner or [Point(op, live)]  # one at least: a loop may do nothing
        else:
            yield Point(op, (*outside, *held[i]))


def turned(problem: Problem, region: Region, loop: Op, held: Sequence[Live]) -> list[Live]:
    """What a TPU's compiler holds once more for a loop: a product's result that every turn reads
    whole. The loop takes its dims in their order; the product made it with another dim along the
    lanes, if the last one is no whole number of lanes long (libtpu 0.0.42)."""
    if problem.cost.chip.kind != "tpu":
        return []
    producer = {r: op for op in region.ops for r in op.results}

    def by_product(v: Value) -> bool:
        op = producer.get(v)
        if op is None or op.kind == "einsum" or op.kind not in FUSED:
            return op is not None and op.kind == "einsum"
        return any(by_product(u) for u in op.operands if u.type.size == v.type.size)

    whole = loop.operands[loop.attrs["carries"] + loop.attrs["stacked"] :]
    read = {v for v in whole if by_product(v)}
    return [replace(h, turned=True) for h in held if h.value in read and h.copies is None]


def read_by(
    problem: Problem,
    flow: Flow,
    whole: Region,
    region: Region,
    last: Mapping[Value, int],
    stored: set[Value],
) -> list[Read]:
    """Who reads a flow's value."""
    v = flow.value
    found: list[Read] = []
    for i, op in enumerate(region.ops):
        if v not in op.operands:
            continue
        until = i
        if fused(op, stored):
            until = max((last.get(r, i) for r in op.results), default=i)
        if op.kind == "repeat":
            args = problem.boundaries[op.regions[0]][0]
            wanted = {args[j].choice for j, u in enumerate(op.operands) if u is v}
        elif op.kind == "either":
            wanted = set()
        else:
            wanted = {problem.choice_of[op]}
        ends = [e for e in flow.sinks if e.choice in wanted]
        found.extend((i, until, e) for e in ends or [None])
    if v in region.outputs:
        outputs = problem.boundaries[whole][1]
        wanted = {e.choice for e, u in zip(outputs, whole.outputs, strict=True) if u is v}
        ends = [e for e in flow.sinks if e.choice in wanted]
        # A loop's outputs leave with its step; the program's are all there when it ends.
        end = len(region.ops) - (whole is problem.program.body)
        found.extend((end, end, e) for e in ends or [None])
    return found


def value_kinds(problem: Problem, region: Region, outermost: bool) -> dict[Value, str]:
    """What each value of a region is, for the report."""
    kinds = {v: "temporaries" for op in region.ops for v in op.results}
    kinds.update(dict.fromkeys(region.args, "temporaries"))
    kinds.update((v, "gradients") for v in region.args if accumulates(region, v))
    if outermost:
        kinds.update({v: ROLES[i.role] for i, v in problem.program.named_inputs})
    read_by_loops = {v for op in region.ops if op.kind == "repeat" for v in op.operands}
    for op in region.ops:
        if op.kind == "repeat":
            inner = op.regions[0]
            for v, arg in zip(op.results, inner.args[: op.attrs["carries"]], strict=False):
                if accumulates(inner, arg):
                    kinds[v] = "gradients"
            for v in op.results[op.attrs["carries"] :]:
                kinds[v] = "saved for backward" if v in read_by_loops else "gradients"
    return kinds


def block_bytes(problem: Problem, type: TensorType, layout: Layout) -> int:
    """Bytes of a device's block, padding of the chip's tiled layout included; on the host, none."""
    if layout.host:
        return 0
    shape = tuple(d.size // layout.parts(d.name, problem.mesh) for d in type.dims)
    return stored_bytes(problem.cost.chip, shape, type.itemsize)


def wanted(ends: tuple[End, ...]) -> set[Layout]:
    return set[Layout]().union(*(end.distinct for end in ends))


def held_by_options(problem: Problem, live: Live) -> list[int]:
    """Bytes of a value, not of its copies, under each option of its source."""
    return list(map(held_as(problem, live), live.source.layouts))


def held_as(problem: Problem, live: Live) -> Callable[[Layout | None], int]:
    """Bytes of a value, not of its copies, by the layout that it is made in."""
    after = [end.distinct for end in live.after]
    # Until all that its readers want is made of it.
    to_come = live.bound or not set(live.after) <= set(live.before)
    written_over = wanted((live.replaces,)) if live.replaces is not None else set()

    def size(layout: Layout | None) -> int:
        if (
            layout is None
            or layout in written_over
            or not (to_come or any(layout in asked for asked in after))
        ):
            return 0
        if live.passing and not layout.partial_axes:
            return 0
        if live.turned:
            *others, last = live.value.type.local_shape(problem.mesh, layout)
            if last % LANES == 0 or all(n % LANES for n in others):
                return 0
        return block_bytes(problem, live.value.type, layout)

    return size


def held_by_copies(problem: Problem, live: Live) -> dict[Layout, int]:
    """Bytes of each copy that, once made, is held: what a reader so far may have asked for and one
    to come may ask for as well."""
    assert live.copies is not None
    targets = {m.target for m in problem.reshards_of(live.copies).moves}
    held = targets & wanted(live.before) & wanted(live.after)
    return {t: block_bytes(problem, live.value.type, t) for t in held}


def measure(problem: Problem, solution: Solution) -> Callable[[Live], int]:
    """Bytes per device of a live value in a solution: what ``limit`` counts for it."""
    cache: dict[Live, int] = {}
    moves = solution.assignment.moves or {}

    def size(live: Live) -> int:
        if live not in cache:
            if live.copies is None:
                layout = live.source.layouts[solution.picked[live.source.choice]]
                cache[live] = held_as(problem, live)(layout)
            else:
                made = {target for _, target in moves.get(live.value, ())}
                held = held_by_copies(problem, live) if made else {}
                cache[live] = sum(held.get(target, 0) for target in made)
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
    options: dict[Choice, list[float]] = {}
    moves: dict[Flow, dict[Layout, float]] = {}
    for live in point.live:
        if live.copies is None:
            choice = live.source.choice
            held = options.setdefault(choice, [0.0] * len(choice.options))
            for i, size in enumerate(held_by_options(problem, live)):
                held[i] += size
        else:
            copies = held_by_copies(problem, live)
            moves[live.copies] = {t: float(size) for t, size in copies.items()}
    return Limit(point.name, available, options, moves)
