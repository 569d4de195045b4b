"""Grow dims to sizes that divide, so that every value's valid part stays what it was.

The elements of a grown dim at and beyond its true size are padding: nothing is known of them in
the inputs, not even that they are numbers. The pass follows what each value holds there (``Fill``)
through the program. Before an op that would let padding into the valid part (a reduction, a
contraction, a shift from the end, ...) the operand is masked, ``select(iota < true size, x, c)``,
with the c that makes no difference, unless its padding is known to hold just that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from neocc.ir.errors import IRError, Loc
from neocc.ir.ops import ATTENTION, COLLECTIVES, ELEMENTWISE, OPS
from neocc.ir.ops.attention import roles
from neocc.ir.ops.contraction import identity
from neocc.ir.ops.pointwise import BINARY, TERNARY, UNARY
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import DTYPES, Dim, TensorType

Scalar = Any  # a NumPy scalar of the value's dtype
INEXACT = frozenset({"exp", "log", "tanh", "sqrt", "rsqrt", "sin", "cos", "erf", "pow"})


@dataclass(frozen=True, slots=True)
class Padding:
    """A dim that was grown: its name, its size before, its size after."""

    dim: str
    true: int
    padded: int

    def __str__(self) -> str:
        waste = 100 * (self.padded - self.true) / self.padded
        return f"{self.dim}: {self.true} -> {self.padded} ({waste:.2g} % padding)"


def pad_program(program: Program, sizes: Mapping[str, int]) -> tuple[Program, tuple[Padding, ...]]:
    """The program with the dims that ``sizes`` names grown, and what was grown.

    A dim that a rename ties to one of them grows with it. Inputs may hold anything in their
    padding; an output that replaces an input holds zeros there. Of other outputs the padding
    is unspecified.

    Raises:
        IRError: a size is below the dim's own, or names no dim; two tied dims would get
            different sizes; or an op cannot keep its meaning on a grown dim (a repeat over it, a
            split, merge, slice, concat or pad that would move padding among valid elements).
    """
    paddings = tied_sizes(program, sizes)
    if not paddings:
        return program, ()
    pass_ = Padder({p.dim: p for p in paddings})
    args = tuple(Value(pass_.grown(v.type), v.name) for v in program.body.args)
    region = Emitter(pass_)
    env = pass_.run(program.body, region, args, [Fill() for _ in args])
    replaced = {i.name for i in program.inputs}
    ends = list(zip(program.outputs, program.body.outputs, strict=True))
    shapes = {v.type.names for n, v in ends if n in replaced and pass_.among(v.type.names)}
    outputs: list[Value] = []
    for name, value in ends:
        out = env[value]
        if name in replaced:
            # Tensors that may be cut otherwise do not share a mask, or it would have to travel.
            own = out.type.names if len(shapes) > 1 else ()
            out = region.masked(out, out.type.names, 0, own)
        outputs.append(out)
    body = Region(args, tuple(region.ops), tuple(outputs))
    return replace(program, body=body), paddings


def pad_inputs(
    padded: Program, inputs: Mapping[str, np.ndarray], value: float = 0
) -> dict[str, np.ndarray]:
    """Arrays of true shape grown at the end of each dim to what the padded program takes."""
    made: dict[str, np.ndarray] = {}
    for info, arg in padded.named_inputs:
        array = np.asarray(inputs[info.name])
        made[info.name] = np.full(arg.type.shape, value, array.dtype)
        made[info.name][tuple(slice(0, n) for n in array.shape)] = array
    return made


def unpad_outputs(program: Program, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The valid parts of a padded program's outputs; ``program`` is the one before padding."""
    return {
        name: outputs[name][tuple(slice(0, n) for n in value.type.shape)]
        for name, value in zip(program.outputs, program.body.outputs, strict=True)
    }


