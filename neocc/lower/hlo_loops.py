"""Trip counts of HLO ``while`` loops.

A trip count is the compiler's ``known_trip_count`` where it prints one (GPU, CPU). The TPU's text
has none, so it is worked out: the condition compares a counter with a constant, the body adds a
constant to the counter, the loop's operand holds the first value. Constants are followed through
copies, fusions and the state of enclosing loops, where XLA hoists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neocc.lower.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_COPIES = frozenset(
    ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")
)
_MIRROR = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclass(frozen=True, slots=True)
class Affine:
    """Element ``index`` of a loop's state plus ``offset``; where index is None, a constant."""

    index: int | None
    offset: int


Scalars = Sequence["Affine | None"]


class Constants:
    """Scalar values known in each computation. Loops are to be asked for from the outside in."""

    def __init__(self, module: Module) -> None:
        self._computations: Mapping[str, Computation] = module.computations
        self._state: dict[str, dict[int, Affine]] = {}

    def trip_count(self, comp: Computation, loop: Instruction) -> int | None:
        """How often the body of ``loop``, an instruction of ``comp``, runs; None if not known."""
        body = self._computations[loop.called("body")[0]]
        condition = self._computations[loop.called("condition")[0]]
        self._state[body.name] = self._state[condition.name] = self._invariants(comp, loop, body)
        if match := _KNOWN.search(loop.rest):
            return int(match[1])
        compared = self._comparison(condition, condition.root, None)
        if compared is None:
            return None
        counter, direction, limit = compared
        assert counter.index is not None
        first = self._element(comp, loop.operands[0], counter.index, None)
        last = self._element(body, body.root.name, counter.index, None)
        if first is None or first.index is not None or last is None or last.index != counter.index:
            return None
        return _count(first.offset + counter.offset, limit, last.offset, direction)

    def _invariants(
        self, comp: Computation, loop: Instruction, body: Computation
    ) -> dict[int, Affine]:
        """The elements of the loop's state that keep a known first value."""
        found = {}
        for i, array in enumerate(loop.arrays):
            if array.shape or array.dtype[0] not in "su":
                continue
            first = self._element(comp, loop.operands[0], i, None)
            if first is None or first.index is not None:
                continue
            if self._element(body, body.root.name, i, None) == Affine(i, 0):
                found[i] = first
        return found

    def _value(self, comp: Computation, name: str, args: Scalars | None) -> Affine | None:
        """A scalar of ``comp``; ``args`` are its parameters' values where it is a fusion."""
        inst = comp.by_name[name]
        op = inst.opcode
        if op == "constant":
            return Affine(None, int(inst.argument)) if _is_int(inst.argument) else None
        if op == "parameter":
            return args[int(inst.argument)] if args is not None else None
        if op in _COPIES:
            return self._value(comp, inst.operands[0], args)
        if op == "get-tuple-element":
            return self._element(comp, inst.operands[0], inst.integers("index")[0], args)
        if op in ("add", "subtract"):
            left, right = (self._value(comp, operand, args) for operand in inst.operands)
            return _sum(left, right, 1 if op == "add" else -1)
        if op == "fusion":
            inner, values = self._enter(comp, inst, args)
            return self._value(inner, inner.root.name, values)
        return None

    def _element(
        self, comp: Computation, name: str, index: int, args: Scalars | None
    ) -> Affine | None:
        """Element ``index`` of a tuple of ``comp``."""
        inst = comp.by_name[name]
        op = inst.opcode
        if op == "parameter" and args is None:
            return self._state.get(comp.name, {}).get(index, Affine(index, 0))
        if op == "tuple":
            return self._value(comp, inst.operands[index], args)
        if op in _COPIES:
            return self._element(comp, inst.operands[0], index, args)
        if op == "fusion":
            inner, values = self._enter(comp, inst, args)
            return self._element(inner, inner.root.name, index, values)
        if op == "while":
            body = self._computations[inst.called("body")[0]]
            if self._element(body, body.root.name, index, None) == Affine(index, 0):
                return self._element(comp, inst.operands[0], index, args)
        return None

    def _enter(
        self, comp: Computation, fusion: Instruction, args: Scalars | None
    ) -> tuple[Computation, Scalars]:
        inner = self._computations[fusion.called("calls")[0]]
        return inner, [
            self._value(comp, operand, args) if not _is_compound(comp, operand) else None
            for operand in fusion.operands
        ]

    def _comparison(
        self, comp: Computation, inst: Instruction, args: Scalars | None
    ) -> tuple[Affine, str, int] | None:
        """(counter, direction, limit) of a condition ``counter direction limit``."""
        if inst.opcode in _COPIES:
            return self._comparison(comp, comp.by_name[inst.operands[0]], args)
        if inst.opcode == "fusion":
            inner, values = self._enter(comp, inst, args)
            return self._comparison(inner, inner.root, values)
        direction = inst.attribute("direction")
        if inst.opcode != "compare" or direction not in _MIRROR:
            return None
        left, right = (self._value(comp, operand, args) for operand in inst.operands)
        if left is None or right is None:
            return None
        if left.index is None:
            left, right, direction = right, left, _MIRROR[direction]
        if left.index is None or right.index is not None:
            return None
        return left, direction, right.offset


def _is_compound(comp: Computation, name: str) -> bool:
    """Whether a value is anything but one scalar."""
    found = comp.by_name[name].arrays
    return len(found) != 1 or bool(found[0].shape)


def _is_int(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


def _sum(left: Affine | None, right: Affine | None, sign: int) -> Affine | None:
    if left is None or right is None or (right.index is not None and sign < 0):
        return None
    if left.index is not None and right.index is not None:
        return None
    index = left.index if left.index is not None else right.index
    return Affine(index, left.offset + sign * right.offset)


def _count(first: int, limit: int, step: int, direction: str) -> int | None:
    """Steps taken while ``first + n * step`` compares true with ``limit``; None if endless."""
    if direction == "NE":
        whole = step != 0 and (limit - first) % step == 0 and (limit - first) // step >= 0
        return (limit - first) // step if whole else None
    if direction in ("GT", "GE"):
        first, limit, step, direction = -first, -limit, -step, _MIRROR[direction]
    span = limit - first + (direction == "LE")
    if span <= 0:
        return 0
    return -(-span // step) if step > 0 else None
