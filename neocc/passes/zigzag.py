"""Keep sequences in the zig-zag order of a ring through a whole program.

Ring attention under a causal mask has its blocks in zig-zag order (``ir.ops.attention_ring``). It
need not swap halves in every layer where nothing else in the program minds the order: then inputs
are reordered once, outputs back, and attention is told (``zigzag``).

Nothing else minds where each op is equivariant: along the sequence its iteration dims are parallel
or reduced, so that other places of the operands are the same places of the results, or the same
sums; and its meaning depends on no place itself (``OpDef.indexed``), but for iota, which is
reordered too.
"""

from __future__ import annotations

from dataclasses import replace

from neocc.ir.ops import ATTENTION, OPS
from neocc.ir.ops.attention_ring import zigzag
from neocc.ir.ops.base import RING, SEQUENTIAL, inverse
from neocc.ir.program import Op, Program, Region, Value


def in_zigzag(program: Program, devices: int) -> Program | None:
    """The program with its sequences in the order of a ring of ``devices``, between inputs and
    outputs that are as they were; None where it has no attention that would gain by that, or an op
    minds the order."""
    attention = [op for op in program.body.walk() if op.kind in ATTENTION]
    dims = sequences(program, attention)
    if not attention or not all(fits(op, devices) for op in attention):
        return None
    if not all(equivariant(op, dims) for op in program.body.walk() if op.kind not in ATTENTION):
        return None
    return Reorder(frozenset(dims), devices).program(program)


def fits(op: Op, devices: int) -> bool:
    """Whether a ring of so many devices would have an op's blocks in zig-zag order."""
    a = op.attrs
    sizes = {
        v.type.dim(a[name]).size for v, name in zip(op.operands[:2], ("seq", "memory"), strict=True)
    }
    whole = len(sizes) == 1 and all(size and size % (2 * devices) == 0 for size in sizes)
    return whole and a["causal"] and a.get("window") is None and "zigzag" not in a


def sequences(program: Program, attention: list[Op]) -> set[str]:
    """The dims of queries and keys, and all that are renamed to one of them or from one."""
    found = {op.attrs[name] for op in attention for name in ("seq", "memory")}
    renames = [
        (op.attrs["dim"], op.attrs["to"]) for op in program.body.walk() if op.kind == "rename"
    ]
    size = -1
    while size < len(found):
        size = len(found)
        found |= {name for pair in renames if found.intersection(pair) for name in pair}
    return found


def equivariant(op: Op, dims: set[str]) -> bool:
    """Whether an op, but for the order of its sums, makes of reordered operands the reordered
    results; iota is made to."""
    if op.kind == "repeat":
        return op.attrs["dim"].name not in dims
    if op.kind == "iota":
        return True
    space = OPS[op.kind].space(op)
    kinds = {i.name: i.kind for i in space.iters}
    follows = [
        (d.name in dims, name)
        for values, cuts in ((op.operands, space.operands), (op.results, space.results))
        for v, names in zip(values, cuts, strict=True)
        for d, name in zip(v.type.dims, names, strict=True)
    ]
    moved = {name for ordered, name in follows if ordered}
    return (
        all(name is not None and kinds[name] not in (SEQUENTIAL, RING) for name in moved)
        and all(ordered for ordered, name in follows if name in moved)
        and not moved.intersection(OPS[op.kind].indexed(op))
    )


class Reorder:
    """Only ``in_zigzag`` uses it."""

    def __init__(self, dims: frozenset[str], devices: int):
        self.dims, self.devices = dims, devices
        self.order = zigzag(devices)

    def program(self, program: Program) -> Program:
        body = self.region(program.body)
        args = [self.beside(v) for v in body.args]
        outputs = [self.beside(v) for v in body.outputs]
        ops = [op for new, v in zip(args, body.args, strict=True) for op in self.put(new, v)]
        ops += body.ops
        for v, new in zip(body.outputs, outputs, strict=True):
            ops += self.put(v, new, back=True)
        return replace(program, body=Region(tuple(args), tuple(ops), tuple(outputs)))

    def beside(self, value: Value) -> Value:
        """Another value for one that is reordered; else itself."""
        ordered = self.dims.intersection(value.type.names)
        return Value(value.type, value.name) if ordered else value

    def put(self, source: Value, target: Value, back: bool = False) -> list[Op]:
        """What makes a value of one in another order, dim by dim."""
        dims = [n for n in source.type.names if n in self.dims]
        order = inverse(self.order) if back else self.order
        ops: list[Op] = []
        for n in dims:
            made = target if n == dims[-1] else Value(source.type, source.name)
            ops.append(Op("reorder", [source], [made], {"dim": n, "order": order}))
            source = made
        return ops

    def region(self, region: Region) -> Region:
        return Region(
            region.args, tuple(o for op in region.ops for o in self.op(op)), region.outputs
        )

    def op(self, op: Op) -> list[Op]:
        attrs, results = op.attrs, op.results
        if op.kind in ATTENTION:
            attrs = {**attrs, "zigzag": self.devices}
        if op.kind == "iota":
            results = [self.beside(op.result)]
        regions = [self.region(r) for r in op.regions]
        new = Op(op.kind, op.operands, results, attrs, regions, op.loc)
        after = self.put(new.result, op.result) if new.results != op.results else []
        return [new, *after]