def tied_sizes(program: Program, sizes: Mapping[str, int]) -> tuple[Padding, ...]:
    """What grows, dims that renames tie together included, in the program's order of dims."""
    dims = program.dims
    for name, size in sizes.items():
        if name not in dims:
            known = ", ".join(dims)
            raise IRError(f"no dim {name!r} to pad; program {program.name!r} has {known}")
        if size < dims[name].size:
            raise IRError(f"dim {dims[name]} cannot be padded to {size}, which is smaller")
    given = {n: (s, n) for n, s in sizes.items()}  # name -> size and the dim it was given for
    renames = [op for op in program.body.walk() if op.kind == "rename"]
    ties = [(op.attrs["dim"], op.attrs["to"], op) for op in renames]
    changed = True
    while changed:
        changed = False
        for one, other, op in (*ties, *((b, a, op) for a, b, op in ties)):
            if one not in given:
                continue
            size, source = given[one]
            if other not in given:
                given[other], changed = (size, source), True
            elif given[other][0] != size:
                raise IRError(
                    f"dims {one!r} and {other!r}, which a rename ties, cannot be padded to "
                    f"{size} (for {source!r}) and {given[other][0]} (for {given[other][1]!r})",
                    op.loc,
                )
    found = (Padding(n, d.size, given[n][0]) for n, d in dims.items() if n in given)
    return tuple(p for p in found if p.padded > p.true)


@dataclass(frozen=True)
class Fill:
    """What is known of a value's padding. ``along[dim]``: every element in the padding of
    ``dim``, whatever its other indices, is this. ``everywhere``: every element at all is this."""

    along: Mapping[str, Scalar] = field(default_factory=dict)
    everywhere: Scalar | None = None

    def at(self, dim: str) -> Scalar | None:
        return self.along.get(dim) if self.everywhere is None else self.everywhere

    def meet(self, other: Fill) -> Fill:
        """What is known of a value that is either of two."""
        names = {*self.along, *other.along}
        known = {n: self.at(n) for n in names if equal(self.at(n), other.at(n))}
        both = self.everywhere if equal(self.everywhere, other.everywhere) else None
        return Fill(known, both)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fill) or self.along.keys() != other.along.keys():
            return False
        same = all(equal(c, other.along[n]) for n, c in self.along.items())
        return same and (
            (self.everywhere is None) == (other.everywhere is None)
            and (self.everywhere is None or equal(self.everywhere, other.everywhere))
        )


def equal(a: Scalar | None, b: Scalar | None) -> bool:
    """Whether both are known and the same number."""
    return a is not None and b is not None and bool(a == b)


def apply_scalar(op: Op, args: Sequence[Scalar | None]) -> Scalar | None:
    """An elementwise op on constants: None where the result is not known to the last bit on
    every machine."""
    if op.kind == "select" and args[0] is not None:
        return args[1] if args[0] else args[2]
    if any(a is None for a in args):
        return None
    dtype = DTYPES[op.result.type.dtype]
    with np.errstate(all="ignore"):
        if op.kind in ("cast", "broadcast"):
            made = np.asarray(args[0]).astype(dtype)[()]
            exact = made == args[0]  # conversions out of range differ between machines
        else:
            made = dtype.type({**UNARY, **BINARY, **TERNARY}[op.kind](np, *args))
            exact = op.kind not in INEXACT or made == np.round(made)
    return made if exact and made == made else None


