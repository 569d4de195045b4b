"""Check that a program obeys the rules of the IR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from neocc.ir.errors import IRError, Loc
from neocc.ir.ops import OPS, repeat_types
from neocc.ir.program import ROLES, Op, Program, Region, Value
from neocc.ir.types import Dim, TensorType


def verify(program: Program) -> None:
    """Checks a program, partitioned or not (of layouts: only that an output that replaces an
    input has its layout; ``passes.partition.verify`` proves the rest).

    Raises:
        IRError: at the op's source line. A value is used where it is not defined, or defined
            twice; an op is of no known kind, has the wrong regions or attributes, or its types
            are not those that its kind infers; a dim name has two sizes; inputs and outputs
            do not fit their names.
    """
    check_names(program)
    check_region(program.body, set())
    check_sizes(program)


def check_names(program: Program) -> None:
    inputs, outputs = program.inputs, program.outputs
    args, ends = program.body.args, program.body.outputs
    if len(inputs) != len(args):
        raise IRError(f"{len(inputs)} inputs are named and the body has {len(args)} arguments")
    if len(outputs) != len(ends):
        raise IRError(f"{len(outputs)} outputs are named and the body has {len(ends)}")
    for what, names in (("inputs", [i.name for i in inputs]), ("outputs", list(outputs))):
        for name in names:
            if names.count(name) > 1:
                raise IRError(f"two {what} are named {name!r}")
    makers = {v: op for op in program.body.ops for v in op.results}
    for info, value in program.named_inputs:
        if info.role not in ROLES:
            raise IRError(f"input {info.name!r} has the role {info.role!r}; one of {ROLES}")
        if info.name in outputs:
            out = program.output_value(info.name)
            if out.type != value.type:
                op = makers.get(out)
                raise IRError(
                    f"output {info.name!r} is {out.type}; the input it replaces is {value.type}",
                    op.loc if op else None,
                )


def check_region(region: Region, outside: set[Value]) -> None:
    """``outside``: values of the enclosing regions, which this one must not use."""
    known: set[Value] = set()
    later = {v for op in region.ops for v in op.results}

    def define(values: Iterable[Value], what: str, loc: Loc | None) -> None:
        for value in values:
            if value in known or value in outside:
                raise IRError(f"{what} defines {value!r} a second time", loc)
            known.add(value)

    def use(values: Iterable[Value], what: str, loc: Loc | None) -> None:
        for value in values:
            if value in known:
                continue
            if value in outside:
                why = "of an outer region; pass it to the region as an argument"
            elif value in later:
                why = "before it is defined"
            else:
                why = "which nothing in its region defines"
            raise IRError(f"{what} uses {value!r} {why}", loc)

    define(region.args, "a region's arguments", None)
    for op in region.ops:
        use(op.operands, op.kind, op.loc)
        if op.kind not in OPS:
            raise IRError(f"there is no op {op.kind!r}", op.loc)
        count = 1 if op.kind == "repeat" else 0
        if len(op.regions) != count:
            raise IRError(f"{op.kind} has {len(op.regions)} regions, not {count}", op.loc)
        for inner in op.regions:
            check_region(inner, outside | known | later)
        check_types(op)
        define(op.results, op.kind, op.loc)
    use(region.outputs, "the end of the region", region.ops[-1].loc if region.ops else None)


def check_types(op: Op) -> None:
    inferred = infer(op)
    if len(inferred) != len(op.results):
        raise IRError(f"{op.kind} makes {len(inferred)} values, not {len(op.results)}", op.loc)
    for value, type in zip(op.results, inferred, strict=True):
        if value.type.with_layout(None) != type:
            raise IRError(f"{op.kind} makes {type}; the program says {value.type}", op.loc)


def infer(op: Op) -> tuple[TensorType, ...]:
    """Result types by the op's own rule, without layouts."""
    operands = tuple(v.type.with_layout(None) for v in op.operands)
    try:
        if op.kind == "repeat":
            types = repeat_types(operands, op.attrs, without_layouts(op.regions[0]))
        else:
            types = OPS[op.kind].infer(operands, op.attrs)
    except IRError as error:
        raise IRError(error.message, op.loc) from None
    except KeyError as error:
        raise IRError(f"{op.kind} lacks the attribute {error.args[0]!r}", op.loc) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise IRError(f"{op.kind} has a faulty operand or attribute: {error}", op.loc) from None
    return tuple(t.with_layout(None) for t in types)


def without_layouts(region: Region) -> Region:
    """The region's signature alone."""

    def plain(values: Iterable[Value]) -> tuple[Value, ...]:
        return tuple(Value(v.type.with_layout(None), v.name) for v in values)

    return Region(plain(region.args), (), plain(region.outputs))


def dims_of(value: Any) -> Iterator[Dim]:
    """Dims in an attribute's value."""
    if isinstance(value, Dim):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from dims_of(item)


def check_sizes(program: Program) -> None:
    """One dim name, one size."""
    known: dict[str, tuple[int, Loc | None]] = {}

    def check(dims: Iterable[Dim], what: str, loc: Loc | None) -> None:
        for d in dims:
            size, first = known.setdefault(d.name, (d.size, loc))
            if size != d.size:
                where = f" at {first}" if first else ""
                raise IRError(
                    f"{what} has the dim {d.name!r} of size {d.size}; it is {size}{where}: one "
                    "name has one size",
                    loc,
                )

    for info, value in program.named_inputs:
        check(value.type.dims, f"input {info.name!r}", None)
    for op in program.body.walk():
        values = [*op.operands, *op.results, *(v for r in op.regions for v in r.args)]
        for value in values:
            check(value.type.dims, op.kind, op.loc)
        for value in op.attrs.values():
            check(dims_of(value), op.kind, op.loc)
