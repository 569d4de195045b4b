"""Round the operands of products in f32 where the chip's matrix unit does.

A TPU multiplies bf16: XLA's default precision rounds f32 operands to it, and keeps, passes to loops
and gathers in bf16 what only products read. The program says so first, so that plan and program
agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from neocc.cost.hardware import Chip
from neocc.ir.program import Op, Program, Region, Value

FACTORS = {"einsum": 2, "attention": 3, "attention_grad": 3}  # first operands, that are multiplied
PASSING = ("rename", "either", "detach", "split", "merge")


def narrow_products(program: Program, chip: Chip) -> Program:
    """The program with the f32 operands of einsum and attention cast to bf16, on a TPU. Elsewhere,
    and where such a program is run on other devices, products stay as precise as they were."""
    if chip.kind != "tpu":
        return program
    found = only_multiplied(program)
    args, ops, outputs = program.body.args, *narrowed_ops(program.body, found, {}, ())
    return replace(program, body=Region(args, ops, outputs))


def only_multiplied(program: Program) -> frozenset[Value]:
    """f32 values that nothing reads but products, directly or through ops and loops that only
    pass them on. What a loop made is not held twice, wide and narrow."""
    readers: dict[Value, list[Value | None]] = {}  # what a value is passed on as; None: read wide
    source: dict[Value, Value] = {}  # stacked results as a later loop's arguments
    made = {v for op in program.body.walk() if op.kind == "repeat" for v in op.results}
    for op in program.body.walk():
        for value, passed in passed_on(op):
            if value.type.dtype == "f32":
                readers.setdefault(value, []).append(passed)
                if op.kind == "repeat" and value in made and passed is not None:
                    source[passed] = value
    for value in program.body.outputs:
        readers.setdefault(value, []).append(None)
    found = set(readers)
    while True:
        gone = {
            v
            for v in found
            if any(r is None or (r is not v and r not in found) for r in readers[v])
            or (v in source and source[v] not in found)
        }
        if not gone:
            return frozenset(found)
        found -= gone


def passed_on(op: Op) -> Iterator[tuple[Value, Value | None]]:
    """What an op reads, and which value it is read as: itself by a product, an op's result, a
    region's argument or a loop's result where it is only passed on, none where it is read wide."""
    factors = FACTORS.get(op.kind, 0)
    carries = op.attrs["carries"] if op.kind == "repeat" else 0
    for i, value in enumerate(op.operands):
        if op.kind == "repeat":
            yield value, op.regions[0].args[i] if i >= carries else None
        elif i < factors:
            yield value, value
        else:
            yield value, op.result if op.kind in PASSING else None
    for region in op.regions:
        for i, value in enumerate(region.outputs):
            yield value, op.results[i] if i >= carries else None


def narrowed_ops(
    region: Region, found: frozenset[Value], known: dict[Value, Value], slots: Collection[int]
) -> tuple[tuple[Op, ...], tuple[Value, ...]]:
    """The region's ops and outputs over narrow values; ``known`` has the narrow form of values,
    ``slots`` the outputs that leave narrow."""
    ops: list[Op] = []

    def narrow(value: Value, op: Op | None = None) -> Value:
        if value not in known:
            known[value] = narrowed(value)
            attrs = {"dtype": "bf16", "excess_precision": True}
            ops.append(Op("cast", [value], [known[value]], attrs, loc=op.loc if op else None))
        return known[value]

    for op in region.ops:
        operands, attrs, regions = list(op.operands), op.attrs, op.regions
        factors = FACTORS.get(op.kind, 0)
        passes = op.kind in PASSING and op.result in found
        if op.kind == "repeat":
            inner = regions[0]
            first = attrs["carries"]
            given = [i for i, v in enumerate(inner.args) if i >= first and v in found]
            made = [i for i, v in enumerate(op.results) if i >= first and v in found]
            for i in given:
                operands[i] = narrow(operands[i], op)
                known[inner.args[i]] = narrowed(inner.args[i])
            args = tuple(known.get(v, v) for v in inner.args)
            known.update((op.results[i], narrowed(op.results[i])) for i in made)
            regions = (Region(args, *narrowed_ops(inner, found, known, made)),)
        elif passes:
            operands = [narrow(v, op) for v in operands]
            known[op.result] = narrowed(op.result)
        elif factors and operands[0].type.dtype == "f32":
            operands[:factors] = [narrow(v, op) for v in operands[:factors]]
            attrs = {**attrs, "dtype": op.results[0].type.dtype}
        results = [known.get(v, v) for v in op.results]
        ops.append(Op(op.kind, operands, results, attrs, regions, op.loc))
    outputs = [narrow(v) if i in slots else v for i, v in enumerate(region.outputs)]
    return tuple(ops), tuple(outputs)


def narrowed(value: Value) -> Value:
    return Value(value.type.with_dtype("bf16"), value.name)
