"""The text form of an HLO module, parsed as far as reading facts off it needs.

Text in, frozen records out; no meaning is given to an opcode here. Attributes are looked up when
asked for, so that a module of several MB parses in a fraction of a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# name = shape opcode(operands..., attributes...). A tuple shape ends at the first ") opcode(":
# inside it a ")" is followed by "," or "(" or "{", never by a blank and a word.
_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)", re.DOTALL
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'metadata=\{(?:[^"}]|"[^"]*")*?op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BITS = re.compile(r"(?:pred|bf|f|s|u|c)(\d*)")
_METADATA = re.compile(r"kernel_metadata=\{\n(.*?)\n\}", re.DOTALL)


class HloError(ValueError):
    """The text is not an HLO module, or not one that this reader understands."""


@dataclass(frozen=True, slots=True)
class Array:
    """An array shape: element type as HLO spells it (``bf16``) and sizes, without layout."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Logical bytes: elements times element size, sub-byte types packed."""
        return (self.size * _bits(self.dtype) + 7) // 8


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    if match := _BITS.match(dtype):
        return int(match[1])
    raise HloError(f"unknown HLO element type {dtype!r}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, tuples flattened."""
    return tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(shape)
    )


def elements(shape: str) -> tuple[str, ...]:
    """The elements of a tuple shape, one level down; an array shape is its own only element."""
    return tuple(_split(shape[1:-1])) if shape.startswith("(") else (shape,)


def _split(text: str) -> list[str]:
    """Cuts at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        if ch in "({[":
            depth += 1
        elif ch in ")}]":
            depth -= 1
        elif ch == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text else []


@dataclass(frozen=True)
class Instruction:
    """``%name = shape opcode(operands), attributes``; ``rest`` is what follows ``opcode(``."""

    name: str
    opcode: str
    shape: str
    rest: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @cached_property
    def _cut(self) -> int:
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                return match.start()
        return len(self.rest)

    @cached_property
    def argument(self) -> str:
        """The text between the parentheses: operands, a parameter's number, a constant."""
        return self.rest[: self._cut]

    @cached_property
    def operands(self) -> tuple[str, ...]:
        text = self.argument
        if "%" in text:
            return tuple(_NAME.findall(text))
        return tuple(part.split()[-1] for part in _split(text) if part)

    def attribute(self, name: str) -> str | None:
        """An attribute's value up to the next one; braces and brackets kept. None if absent."""
        match = re.compile(rf"[,)] {name}=").search(self.rest, self._cut)
        if match is None:
            return None
        depth, start = 0, match.end()
        for i in range(start, len(self.rest)):
            ch = self.rest[i]
            if ch in "{[(":
                depth += 1
            elif ch in "}])":
                depth -= 1
            elif ch == "," and depth == 0:
                return self.rest[start:i]
        return self.rest[start:]

    def integers(self, name: str) -> tuple[int, ...]:
        """An attribute like ``{1,2}`` or ``3``; empty if absent."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name) or "")))

    def called(self, *names: str) -> tuple[str, ...]:
        """The computations that these attributes name."""
        found: list[str] = []
        for name in names:
            if (text := self.attribute(name)) is not None:
                found += [part.strip().lstrip("%") for part in text.strip("{}").split(",")]
        return tuple(found)

    @property
    def op_name(self) -> str:
        """The ``op_name`` metadata, e.g. ``jit(step)/shard_map/psum``; empty if there is none."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int:
        """The TPU cost model's cycles for one execution; 0 where it prints none, or -1 (as 2^64-1)
        for "unknown"."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match and len(match[1]) < 19 else 0


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {inst.name: inst for inst in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    def shape(self, name: str) -> str:
        return self.by_name[name].shape


@dataclass(frozen=True)
class Module:
    name: str
    devices: int
    """Partitions x replicas: the ids that replica groups count over."""
    computations: Mapping[str, Computation]
    entry: str


def parse_module(text: str) -> Module:
    """Parses optimised HLO text.

    Raises:
        HloError: there is no ``HloModule`` header or no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    devices = 1
    current: Computation | None = None
    # A Pallas kernel's metadata is printed on lines of its own, which are none of the module's.
    for line in _METADATA.sub(r"kernel_metadata={\1}", text).splitlines():
        if current is None:
            if line.startswith("HloModule "):
                name = line.split()[1].rstrip(",")
                for count in re.findall(r", (?:num_partitions|replica_count)=(\d+)", line):
                    devices *= int(count)
            elif line.endswith("{") and (match := _COMPUTATION.match(line)):
                current = computations[match[2]] = Computation(match[2])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            root, inst, shape, opcode, rest = match.groups()
            current.instructions.append(Instruction(inst, opcode, shape, rest, bool(root)))
    if name is None or entry is None:
        raise HloError("this is not HLO text: it has no 'HloModule' line or no ENTRY computation")
    return Module(name, devices, computations, entry)


def parse_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Replica groups in any printed form: ``{{0,1},{2,3}}``, ``{}`` (all in one), iota
    ``[8,16]<=[128]`` or ``[8,16]<=[16,8]T(1,0)``; source-target pairs read the same way.

    Raises:
        HloError: another form.
    """
    text = text.strip()
    if match := _IOTA.fullmatch(text):
        shape, dims = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose(tuple(map(int, match[3].split(","))))
        return tuple(map(tuple, ids.reshape(shape[0], -1).tolist()))
    if text in ("{}", "{{}}"):
        return (tuple(range(devices)),)
    if re.fullmatch(r"\{\{[\d,{} ]*\}\}", text):
        return tuple(
            tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d, ]+)\}", text)
        )
    raise HloError(f"unknown form of replica groups: {text[:80]!r}")
