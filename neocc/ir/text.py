"""Programs as text: what a pass reads and writes, and the best test fixture.

    program layer {
      parameter %w: f32[embd=768, mlp=3072]
      data %x: f32[batch=8, embd=768]
      %0: f32[batch=8, mlp=3072] = einsum(%x, %w) {out=["batch", "mlp"], dtype="f32"}  @ gpt.py:57
      return y=%0
    }

One op a line: results with types, kind, operands, attributes, regions, the user's line. A value's
hint is its name if no other value of the region has it; names are local to a region, since a
region uses nothing from outside. A partitioned program starts with ``mesh x:8,y:16`` and its types
bear layouts: ``f32[batch=8, embd=4] {batch, +sum}``. ``#`` starts a comment.

Attributes: numbers (``inf``, ``-inf``, ``nan`` too), ``true``, ``false``, ``none``, strings, dims
(``layers=12``), lists, and strategies (``{batch, -, +0+1}``: the first axis cuts an iteration dim,
the second does nothing, the third passes partial sums of operands 0 and 1 on).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from neocc.ir.errors import IRError, Loc, NeoccError
from neocc.ir.mesh import Choice, Layout, Mesh, Partial, Placement, Strategy, Through
from neocc.ir.program import ROLES, Input, Op, Program, Region, Value
from neocc.ir.types import NAME, Dim, TensorType

WIDTH = 100
T = TypeVar("T")


# Printing


def print_program(program: Program, mesh: Mesh | None = None, locs: bool = True) -> str:
    """The program as text. ``mesh`` goes in front of a partitioned one; ``locs``: each op ends
    with the user's line."""
    printer = Printer(locs)
    names = Names(program.body, (i.name for i in program.inputs))
    lines = [f"mesh {mesh}"] if mesh else []
    lines.append(f"program {word(program.name)} {{")
    for info, value in program.named_inputs:
        # The name is written apart from the value's where the two differ.
        name = names[value]
        apart = "" if name == f"%{info.name}" else f" {json.dumps(info.name)}"
        lines.append(f"  {info.role} {name}{apart}: {value.type}")
    lines += printer.ops(program.body, names, "  ")
    returned = zip(program.outputs, program.body.outputs, strict=True)
    ends = ", ".join(f"{word(name)}={names[value]}" for name, value in returned)
    return "\n".join([*lines, f"  return {ends}".rstrip(), "}"]) + "\n"


def word(name: str) -> str:
    return name if NAME.match(name) else json.dumps(name)


class Names:
    """Printed names of a region's values: the hint where there is one, else a number."""

    def __init__(self, region: Region, hints: Iterable[str] = ()):
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.count = 0
        first = list(hints) or [v.name for v in region.args]
        for value, hint in zip(region.args, first, strict=True):
            self.add(value, hint)
        for op in region.ops:
            for value in op.results:
                self.add(value, value.name)

    def add(self, value: Value, hint: str) -> None:
        hint = re.sub(r"[^A-Za-z0-9_./]+", "_", hint)
        if not hint:
            name, self.count = str(self.count), self.count + 1
        else:
            name = base = f"_{hint}" if hint[0].isdigit() else hint
            number = 0
            while name in self.taken:
                number += 1
                name = f"{base}_{number}"
        self.taken.add(name)
        self.names.setdefault(value, f"%{name}")

    def __getitem__(self, value: Value) -> str:
        return self.names.get(value, "%<undefined>")  # a faulty program can still be looked at


@dataclass(frozen=True)
class Printer:
    locs: bool

    def ops(self, region: Region, names: Names, indent: str) -> list[str]:
        return [line for op in region.ops for line in self.op(op, names, indent)]

    def op(self, op: Op, names: Names, indent: str) -> list[str]:
        results = [f"{names[v]}: {v.type}" for v in op.results]
        attrs = ", ".join(f"{k}={attribute(v)}" for k, v in op.attrs.items())
        work = f"{op.kind}({', '.join(names[v] for v in op.operands)})"
        work += f" {{{attrs}}}" if attrs else ""
        lines = [f"{indent}{', '.join(results)} = {work}"]
        if len(lines[0]) > WIDTH and len(results) > 1:
            lines = [*(f"{indent}{r}," for r in results[:-1]), f"{indent}{results[-1]} = {work}"]
        for region in op.regions:
            lines += self.region(region, indent, lines.pop())
        if self.locs and op.loc:
            lines[-1] += f"  @ {op.loc}"
        return lines

    def region(self, region: Region, indent: str, head: str) -> list[str]:
        names = Names(region)
        args = [f"{names[v]}: {v.type}" for v in region.args]
        lines = [f"{head} ({', '.join(args)}) {{"]
        if len(lines[0]) > WIDTH:
            body = [f"{indent}    {arg}," for arg in args]
            lines = [f"{head} (", *body, f"{indent}  ) {{"]
        lines += self.ops(region, names, f"{indent}  ")
        ends = ", ".join(names[v] for v in region.outputs)
        return [*lines, f"{indent}  yield {ends}".rstrip(), f"{indent}}}"]


