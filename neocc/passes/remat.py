"""What a program leaves to the plan: each ``either``'s value is kept, or computed again.

Autodiff writes both ways. Of what stands in the program only for one of them, a plan drops what
it does not take: ops that compute a value again, and, of the loops, the stacks that keep one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from neocc.ir.errors import LayoutError
from neocc.ir.program import Op, Program, Region, Value
from neocc.passes.simplify import dead_code

KEEP, RECOMPUTE = "keep", "recompute"


@dataclass(frozen=True)
class Droppable:
    """What a program may be run without, if no ``either`` needs it: ops, arguments of regions,
    and, by position, outputs of regions."""

    ops: frozenset[Op]
    args: frozenset[Value]
    outputs: Mapping[Region, frozenset[int]]


def droppable(program: Program) -> Droppable:
    """What only one of an ``either``'s two ways needs."""
    ops: set[Op] = set()
    args: set[Value] = set()
    outputs: dict[Region, frozenset[int]] = {}

    def walk(region: Region, spared: frozenset[int]) -> None:
        outputs[region] = spared
        needed = {v for i, v in enumerate(region.outputs) if i not in spared}
        for op in reversed(region.ops):
            if op.kind == "repeat":
                inner, carries = op.regions[0], op.attrs["carries"]
                results = enumerate(op.results[carries:], carries)
                walk(inner, frozenset(i for i, v in results if v not in needed))
                given = zip(op.operands, inner.args, strict=True)
                needed.update(v for v, arg in given if arg not in args)
            elif op.kind != "either":
                if needed.isdisjoint(op.results):
                    ops.add(op)
                else:
                    needed.update(op.operands)
        if region is not program.body:
            args.update(v for v in region.args[carries_of[region] :] if v not in needed)

    carries_of = {op.regions[0]: op.attrs["carries"] for op in program.body.walk() if op.regions}
    walk(program.body, frozenset())
    return Droppable(frozenset(ops), frozenset(args), outputs)


@dataclass(frozen=True)
class Resolved:
    """A program without ``either``, and what became of the ops, regions and values of the one
    that it was made of: ``values`` has those that others stand for now."""

    program: Program
    ops: Mapping[Op, Op]
    regions: Mapping[Region, Region]
    values: Mapping[Value, Value]


def resolve(program: Program, dropped: Droppable, recomputed: Callable[[Op], bool]) -> Resolved:
    """The program without what is ``dropped``; each ``either`` left gives way to its second
    operand where it is ``recomputed``, else to its first."""
    made: dict[Op, Op] = {}
    regions: dict[Region, Region] = {}
    values: dict[Value, Value] = {}

    def rewrite(region: Region) -> Region:
        ops: list[Op] = []
        for op in region.ops:
            if op in dropped.ops:
                continue
            operands = [values.get(v, v) for v in op.operands]
            if op.kind == "either":
                values[op.result] = operands[1 if recomputed(op) else 0]
                continue
            new = op
            if op.kind == "repeat":
                new = rewrite_repeat(op, operands)
            elif any(a is not b for a, b in zip(operands, op.operands, strict=True)):
                new = Op(op.kind, operands, op.results, op.attrs, (), op.loc)
            made[op] = new
            ops.append(new)
        outputs = (
            values.get(v, v)
            for i, v in enumerate(region.outputs)
            if i not in dropped.outputs[region]
        )
        args = tuple(v for v in region.args if v not in dropped.args)
        regions[region] = Region(args, tuple(ops), tuple(outputs))
        return regions[region]

    def rewrite_repeat(op: Op, operands: list[Value]) -> Op:
        (region,) = op.regions
        carries, stacked = op.attrs["carries"], op.attrs["stacked"]
        kept = [v not in dropped.args for v in region.args]
        attrs = {**op.attrs, "stacked": sum(kept[carries : carries + stacked])}
        given = [v for v, k in zip(operands, kept, strict=True) if k]
        gone = dropped.outputs[region]
        results = [v for i, v in enumerate(op.results) if i not in gone]
        return Op("repeat", given, results, attrs, (rewrite(region),), op.loc)

    body = rewrite(program.body)
    return Resolved(replace(program, body=body), made, regions, values)


def open_values(program: Program) -> dict[str, Op]:
    """Each ``either`` under a name: the op that would compute its value again, and its line."""
    found: dict[str, Op] = {}
    seen: Counter[str] = Counter()
    makers = {v: op for op in program.body.walk() for v in op.results}
    for op in program.body.walk():
        if op.kind == "either":
            maker = makers[op.operands[1]]
            if maker.attrs.get("excess_precision"):
                maker = makers[maker.operands[0]]
            kind = maker.kind
            name = f"{kind} at {op.loc}" if op.loc else kind
            seen[name] += 1
            found[f"{name} #{seen[name]}" if seen[name] > 1 else name] = op
    return found


def decide(program: Program, saved: Mapping[str, str]) -> Program:
    """The program in which each open value is kept or recomputed, as ``saved`` says by its name;
    where lines have moved, by its place.

    Raises:
        LayoutError: a name that is not open, or one that ``saved`` lacks.
    """
    known = open_values(program)
    if [n.split()[0] for n in saved] == [n.split()[0] for n in known]:
        saved = dict(zip(known, saved.values(), strict=True))
    for name in saved:
        if name not in known:
            raise LayoutError(
                f"saved: {name!r} is no value that the model leaves open; it leaves open "
                f"{', '.join(map(repr, known)) or 'none: recompute in its config is not none'}"
            )
    for name in known:
        if name not in saved:
            raise LayoutError(f"saved: {name!r} is missing; it is {KEEP!r} or {RECOMPUTE!r}")
    if not known:
        return program
    again = {op for name, op in known.items() if saved[name] == RECOMPUTE}
    regions = (r for op in program.body.walk() for r in op.regions)
    nothing = Droppable(
        frozenset(), frozenset(), dict.fromkeys((program.body, *regions), frozenset())
    )
    return dead_code(resolve(program, nothing, again.__contains__).program)
