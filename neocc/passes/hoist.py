"""Move the narrowing cast of a stacked operand out of its loop.

A loop that reads a stack of f32 weights only as bf16 casts each slice. XLA hoists such casts, so
the plan says so too: the stack is cast once, forward and backward loops read the narrow copy, and
what is gathered, before the loop or inside it, is narrow.
"""

from __future__ import annotations

from dataclasses import replace

from neocc.ir.program import Op, Program, Region, Value


def hoist_casts(program: Program) -> Program:
    """The program with every such cast before its loop; nested loops give theirs to the outer."""
    return replace(program, body=hoist_region(program.body))


def hoist_region(region: Region) -> Region:
    ops: list[Op] = []
    saved: set[Value] = set()  # what a loop made is not held twice, wide and narrow
    for op in region.ops:
        if op.kind == "repeat":
            operands = list(op.operands)
            body = hoist_region(op.regions[0])
            first = op.attrs["carries"]
            slots = range(first, first + op.attrs["stacked"])
            for slot, cast in hoistable(body, slots):
                wide = operands[slot]
                if wide in saved:
                    continue
                narrow = Value(wide.type.with_dtype(cast.result.type.dtype), wide.name)
                ops.append(Op("cast", [wide], [narrow], cast.attrs, loc=cast.loc))
                operands[slot] = narrow
                body = without_cast(body, slot, cast)
            op = Op(op.kind, operands, op.results, op.attrs, [body], op.loc)
            saved.update(op.results)
        ops.append(op)
    return Region(region.args, tuple(ops), region.outputs)


def hoistable(body: Region, slots: range) -> list[tuple[int, Op]]:
    """Slots of arguments whose only use is a cast to a narrower dtype, with that cast."""
    found = []
    for slot in slots:
        arg = body.args[slot]
        readers = [op for op in body.ops if arg in op.operands]
        if len(readers) == 1 and readers[0].kind == "cast" and arg not in body.outputs:
            cast = readers[0]
            if cast.result.type.itemsize < arg.type.itemsize:
                found.append((slot, cast))
    return found


def without_cast(body: Region, slot: int, cast: Op) -> Region:
    """The body with the cast's result as its argument."""
    args = (*body.args[:slot], cast.result, *body.args[slot + 1 :])
    return Region(args, tuple(op for op in body.ops if op is not cast), body.outputs)
