"""Remove what is not used, what is computed twice, and what is computed along a dim on which it
does not depend. Every op is pure, so all three are safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neocc.ir.ops import ELEMENTWISE, OPS
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import union_dims


def simplify(program: Program) -> Program:
    """Broadcasts late, then common subexpressions and dead code, until neither finds any more."""
    program = late_broadcasts(program)
    size = None
    while size != (size := weight(program)):
        program = dead_code(common_subexpressions(program))
    return program


def weight(program: Program) -> int:
    """What each change of either pass makes smaller."""
    return sum(1 + len(op.operands) + len(op.results) for op in program.body.walk())


def dead_code(program: Program) -> Program:
    """Drops ops that no output depends on; of a repeat also the carried values, stacked results
    and operands that nothing needs. Inputs stay, used or not."""
    body = program.body
    ops, _ = live(body, body.outputs)
    return replace(program, body=Region(body.args, ops, body.outputs))


def live(region: Region, outputs: Sequence[Value]) -> tuple[tuple[Op, ...], set[Value]]:
    """The ops that ``outputs`` depend on, pruned inside, and the values that they use."""
    used = set(outputs)
    kept: list[Op] = []
    for op in reversed(region.ops):
        if used.isdisjoint(op.results):
            continue
        if op.kind == "repeat":
            op = prune_repeat(op, used)
        used.update(op.operands)
        kept.append(op)
    return tuple(reversed(kept)), used


def prune_repeat(op: Op, used: set[Value]) -> Op:
    """A repeat with only the results in ``used`` and what they need.

    A carried value is needed if its result is used, or if the next step of another needed value
    reads it: the needed set grows to a fixed point.
    """
    carries, stacked, region = op.attrs["carries"], op.attrs["stacked"], op.regions[0]
    needed = [v in used for v in op.results]
    while True:
        outputs = [v for v, n in zip(region.outputs, needed, strict=True) if n]
        ops, inside = live(region, outputs)
        grown = [n or v in inside for n, v in zip(needed[:carries], region.args, strict=False)]
        if grown == needed[:carries]:
            break
        needed[:carries] = grown
    keep = [*grown, *(v in inside for v in region.args[carries:])]
    if all(keep) and all(needed) and ops == region.ops:
        return op
    attrs = {
        **op.attrs,
        "carries": sum(grown),
        "stacked": sum(keep[carries : carries + stacked]),
    }
    args = tuple(v for v, k in zip(region.args, keep, strict=True) if k)
    operands = [v for v, k in zip(op.operands, keep, strict=True) if k]
    results = [v for v, n in zip(op.results, needed, strict=True) if n]
    return Op(op.kind, operands, results, attrs, (Region(args, ops, tuple(outputs)),), op.loc)


def late_broadcasts(program: Program) -> Program:
    """Elementwise ops read what was broadcast before it was, and their results are broadcast: a
    gradient that is the same for every token is one number, and nobody gathers it."""
    return replace(program, body=broadcast_late(program.body))


def broadcast_late(region: Region) -> Region:
    small: dict[Value, Value] = {}  # what a value is a broadcast of
    ops: list[Op] = []
    for op in region.ops:
        if op.regions:
            regions = tuple(broadcast_late(r) for r in op.regions)
            op = Op(op.kind, op.operands, op.results, op.attrs, regions, op.loc)
        elif op.kind in ELEMENTWISE and any(v in small for v in op.operands):
            operands = [small.get(v, v) for v in op.operands]
            types = tuple(v.type for v in operands)
            whole, dims = op.result.type, union_dims(types)
            if op.kind == "broadcast" or dims == whole.dims:
                op = Op(op.kind, operands, op.results, op.attrs, (), op.loc)
            elif len(dims) < len(whole.dims):
                (narrow,) = OPS[op.kind].infer(types, op.attrs)
                first = Op(op.kind, operands, [Value(narrow)], op.attrs, (), op.loc)
                ops.append(first)
                attrs = {"dims": whole.dims}
                op = Op("broadcast", [first.result], op.results, attrs, (), op.loc)
        if op.kind == "broadcast":
            small[op.result] = op.operands[0]
        ops.append(op)
    return Region(region.args, tuple(ops), region.outputs)


def common_subexpressions(program: Program) -> Program:
    """Computes equal ops on equal operands once, in each region by itself. Operands of a repeat
    that are given twice, and stacked results that are made twice, are merged as well."""
    return replace(program, body=merged(program.body, {}))


def merged(region: Region, same: dict[Value, Value]) -> Region:
    """``same`` maps arguments of the region to arguments that hold equal values."""
    known: dict[Any, Op] = {}
    ops: list[Op] = []
    for op in region.ops:
        operands = [same.get(v, v) for v in op.operands]
        if op.regions:
            op = merge_repeat(op, operands, same)
        else:
            # By repr: 0.0 equals -0.0, and True equals 1, and neither pair means the same.
            attrs = repr(sorted(op.attrs.items()))
            types = tuple(v.type for v in op.results)
            first = known.get(key := (op.kind, tuple(operands), attrs, types))
            if first is not None:
                same.update(zip(op.results, first.results, strict=True))
                continue
            if any(a is not b for a, b in zip(operands, op.operands, strict=True)):
                op = Op(op.kind, operands, op.results, op.attrs, (), op.loc)
            known[key] = op
        ops.append(op)
    return Region(region.args, tuple(ops), tuple(same.get(v, v) for v in region.outputs))


def merge_repeat(op: Op, operands: Sequence[Value], same: dict[Value, Value]) -> Op:
    """The repeat over ``operands`` with its region merged; puts equal results into ``same``."""
    carries, stacked, region = op.attrs["carries"], op.attrs["stacked"], op.regions[0]
    inside: dict[Value, Value] = {}
    for group in (slice(carries, carries + stacked), slice(carries + stacked, None)):
        first: dict[Value, Value] = {}
        for outer, arg in zip(operands[group], region.args[group], strict=True):
            if first.setdefault(outer, arg) is not arg:
                inside[arg] = first[outer]
    inner = merged(region, inside)
    made: dict[Value, Value] = {}
    for value, result in zip(inner.outputs[carries:], op.results[carries:], strict=True):
        if made.setdefault(value, result) is not result:
            same[result] = made[value]
    return Op(op.kind, operands, op.results, op.attrs, (inner,), op.loc)
