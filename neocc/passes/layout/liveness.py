"""Which values of a region get a buffer, and until when: what XLA fuses is never stored.

Seen in programs that the TPU compiler made (docs/compiler-behaviour.md): chains of elementwise ops
run inside the product that made their operand, or inside each product that reads their result,
once per reader. What stays is stored once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from neocc.ir.ops import ELEMENTWISE
from neocc.ir.program import Op, Region, Value

MOVED = {"rename", "split", "merge", "shift", "pad", "slice"}
FUSED = ELEMENTWISE | MOVED | {"either", "iota", "constant"}


def materialised(region: Region, apart: bool = False) -> set[Value]:
    """Values that get a buffer: results of products, sums, look-ups and loops; what leaves the
    region or enters an op that reads arrays; and of elementwise chains that products read, those
    that would cost more to make again in each reader than to keep. ``apart``: products make none
    of what they read, as on GPU."""
    found: set[Value] = set(region.outputs)
    producer = {r: op for op in region.ops for r in op.results}
    readers: dict[Value, int] = defaultdict(int)
    for op in region.ops:
        if op.kind in FUSED:
            continue
        found.update(op.results)
        if op.kind == "einsum":
            for v in op.operands:
                readers[v] += 1
        elif op.kind != "reduce":
            found.update(op.operands)
    for v, count in readers.items():
        op = producer.get(v)
        costly = apart or (count > 1 and len(large(v, producer, found)) > 1)
        if op is None or op.kind not in FUSED or costly:
            found.add(v)
    # An either is a name of what it takes.
    names = {op.result for op in region.ops if op.kind == "either"}
    return {v for v in found - names if v.type.dims}


def large(value: Value, producer: dict[Value, Op], stored: set[Value]) -> set[Value]:
    """What an elementwise chain reads from memory that has as many elements as its result."""
    found: set[Value] = set()
    seen: set[Value] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        op = producer.get(v)
        if v is not value and (op is None or op.kind not in FUSED or v in stored):
            if v.type.size >= value.type.size:
                found.add(v)
        elif op is not None:
            stack.extend(op.operands)
    return found


def last_use(region: Region, stored: set[Value]) -> dict[Value, int]:
    """The last op that reads each value, itself or through values that are fused into it."""
    found: dict[Value, int] = dict.fromkeys(region.outputs, len(region.ops))
    for i, op in reversed(list(enumerate(region.ops))):
        until = max((found.get(r, i) for r in op.results), default=i) if fused(op, stored) else i
        for v in op.operands:
            found[v] = max(found.get(v, -1), until)
    return found


def fused(op: Op, stored: Iterable[Value]) -> bool:
    """Whether an op runs where its results are read: there its operands are read too."""
    return op.kind in FUSED and not any(r in stored for r in op.results)


def epilogues(region: Region, stored: set[Value]) -> set[Value]:
    """Results of products that a chain of elementwise ops turns into one stored value of as many
    elements, inside the product: the result itself is not stored.

    Not where the chain goes through a sum of the result (a softmax), or where a product reads it.
    """
    users: dict[Value, list[Op]] = defaultdict(list)
    for op in region.ops:
        for v in op.operands:
            users[v].append(op)
    outputs = set(region.outputs)
    found: set[Value] = set()
    for op in region.ops:
        if op.kind == "einsum" and op.result not in outputs:
            ends = ends_of(op.result, users, stored)
            if ends is not None and len(ends) == 1 and not reduced_into(op.result, ends, users):
                found.add(op.result)
    return found


def ends_of(value: Value, users: dict[Value, list[Op]], stored: set[Value]) -> set[Value] | None:
    """Stored values as large as ``value`` that elementwise ops make of it; None where anything
    else but a sum reads it or what is made of it."""
    found: set[Value] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        for op in users[v]:
            if op.kind == "reduce":
                continue
            if op.kind not in FUSED:
                return None
            for r in op.results:
                if r in stored:
                    if r.type.size != value.type.size:
                        return None
                    found.add(r)
                else:
                    stack.append(r)
    return found


def reduced_into(value: Value, ends: set[Value], users: dict[Value, list[Op]]) -> bool:
    """Whether a sum over ``value`` is needed for one of ``ends``."""
    stack = [(value, False)]
    seen: set[tuple[Value, bool]] = set()
    while stack:
        v, summed = stack.pop()
        if (v, summed) in seen:
            continue
        seen.add((v, summed))
        if v in ends:
            if summed:
                return True
            continue
        for op in users[v]:
            if op.kind == "reduce" or op.kind in FUSED:
                stack.extend((r, summed or op.kind == "reduce") for r in op.results)
    return False


@dataclass(frozen=True)
class Fusion:
    """What of a region passes through memory: ``stored``, of which ``inside`` are results of
    products that elementwise ops alone read, in the product's own fusion. ``repeats``: how often
    more than once an elementwise op runs, since each product that reads it makes it again."""

    stored: frozenset[Value]
    inside: frozenset[Value]
    repeats: Mapping[Op, int]

    @staticmethod
    def of(region: Region) -> Fusion:
        stored = materialised(region)
        users: dict[Value, list[Op]] = defaultdict(list)
        for op in region.ops:
            for v in op.operands:
                users[v].append(op)
        outputs = set(region.outputs)
        inside = {
            op.result
            for op in region.ops
            if op.kind == "einsum" and op.result not in outputs and users[op.result]
            if all(u.kind in FUSED or u.kind == "reduce" for u in users[op.result])
        }
        producer = {r: op for op in region.ops for r in op.results}
        repeats: dict[Op, int] = {}
        for v, readers in users.items():
            products = sum(u.kind == "einsum" for u in readers)
            if products < 2 or v in stored:
                continue
            stack = [v]
            while stack:  # the chain that each product makes, up to a sum or what is stored
                op = producer.get(stack.pop())
                if op is not None and fused(op, stored) and op not in repeats:
                    repeats[op] = products - 1
                    stack.extend(op.operands)
        return Fusion(frozenset(stored), frozenset(inside), repeats)

    def unmoved_by(self, op: Op) -> frozenset[Value]:
        """Operands and results of an op that its fusion holds on chip. What a product makes is
        counted where elementwise ops read it."""
        if op.kind == "einsum":
            made = (v for v in op.operands if v not in self.stored)
            return frozenset((*made, *(v for v in op.results if v in self.inside)))
        return frozenset(v for v in op.results if v not in self.stored)

    def again(self, op: Op) -> int:
        return self.repeats.get(op, 0)