def attribute(value: Any) -> str:
    """The text of an attribute's value.

    Raises:
        IRError: a value of a kind that text cannot hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Dim | Strategy):
        return str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(attribute, value)) + "]"
    raise IRError(f"an attribute cannot be a {type(value).__name__}: {value!r}")


# Parsing


class ParseError(IRError):
    """Text that is no program: where, what was expected there, and what was found."""

    def __init__(self, message: str, file: str, line: int, column: int):
        super().__init__(message)
        self.line, self.column = line, column
        self.args = (f"{file}:{line}:{column}: {message}",)


def parse_program(text: str, file: str = "<text>") -> Program:
    """The program that ``text`` prints; a mesh in front of it is skipped.

    Raises:
        ParseError: with line and column, what was expected and what was found.
    """
    return parse_partitioned(text, file)[0]


def parse_partitioned(text: str, file: str = "<text>") -> tuple[Program, Mesh | None]:
    """A program and the mesh in front of it, if there is one.

    Raises:
        ParseError: as ``parse_program``.
    """
    return Parser(text, file).whole()


TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |@[ ]*(?P<loc>[^\n]+?:\d+)[ \t]*(?=\n|$)
    |(?P<value>%[A-Za-z0-9_./]+)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|-inf\b)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>[=(){}\[\],:+-])""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


class Parser:
    """Recursive descent, one token of lookahead."""

    def __init__(self, text: str, file: str):
        self.source, self.file = text, file
        self.tokens = list(self.scan())
        self.at = 0
        self.scope: dict[str, Value] = {}

    def scan(self) -> Iterator[Token]:
        start = 0
        while start < len(self.source):
            match = TOKEN.match(self.source, start)
            if match is None:
                raise self.error("expected a token", Token("", self.source[start], start))
            kind = match.lastgroup or ""
            if kind != "space":
                yield Token(kind, match[kind], start)
            start = match.end()
        yield Token("end", "", len(self.source))

    def error(self, message: str, token: Token) -> ParseError:
        line = self.source.count("\n", 0, token.start) + 1
        column = token.start - self.source.rfind("\n", 0, token.start)
        return ParseError(f"{message}, found {token}", self.file, line, column)

    # Tokens

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def take(self, kind: str, what: str) -> Token:
        token = self.next
        if token.kind != kind:
            raise self.error(f"expected {what}", token)
        self.at += 1
        return token

    def is_sign(self, text: str) -> bool:
        return self.next.kind == "sign" and self.next.text == text

    def accept(self, text: str) -> bool:
        found = self.is_sign(text)
        self.at += found
        return found

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected {text!r}", self.next)

    def keyword(self, text: str) -> bool:
        found = self.next.kind == "word" and self.next.text == text
        self.at += found
        return found

    def integer(self, what: str) -> int:
        token = self.take("number", what)
        if not re.fullmatch(r"-?\d+", token.text):
            raise self.error(f"expected {what}", token)
        return int(token.text)

    def name(self, what: str) -> str:
        """A word, or a string where the name is no word."""
        if self.next.kind == "string":
            return json.loads(self.take("string", what).text)
        return self.take("word", what).text

    def many(self, item: Callable[[], T], end: str) -> list[T]:
        """Items up to ``end``, a comma after each but the last, where it may stand."""
        found: list[T] = []
        while not self.accept(end):
            found.append(item())
            if not self.accept(","):
                self.expect(end)
                break
        return found

    def checked(self, make: Callable[[], T], token: Token) -> T:
        """What ``make`` returns; its complaint gets the place of ``token``."""
        try:
            return make()
        except NeoccError as error:
            raise self.error(error.message, token) from None

    # Programs

    def whole(self) -> tuple[Program, Mesh | None]:
        mesh = self.mesh() if self.keyword("mesh") else None
        if not self.keyword("program"):
            raise self.error("expected 'program'", self.next)
        name = self.name("the program's name")
        self.expect("{")
        inputs: list[Input] = []
        args: list[Value] = []
        while self.next.kind == "word" and self.next.text in ROLES:
            role = self.take("word", "a role").text
            value = self.take("value", "an input like %x")
            known = value.text[1:]
            if self.next.kind == "string":
                known = self.name("the input's name")
            inputs.append(Input(known, role))
            args.append(self.define(value, self.typed()))
        ops = self.ops("return")
        ends = [self.returned()] if self.next.kind in ("word", "string") else []
        while ends and self.accept(","):
            ends.append(self.returned())
        self.expect("}")
        self.take("end", "the end")
        body = Region(tuple(args), ops, tuple(v for _, v in ends))
        return Program(name, tuple(inputs), tuple(n for n, _ in ends), body), mesh

    def mesh(self) -> Mesh:
        first = self.next
        axes: list[tuple[str, int]] = []
        while not axes or self.accept(","):
            axis = self.take("word", "an axis like x:8").text
            self.expect(":")
            axes.append((axis, self.integer("the axis's size")))
        return self.checked(lambda: Mesh(tuple(axes)), first)

    def returned(self) -> tuple[str, Value]:
        name = self.name("an output like loss=%0")
        self.expect("=")
        return name, self.use()

    def define(self, token: Token, type: TensorType) -> Value:
        if token.text in self.scope:
            raise self.error("expected a new value", token)
        hint = token.text[1:]
        value = Value(type, "" if hint.isdigit() else hint)
        self.scope[token.text] = value
        return value

    def use(self) -> Value:
        token = self.take("value", "a value like %0")
        if token.text not in self.scope:
            raise self.error("expected a value that this region has defined", token)
        return self.scope[token.text]

    def ops(self, end: str) -> tuple[Op, ...]:
        found: list[Op] = []
        while not self.keyword(end):
            if self.next.kind not in ("value", "sign"):
                raise self.error(f"expected an op like %0: f32[] = ... or {end!r}", self.next)
            found.append(self.op())
        return tuple(found)

    def op(self) -> Op:
        results: list[tuple[Token, TensorType]] = []
        while not self.accept("="):
            value = self.take("value", "a result like %0")
            results.append((value, self.typed()))
            if not self.accept(","):
                self.expect("=")
                break
        kind = self.take("word", "the kind of an op").text
        self.expect("(")
        operands = self.many(self.use, ")")
        attrs = dict(self.many(self.pair, "}")) if self.accept("{") else {}
        regions: list[Region] = []
        while self.accept("("):
            regions.append(self.region())
        loc = None
        if self.next.kind == "loc":
            file, _, line = self.take("loc", "a place").text.rpartition(":")
            loc = Loc(file, int(line))
        made = [self.define(token, type) for token, type in results]
        return Op(kind, operands, made, attrs, regions, loc)

    def region(self) -> Region:
        outer, self.scope = self.scope, {}
        args = self.many(lambda: self.define(self.take("value", "%x"), self.typed()), ")")
        self.expect("{")
        ops = self.ops("yield")
        outputs = self.many(self.use, "}")
        self.scope = outer
        return Region(tuple(args), ops, tuple(outputs))

    # Types and attributes

    def typed(self) -> TensorType:
        self.expect(":")
        first = self.next
        dtype = self.take("word", "a type like f32[batch=8]").text
        self.expect("[")
        dims = self.many(self.dim, "]")
        layout = None
        if self.accept("{"):
            places = tuple(self.many(self.placement, "}"))
            host = self.keyword("on")
            if host and not self.keyword("host"):
                raise self.error("expected 'host'", self.next)
            layout = Layout(places, host)
        return self.checked(lambda: TensorType(tuple(dims), dtype, layout), first)

    def dim(self) -> Dim:
        first = self.take("word", "a dim like batch=8")
        self.expect("=")
        size = self.integer("the dim's size")
        return self.checked(lambda: Dim(first.text, size), first)

    def placement(self) -> Placement:
        if self.accept("-"):
            return None
        if self.accept("+"):
            return Partial(self.take("word", "a reduction").text)
        return self.take("word", "a dim, '-' or a partial like +sum").text

    def choice(self) -> Choice:
        if self.accept("-"):
            return None
        passed: set[int] = set()
        while self.accept("+"):
            if self.next.kind != "number":  # of no operand: a constant zero
                return Through(frozenset())
            passed.add(self.integer("the index of an operand"))
        if passed:
            return Through(frozenset(passed))
        return self.take("word", "a dim, '-' or a pass-through like +0").text

    def pair(self) -> tuple[str, Any]:
        name = self.take("word", "an attribute like dim=...").text
        self.expect("=")
        return name, self.attribute()

    def attribute(self) -> Any:
        if self.accept("["):
            return tuple(self.many(self.attribute, "]"))
        if self.accept("{"):
            return Strategy(tuple(self.many(self.choice, "}")))
        token = self.next
        if token.kind == "string":
            return self.name("a string")
        if token.kind == "number":
            self.at += 1
            return int(token.text) if re.fullmatch(r"-?\d+", token.text) else float(token.text)
        after = self.tokens[self.at + 1] if token.kind == "word" else token
        if token.text in WORDS and after.text != "=":
            self.at += 1
            return WORDS[token.text]
        if token.kind == "word" and after.text == "=":
            return self.dim()
        raise self.error("expected a number, a string, a dim, a list or a strategy", token)


WORDS: Mapping[str, Any] = {
    "true": True,
    "false": False,
    "none": None,
    "inf": float("inf"),
    "nan": float("nan"),
}