class Emitter:
    """A region in the making: its ops, what is known of its values, and masks to share."""

    def __init__(self, padder: Padder):
        self.padder = padder
        self.ops: list[Op] = []
        self.fills: dict[Value, Fill] = {}
        self.loc: Loc | None = None
        self.made: dict[Any, Value] = {}

    def emit(self, kind: str, operands: Sequence[Value], fill: Fill, **attrs: Any) -> Value:
        (value,) = self.emit_all(kind, operands, fill, **attrs)
        return value

    def emit_all(
        self, kind: str, operands: Sequence[Value], fill: Fill, **attrs: Any
    ) -> list[Value]:
        """An op of several results; ``fill`` is known of each."""
        values = [Value(t) for t in OPS[kind].infer(tuple(v.type for v in operands), attrs)]
        self.ops.append(Op(kind, operands, values, attrs, loc=self.loc))
        self.fills.update(dict.fromkeys(values, fill))
        return values

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def constant(self, number: Scalar, dtype: str) -> Value:
        number = number.item() if isinstance(number, np.generic) else number
        fill = Fill(everywhere=DTYPES[dtype].type(number))
        make = lambda: self.emit("constant", (), fill, value=number, dtype=dtype)  # noqa: E731
        return self.once(("constant", repr(number), dtype), make)

    def valid(self, padding: Padding, own: tuple[str, ...] = ()) -> Value:
        """True at the indices of a dim that are no padding. ``own``: a mask of its own for this."""

        def make() -> Value:
            dim = Dim(padding.dim, padding.padded)
            index = self.emit("iota", (), Fill(), dim=dim, dtype="i32")
            known = Fill({padding.dim: np.False_})
            return self.emit("lt", (index, self.constant(padding.true, "i32")), known)

        return self.once(("valid", padding.dim, own), make)

    def masked(
        self, x: Value, names: Iterable[str], number: Scalar, own: tuple[str, ...] = ()
    ) -> Value:
        """``x`` with ``number`` in the padding of those dims among ``names`` that are grown.
        ``own``: see ``valid``."""
        number = DTYPES[x.type.dtype].type(number)
        for padding in self.padder.among(names):
            name, known = padding.dim, self.fills[x]
            if not x.type.has(name) or equal(known.at(name), number):
                continue
            along = {n: c for n, c in known.along.items() if equal(c, number)}
            everywhere = known.everywhere if equal(known.everywhere, number) else None
            fill = Fill({**along, name: number}, everywhere)

            def make(x: Value = x, padding: Padding = padding, fill: Fill = fill) -> Value:
                other = self.constant(number, x.type.dtype)
                return self.emit("select", (self.valid(padding, own), x, other), fill)

            x = self.once(("masked", x, name, repr(number)), make)
        return x


