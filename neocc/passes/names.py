"""Names by which a person finds an op, a fused group or a value of a program again.

An op is called by its kind, its line in the model, and a name that it works on where there is one:
``einsum gpt.py:177 h0.mlp.fc``; the second of a name in its region ends in ``#2``. A value is
called as the input or argument that it is, or as the op that makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeVar

from neocc.ir.ops import COLLECTIVES
from neocc.ir.program import Op, Program, Region, Value
from neocc.passes.layout.cluster import Cluster, clusters
from neocc.passes.plan import Body, bodies


class Unique:
    """Gives each thing a name of its own, the later ones a number."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name} #{self.seen[name]}"


T = TypeVar("T")


def matching(text: str, found: Iterable[tuple[str, str, T]]) -> list[tuple[str, str, T]]:
    """Things, given by region and name, that a person's words mean: those of that name, with or
    without the region in front; else all whose region and name have every word."""
    found = list(found)
    exact = [f for f in found if text in (f[1], f"{f[0]}: {f[1]}")]
    if exact:
        return exact
    words = text.replace(",", " ").split()
    return [f for f in found if all(w in f"{f[0]}: {f[1]}" for w in words)]


@dataclass(frozen=True)
class Names:
    """Everything in one region by its name, in order.

    ops: repeats left out. groups: each cluster under the name of its first op. arguments and
    outputs: by position. values: what the region's arguments and ops make.
    """

    body: Body
    ops: dict[str, Op]
    groups: dict[str, Cluster]
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]

    def group_of(self, op: Op) -> str:
        return next(name for name, cluster in self.groups.items() if op in cluster.ops)


def program_names(program: Program) -> list[Names]:
    """The names of each region, in the order of ``bodies``."""
    found = bodies(program.body)
    hints = {v: i.name for i, v in program.named_inputs}
    for body in found:
        for op in body.region.ops:
            if op.kind == "repeat":
                hint_arguments(op, hints)
    made: dict[Region, Names] = {}
    for body in reversed(found):  # a loop's results are called as what makes them inside
        made[body.region] = region_names(body, hints, made)
    return [made[body.region] for body in found]


def hint_arguments(op: Op, hints: dict[Value, str]) -> None:
    """Names the arguments of a repeat that have no name: as what it is given."""
    for i, (given, arg) in enumerate(zip(op.operands, op.regions[0].args, strict=True)):
        carried = f"carried {i}" if i < op.attrs["carries"] else f"argument {i}"
        hints[arg] = arg.name or hints.get(given) or given.name or carried


def op_name(op: Op, group: Cluster | None, hints: Mapping[Value, str]) -> str:
    """Kind, line, and the first name among what it, and the group that it begins, make and read;
    not unique."""
    place = f" {PurePath(op.loc.file).name}:{op.loc.line}" if op.loc else ""
    near = [*op.results, *op.operands]
    if group is not None:
        near += [v for o in group.ops for v in o.results] + group.inputs()
    known = (hints.get(v) or v.name for v in near)
    unnamed = ("carried ", "argument ")
    hint = next((name for name in known if name and not name.startswith(unnamed)), "")
    return f"{op.kind}{place}" + (f" {hint}" if hint else "")


def result_name(op: str, number: int) -> str:
    """What an op called ``op`` makes; the first result is called as the op."""
    return f"{op} (result {number + 1})" if number else op


def region_names(body: Body, hints: Mapping[Value, str], inner: Mapping[Region, Names]) -> Names:
    region = body.region
    unique, arguments = Unique(), Unique()
    ops: dict[str, Op] = {}
    values: dict[str, Value] = {}
    found = clusters(region)
    firsts = {c.ops[0]: c for c in found}
    taken = tuple(arguments(hints[v]) for v in region.args)
    values.update(zip(taken, region.args, strict=True))
    for op in region.ops:
        if op.kind == "repeat":
            names = inner[op.regions[0]]
            carries = op.attrs["carries"]
            labels = (*names.arguments[:carries], *names.outputs[carries:])
            for label, v in zip(labels, op.results, strict=True):
                values[unique(f"{names.body.name}: {label}")] = v
            continue
        name = unique(op_name(op, firsts.get(op), hints))
        ops[name] = op
        values[name if name not in values else f"{name} (result)"] = op.results[0]
        values.update({result_name(name, i): v for i, v in enumerate(op.results) if i})
    labels = {op: name for name, op in ops.items()}
    groups = {labels[c.ops[0]]: c for c in found}
    called = {v: name for name, v in values.items()}
    ends = Unique()
    outputs = tuple(ends(called[v]) for v in region.outputs)
    return Names(body, ops, groups, taken, outputs, values)


def resharded(before: Program, after: Program) -> Iterator[tuple[Value, Op]]:
    """Each collective of a partitioned program, and the value that it moves of the program before
    partitioning."""

    def walk(old: Region, new: Region) -> Iterator[tuple[Value, Op]]:
        origin = dict(zip(new.args, old.args, strict=True))
        ops = iter(old.ops)
        for op in new.ops:
            if op.kind in COLLECTIVES:
                value = origin[op.result] = origin[op.operands[0]]
                yield value, op
                continue
            source = next(ops)
            origin.update(zip(op.results, source.results, strict=True))
            for a, b in zip(source.regions, op.regions, strict=True):
                yield from walk(a, b)

    yield from walk(before.body, after.body)
