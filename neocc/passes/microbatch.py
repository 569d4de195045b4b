"""Split the batch in time: gradient accumulation.

What runs over the batch goes into a loop over ``microbatch``, whose steps see a part of the batch
each. What such a step sums over its part is added up over the steps, so everything that needs the
sum must be linear until the loop ends: a step of training is, as far as its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neocc.ir.errors import LayoutError, Loc
from neocc.ir.ops import OPS
from neocc.ir.ops.shape import acted_on
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import Dim, TensorType

LOOP = "microbatch"
EACH, SUM, SAME, ZERO = "each", "sum", "same", "zero"
RESHAPES = ("rename", "split", "merge", "slice", "concat", "pad", "shift", "reorder", "cumsum")


def split_batch(program: Program, count: int, batch: str = "batch") -> Program:
    """The program with its batch in ``count`` parts, one after the other.

    Data inputs with the dim get ``microbatch`` in front of a smaller ``batch``: part m holds what
    was at m times its size and after. Results are those of the whole batch, random numbers too,
    but for the order of sums.

    Raises:
        LayoutError: the batch does not divide, or something in the step needs all of it at once.
    """
    if count == 1:
        return program
    dims = program.dims
    if batch not in dims:
        raise LayoutError(f"{count} microbatches: the model has no dim {batch!r}")
    size = dims[batch].size
    if count < 1 or size % count:
        raise LayoutError(f"{count} microbatches: {batch} {size} does not divide by {count}")
    if LOOP in dims:
        raise LayoutError(f"{count} microbatches: the model has a dim {LOOP!r} already")
    return Splitter(program, Dim(LOOP, count), Dim(batch, size // count)).split()


@dataclass(frozen=True)
class Splitter:
    """``loop``: the new dim; ``part``: the batch of one step."""

    program: Program
    loop: Dim
    part: Dim

    def error(self, what: str, loc: Loc | None) -> LayoutError:
        return LayoutError(f"{self.loop.size} microbatches: {what}", loc)

    def split(self) -> Program:
        body = self.program.body
        states = self.states(body, [self.kind(v) for v in body.args])
        inside = [op for op in body.ops if self.runs_over_batch(op)]
        inside = self.with_sums(inside)
        made = {r for op in inside for r in op.results}
        needed = {v for op in inside for v in op.operands} - made
        before: list[Op] = []
        for op in reversed(body.ops):
            if op not in inside and any(r in needed for r in op.results):
                before.insert(0, op)
                needed.update(op.operands)
        after = [op for op in body.ops if op not in inside and op not in before]
        read = {v for op in after for v in op.operands} | set(body.outputs)
        sums = [r for op in inside for r in op.results if r in read]
        for v in sums:
            if states[v] == EACH:
                raise self.error(f"{v!r} is needed whole, not in parts of the batch", None)
        for op in before:
            if any(v in made for v in op.operands):
                raise self.error(f"{op!r} needs what all of the batch gives, and gives it", op.loc)
        return self.build(before, inside, after, sums, states)

    # What each value is.

    def kind(self, v: Value) -> str:
        return EACH if v.type.has(self.part.name) else SAME

    def runs_over_batch(self, op: Op) -> bool:
        values = [*op.operands, *op.results]
        for region in op.regions:
            values += [v for o in region.walk() for v in (*o.operands, *o.results)]
        return any(v.type.has(self.part.name) for v in values)

    def with_sums(self, inside: list[Op]) -> list[Op]:
        """Also ops that add sums up: one accumulator does for both."""
        found = set(inside)
        made = {r for op in inside for r in op.results}
        for op in self.program.body.ops:
            if op.kind in ("add", "sub") and op not in found and made.issuperset(op.operands):
                found.add(op)
                made.update(op.results)
        return [op for op in self.program.body.ops if op in found]

    def states(self, region: Region, args: Sequence[str], inner: bool = False) -> dict[Value, str]:
        """What each value of a region is: a part of the batch each step, a sum over it, the same
        for all of it, or zero. After the loop (not ``inner``) a sum is like any other value."""
        found = dict(zip(region.args, args, strict=True))
        for op in region.ops:
            given = [found[v] for v in op.operands]
            if op.regions:
                found.update(zip(op.results, self.loop_states(op, given), strict=True))
            else:
                found.update((v, self.state(op, v, given, inner)) for v in op.results)
        return found

    def loop_states(self, op: Op, given: Sequence[str]) -> list[str]:
        """Carried values go round until nothing changes."""
        region, carries = op.regions[0], op.attrs["carries"]
        given = list(given)
        while True:
            inside = self.states(region, given, inner=True)
            ends = [inside[v] for v in region.outputs]
            new = [self.join(op, a, b) for a, b in zip(given, ends[:carries], strict=False)]
            if new == given[:carries]:
                return ends
            given[:carries] = new

    def join(self, op: Op, a: str, b: str) -> str:
        if a == b or b == ZERO:
            return a
        if a == ZERO:
            return b
        raise self.error("a loop carries a sum over the batch that does not start at 0", op.loc)

    def state(self, op: Op, made: Value, given: Sequence[str], inner: bool) -> str:
        batch = self.part.name
        if op.kind == "constant":
            return ZERO if op.attrs["value"] == 0 else SAME
        if op.kind in ("broadcast", "cast") and given == [ZERO]:
            return ZERO if not made.type.has(batch) else EACH
        kinds = {i.name: i.kind for i in OPS[op.kind].space(op).iters}
        if batch in kinds or any(v.type.has(batch) for v in (*op.operands, made)):
            if op.kind in RESHAPES and batch in acted_on(op):
                raise self.error(f"{op.kind} changes the dim {batch!r}", op.loc)
            if SUM in given:
                raise self.error(f"{op!r} needs a sum over the whole batch", op.loc)
            if made.type.has(batch):
                return EACH
            if kinds.get(batch) != "sum":
                raise self.error(f"{op!r} is no sum over the batch", op.loc)
            return SUM
        if SUM not in given:
            return ZERO if set(given) == {ZERO} and op.kind in ("add", "mul", "neg") else SAME
        sums = frozenset(i for i, s in enumerate(given) if s == SUM)
        zeros = frozenset(i for i, s in enumerate(given) if s == ZERO)
        if any(sums <= s <= sums | zeros for s in OPS[op.kind].linear(op)):
            return SUM
        if inner:
            raise self.error(f"{op!r} needs a sum over the whole batch", op.loc)
        return SAME

    # The new program.

    def build(
        self,
        before: list[Op],
        inside: list[Op],
        after: list[Op],
        sums: list[Value],
        states: dict[Value, str],
    ) -> Program:
        program, loop = self.program, self.loop
        outer: dict[Value, Value] = {}
        for v in program.body.args:
            if states[v] == EACH:
                small = self.small(v.type)
                outer[v] = Value(TensorType((loop, *small.dims), small.dtype), v.name)
        ops = list(before)

        def emit(into: list[Op], kind: str, operands: Sequence[Value], **attrs: Any) -> Value:
            (type,) = OPS[kind].infer(tuple(v.type for v in operands), attrs)
            into.append(Op(kind, operands, [Value(type)], attrs))
            return into[-1].result

        starts = []
        for v in sums:
            zero = emit(ops, "constant", (), value=0, dtype=v.type.dtype)
            starts.append(
                emit(ops, "broadcast", (zero,), dims=v.type.dims) if v.type.dims else zero
            )
        index = emit(ops, "iota", (), dim=loop, dtype="i32")

        made = {r for op in inside for r in op.results}
        read = dict.fromkeys(v for op in inside for v in op.operands if v not in made)
        parts = [v for v in read if v in outer]
        shared = [v for v in read if v not in outer]
        env = {v: Value(self.small(v.type), v.name) for v in read}
        totals = [Value(v.type, v.name) for v in sums]
        number = Value(TensorType((), "i32"), LOOP)
        body: list[Op] = []
        width = emit(body, "constant", (), value=self.part.size, dtype="i32")
        start = emit(body, "mul", (number, width))
        for op in inside:
            body += self.rewrite(op, env, start)
        ends = []
        for total, v in zip(totals, sums, strict=True):
            ends.append(emit(body, "add", (total, env[v])))
            ends[-1].name = v.name
        args = (*totals, number, *(env[v] for v in (*parts, *shared)))
        attrs = {
            "dim": loop,
            "carries": len(totals),
            "stacked": 1 + len(parts),
            "reverse": False,
            "recompute": False,
        }
        operands = [*starts, index, *(outer[v] for v in parts), *shared]
        region = Region(args, tuple(body), tuple(ends))
        ops.append(Op("repeat", operands, sums, attrs, (region,)))
        args = tuple(outer.get(v, v) for v in program.body.args)
        return replace(program, body=Region(args, (*ops, *after), program.body.outputs))

    def small(self, t: Any) -> Any:
        """A dim, a type or a tuple of dims with the batch of one step; else as it is."""
        if isinstance(t, Dim):
            return self.part if t.name == self.part.name else t
        if isinstance(t, TensorType):
            return TensorType(tuple(map(self.small, t.dims)), t.dtype, t.layout)
        return tuple(map(self.small, t)) if isinstance(t, tuple) else t

    def rewrite(self, op: Op, env: dict[Value, Value], start: Value) -> list[Op]:
        """The ops of one step that take the place of ``op``; ``start``: the index in the batch at
        which its part begins."""
        operands = [env[v] for v in op.operands]
        attrs = {k: self.small(v) for k, v in op.attrs.items()}
        results = [Value(self.small(v.type), v.name) for v in op.results]
        env.update(zip(op.results, results, strict=True))
        if op.regions:
            return [self.rewrite_repeat(op, operands, results, start)]
        batch = self.part.name
        if op.kind == "random" and op.result.type.has(batch):
            attrs.setdefault("counted", tuple(d.size for d in op.attrs["dims"]))
            attrs["part"] = batch
            operands.append(start)
        if op.kind == "iota" and op.result.type.has(batch):
            local = Value(results[0].type)
            begin = Op(
                "cast",
                (start,),
                (Value(TensorType((), local.type.dtype)),),
                {"dtype": local.type.dtype},
            )
            return [
                Op("iota", operands, (local,), attrs, loc=op.loc),
                begin,
                Op("add", (local, begin.result), results, loc=op.loc),
            ]
        return [Op(op.kind, operands, results, attrs, loc=op.loc)]

    def rewrite_repeat(
        self, op: Op, operands: list[Value], results: list[Value], start: Value
    ) -> Op:
        region = op.regions[0]
        args = tuple(Value(self.small(v.type), v.name) for v in region.args)
        env = dict(zip(region.args, args, strict=True))
        begin = Value(start.type, start.name)
        ops = [new for o in region.ops for new in self.rewrite(o, env, begin)]
        outputs = tuple(env[v] for v in region.outputs)
        if any(begin in o.operands for o in ops):
            args, operands = (*args, begin), [*operands, start]
        return Op(
            "repeat", operands, results, op.attrs, (Region(args, tuple(ops), outputs),), op.loc
        )