@dataclass(frozen=True)
class Padder:
    """Rewrites regions; ``paddings`` by dim name."""

    paddings: Mapping[str, Padding]

    def among(self, names: Iterable[str]) -> list[Padding]:
        return [self.paddings[n] for n in names if n in self.paddings]

    def grown(self, t: Any) -> Any:
        """A dim, a type or a tuple of dims, grown; other attributes as they are."""
        if isinstance(t, Dim):
            return Dim(t.name, self.paddings[t.name].padded) if t.name in self.paddings else t
        if isinstance(t, TensorType):
            return TensorType(tuple(map(self.grown, t.dims)), t.dtype, t.layout)
        return tuple(map(self.grown, t)) if isinstance(t, tuple) else t

    def run(
        self, region: Region, out: Emitter, args: Sequence[Value], fills: Sequence[Fill]
    ) -> dict[Value, Value]:
        """Emits the region's ops into ``out``; the values by which each of its own is known."""
        env = dict(zip(region.args, args, strict=True))
        out.fills.update(zip(args, fills, strict=True))
        for op in region.ops:
            out.loc = op.loc
            operands = [env[v] for v in op.operands]
            if op.kind in COLLECTIVES:
                raise IRError("pad a program before it is partitioned", op.loc)
            if op.kind == "repeat":
                made = self.repeat(op, operands, out)
            else:
                made = self.rewrite(op, operands, out)
            for old, new in zip(op.results, made, strict=True):
                new.name = new.name or old.name
                env[old] = new
        out.loc = None
        return env

    def rewrite(self, op: Op, operands: list[Value], out: Emitter) -> list[Value]:
        touched = {n for v in (*op.operands, *op.results) for n in v.type.names}
        attrs = {k: self.grown(v) for k, v in op.attrs.items()}
        fill = Fill()
        if op.kind == "constant":
            number = DTYPES[attrs["dtype"]].type(attrs["value"])
            fill = Fill(everywhere=number if number == number else None)
        elif op.kind == "random" and self.among(touched):
            attrs.setdefault("counted", tuple(d.size for d in op.attrs["dims"]))
        elif self.among(touched) or op.kind in ELEMENTWISE:
            rule = RULES.get(op.kind, elementwise if op.kind in ELEMENTWISE else None)
            if rule is not None:
                operands, fill = rule(op, operands, out)
        if op.kind in ATTENTION and op.attrs["memory"] in self.paddings:
            attrs.setdefault("length", op.operands[1].type.dim(op.attrs["memory"]).size)
        return out.emit_all(op.kind, operands, fill, **attrs)

    def repeat(self, op: Op, operands: list[Value], out: Emitter) -> tuple[Value, ...]:
        """What is known of a carried value's padding holds in every step: start from what is
        known of the first, and give up what a step does not keep, to a fixed point."""
        dim, carries, region = op.attrs["dim"], op.attrs["carries"], op.regions[0]
        if dim.name in self.paddings:
            raise IRError(
                f"the repeat over {dim} would run more often: it cannot be padded", op.loc
            )
        fills = [out.fills[v] for v in operands]
        while True:
            inner = Emitter(self)
            args = tuple(Value(self.grown(v.type), v.name) for v in region.args)
            env = self.run(region, inner, args, fills)
            outputs = tuple(env[v] for v in region.outputs)
            steps = [inner.fills[v] for v in outputs]
            kept = [a.meet(b) for a, b in zip(fills, steps[:carries], strict=False)]
            if kept == fills[:carries]:
                break
            fills = [*kept, *fills[carries:]]
        results = tuple(Value(self.grown(v.type)) for v in op.results)
        out.fills.update(zip(results, [*kept, *steps[carries:]], strict=True))
        inner_region = Region(args, tuple(inner.ops), outputs)
        out.ops.append(Op("repeat", operands, results, op.attrs, (inner_region,), op.loc))
        return results


# One rule per kind of op that has grown dims: the operands to use in place of the given ones, and
# what is known of the result's padding. (Rules see the op as it was, with true sizes.)

Rule = Callable[[Op, list[Value], Emitter], tuple[list[Value], Fill]]


def per_dim(
    op: Op, out: Emitter, known: Callable[[str], Scalar | None], everywhere: Scalar | None = None
) -> Fill:
    found = {p.dim: known(p.dim) for p in out.padder.among(op.result.type.names)}
    return Fill({n: c for n, c in found.items() if c is not None}, everywhere)


def keep_zero(op: Op, x: Value, out: Emitter, gone: Iterable[str] = ()) -> Fill:
    """Zeros along a dim that the op runs beside stay zeros."""
    return per_dim(op, out, lambda n: zero(out.fills[x].at(n)) if n not in gone else None)


def zero(number: Scalar | None) -> Scalar | None:
    return number if number is not None and number == 0 else None


