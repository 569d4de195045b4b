"""Programs: typed values in SSA form, operations, regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neocc.ir.errors import Loc
from neocc.ir.types import Dim, TensorType

ROLES = ("parameter", "state", "data")


class Value:
    """One SSA value; its identity is the object. ``name`` is a hint for the reader."""

    __slots__ = ("name", "type")

    def __init__(self, type: TensorType, name: str = ""):
        self.type = type
        self.name = name

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"


class Op:
    """An operation: a kind of ``neocc.ir.ops``, operands, attributes, regions and results."""

    __slots__ = ("attrs", "kind", "loc", "operands", "regions", "results")

    def __init__(
        self,
        kind: str,
        operands: Iterable[Value],
        results: Iterable[Value],
        attrs: Mapping[str, Any] | None = None,
        regions: Iterable[Region] = (),
        loc: Loc | None = None,
    ):
        self.kind = kind
        self.operands = tuple(operands)
        self.results = tuple(results)
        self.attrs: dict[str, Any] = dict(attrs or {})
        self.regions = tuple(regions)
        self.loc = loc

    @property
    def result(self) -> Value:
        (result,) = self.results
        return result

    def __repr__(self) -> str:
        results = ", ".join(map(repr, self.results))
        return f"{results} = {self.kind}({', '.join(map(repr, self.operands))})"


@dataclass(frozen=True, eq=False)
class Region:
    """Arguments, ops in execution order, outputs. It uses no value from outside."""

    args: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]

    def walk(self) -> Iterator[Op]:
        """Every op, those of nested regions after the op that holds them."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()


@dataclass(frozen=True)
class Input:
    """An argument of a program. ``role``: a parameter, other state (optimizer), or data."""

    name: str
    role: str


@dataclass(frozen=True, eq=False)
class Program:
    """A region with names. An output that bears an input's name replaces that input: its
    buffer is donated, and it has the input's type (and, once partitioned, its layout)."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    body: Region

    def input_value(self, name: str) -> Value:
        return next(v for i, v in zip(self.inputs, self.body.args, strict=True) if i.name == name)

    def output_value(self, name: str) -> Value:
        return self.body.outputs[self.outputs.index(name)]

    @property
    def named_inputs(self) -> Iterator[tuple[Input, Value]]:
        return zip(self.inputs, self.body.args, strict=True)

    @property
    def dims(self) -> dict[str, Dim]:
        """Every dim of the program by name."""
        found: dict[str, Dim] = {}
        for value in self.values():
            for d in value.type.dims:
                found.setdefault(d.name, d)
        for op in self.body.walk():
            if op.kind == "repeat":
                d = op.attrs["dim"]
                found.setdefault(d.name, d)
        return found

    def values(self) -> Iterator[Value]:
        yield from self.body.args
        for op in self.body.walk():
            for region in op.regions:
                yield from region.args
            yield from op.results

    @property
    def parameter_count(self) -> int:
        return sum(v.type.size for i, v in self.named_inputs if i.role == "parameter")


def rebuild(region: Region, rewrite: Callable[[Op, tuple[Value, ...]], Op | None]) -> Region:
    """A copy of ``region`` with fresh ops over the same arguments.

    ``rewrite(op, operands)`` gets each op with its operands already mapped and returns the op
    to put in its place (results are matched by position), or None to drop it.
    """
    env: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in region.ops:
        new = rewrite(op, tuple(env.get(v, v) for v in op.operands))
        if new is not None:
            ops.append(new)
            env.update(zip(op.results, new.results, strict=True))
    return Region(region.args, tuple(ops), tuple(env.get(v, v) for v in region.outputs))


def clone_op(op: Op, operands: Iterable[Value]) -> Op:
    """A fresh op of the same kind over ``operands``, with fresh results of the same types."""
    results = [Value(r.type, r.name) for r in op.results]
    return Op(op.kind, operands, results, op.attrs, op.regions, op.loc)