def elementwise(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    fills = [out.fills[v] for v in operands]
    everywhere = apply_scalar(op, [f.everywhere for f in fills])

    def known(name: str) -> Scalar | None:
        return apply_scalar(op, [f.at(name) for f in fills])

    return operands, per_dim(op, out, known, everywhere)


def either(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """Both ways must agree in the padding too, or be known to hold what both hold."""
    return operands, out.fills[operands[0]].meet(out.fills[operands[1]])


def einsum(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """Both operands are masked: zero times the other's NaN would be NaN."""
    kept = op.result.type.names
    masked = [out.masked(v, [n for n in v.type.names if n not in kept], 0) for v in operands]
    a, b = (out.fills[v] for v in masked)

    def known(name: str) -> Scalar | None:
        p, q = a.at(name), b.at(name)
        if p is None or q is None or not (np.isfinite(p) and np.isfinite(q)):
            return None
        return DTYPES[op.result.type.dtype].type(0) if p == 0 or q == 0 else None

    return masked, per_dim(op, out, known)


def attention(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """Zeros along every dim that the op sums over, since zero times NaN would be NaN: head_dim,
    the keys (whose scores the op masks too), and the queries where gradients of keys sum them."""
    r = roles(op)
    summed = (r.memory, r.head_dim, *((r.seq, *r.group) if op.kind == "attention_grad" else ()))
    return [out.masked(v, [n for n in v.type.names if n in summed], 0) for v in operands], Fill()


def reduce(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    (x,) = operands
    number = identity(op.attrs["op"], x.type.dtype)
    x = out.masked(x, op.attrs["dims"], number)
    if op.attrs["op"] == "sum":
        return [x], keep_zero(op, x, out)
    whole = math.prod(x.type.dim(n).size for n in op.attrs["dims"]) > 0
    return [x], per_dim(op, out, lambda n: out.fills[x].at(n) if whole else None)


def rename(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    return operands, renamed(out.fills[operands[0]], op.attrs["dim"], op.attrs["to"])


def renamed(fill: Fill, old: str, new: str) -> Fill:
    return replace(fill, along={new if n == old else n: c for n, c in fill.along.items()})


def in_range(ids: Value, dim: str, out: Emitter) -> Value:
    """Ids beyond the true size as -1, which no row has."""
    for padding in out.padder.among([dim]):

        def make(padding: Padding = padding) -> Value:
            known = out.fills[ids]
            small = out.emit("lt", (ids, out.constant(padding.true, "i32")), Fill())
            keep = {n: c for n, c in known.along.items() if c < padding.true}
            gone = dict.fromkeys(known.along.keys() - keep.keys(), np.int32(-1))
            fill = Fill({**keep, **gone})
            return out.emit("select", (small, ids, out.constant(-1, "i32")), fill)

        return out.once(("in range", ids, dim), make)
    return ids


def gather(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    table, ids = operands
    dim = op.attrs["dim"]
    ids = in_range(ids, dim, out)
    size = op.operands[0].type.dim(dim).size

    def known(name: str) -> Scalar | None:
        if table.type.has(name):
            return zero(out.fills[table].at(name))
        at = out.fills[ids].at(name)
        outside = at is not None and not 0 <= at < size
        return DTYPES[table.type.dtype].type(0) if outside else None

    return [table, ids], per_dim(op, out, known)


def scatter_add(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """Padding of the ids names no row, and no id names a row of padding."""
    updates, ids = operands
    dim = op.attrs["dim"].name
    ids = out.masked(in_range(ids, dim, out), ids.type.names, -1)
    rows = DTYPES[updates.type.dtype].type(0)
    fill = keep_zero(op, updates, out, gone=[dim])
    return [updates, ids], Fill({**fill.along, **{p.dim: rows for p in out.padder.among([dim])}})


def update(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """What is written beyond the true size lies in the padding."""
    fills = [out.fills[v] for v in operands[:2]]

    def known(name: str) -> Scalar | None:
        first = fills[0].at(name) if name != op.attrs["dim"] else None
        return first if equal(first, fills[1].at(name)) else None

    return operands, per_dim(op, out, known)


def cumsum(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    dim = op.attrs["dim"]
    if not op.attrs["reverse"]:
        return operands, keep_zero(op, operands[0], out, gone=[dim])
    x = out.masked(operands[0], [dim], 0)
    return [x], keep_zero(op, x, out)


def shift(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    dim, by = op.attrs["dim"], op.attrs["by"]
    if by > 0:
        return operands, keep_zero(op, operands[0], out, gone=[dim])
    x = out.masked(operands[0], [dim], 0)  # zeros come in from the end
    return [x], keep_zero(op, x, out)


def reorder(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    dim = op.attrs["dim"]
    for _ in out.padder.among([dim]):
        raise refuse(op, f"leave {dim!r}; padding would lie among its blocks", out)
    return operands, keep_zero(op, operands[0], out)


def refuse(op: Op, why: str, out: Emitter) -> IRError:
    names = [n for v in (*op.operands, *op.results) for n in v.type.names]
    grown = ", ".join(f"{p.dim} ({p.true} -> {p.padded})" for p in out.padder.among(names))
    return IRError(f"{op.kind} cannot run on padded dims, here {grown}: {why}", op.loc)


def split(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    whole = op.operands[0].type.dim(op.attrs["dim"])
    major, minor = op.attrs["into"]
    need_whole_rows(op, whole, major, minor, out)
    return operands, renamed(out.fills[operands[0]], whole.name, major.name)


def merge(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    whole = op.result.type.dim(op.attrs["to"])
    major, minor = (op.operands[0].type.dim(n) for n in op.attrs["dims"])
    need_whole_rows(op, whole, major, minor, out)
    return operands, renamed(out.fills[operands[0]], major.name, whole.name)


def need_whole_rows(op: Op, whole: Dim, major: Dim, minor: Dim, out: Emitter) -> None:
    """Rows of the minor dim that stay as they are keep the valid part in front."""
    grown = out.padder.grown
    if grown(minor) != minor or grown(major).size * minor.size != grown(whole).size:
        why = f"leave {minor.name!r}; pad {whole.name!r} to {minor.size} times {major.name!r}"
        raise refuse(op, why, out)


def slice_(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    source, to = op.operands[0].type.dim(op.attrs["dim"]), op.attrs["to"]
    grown = out.padder.grown
    if op.attrs["start"] + grown(to).size > grown(source).size:
        raise refuse(op, f"the slice ends beyond {grown(source)}; pad {to.name!r} less", out)
    fill = out.fills[operands[0]]
    return operands, per_dim(
        op, out, lambda n: fill.at(n) if n != to.name else fill.everywhere, fill.everywhere
    )


def concat(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    grown, to = out.padder.grown, op.attrs["to"]
    dims = [v.type.dim(n) for v, n in zip(op.operands, op.attrs["dims"], strict=True)]
    if any(grown(d) != d for d in dims[:-1]) or sum(grown(d).size for d in dims) != grown(to).size:
        raise refuse(op, "only its last part and its result can grow, by the same number", out)
    fills = [out.fills[v] for v in operands]

    def known(name: str) -> Scalar | None:
        if name == to.name:
            return fills[-1].at(dims[-1].name)
        first = fills[0].at(name)
        return first if all(equal(first, f.at(name)) for f in fills) else None

    return operands, per_dim(op, out, known)


def pad(op: Op, operands: list[Value], out: Emitter) -> tuple[list[Value], Fill]:
    """The operand's padding becomes part of what the op fills."""
    grown, to, value = out.padder.grown, op.attrs["to"], op.attrs["value"]
    source = op.operands[0].type.dim(op.attrs["dim"])
    if op.attrs["before"] + grown(source).size > grown(to).size:
        raise refuse(op, f"{grown(source)} does not fit into {grown(to)}; pad {to.name!r} too", out)
    x = out.masked(operands[0], [source.name], value)
    number = DTYPES[x.type.dtype].type(value)

    def known(name: str) -> Scalar | None:
        at = out.fills[x].at(name)
        return number if name == to.name or equal(at, number) else None

    return [x], per_dim(op, out, known)


RULES: dict[str, Rule] = {
    "attention": attention,
    "attention_grad": attention,
    "either": either,
    "einsum": einsum,
    "reduce": reduce,
    "rename": rename,
    "gather": gather,
    "scatter_add": scatter_add,
    "update": update,
    "cumsum": cumsum,
    "shift": shift,
    "reorder": reorder,
    "split": split,
    "merge": merge,
    "slice": slice_,
    "concat": concat,
    "pad": pad,
}
