"""Numbers that know how they were computed: the cost model, run on them, derives its own figures.

``traced`` gives a chip whose rates and latencies are such numbers. Every formula of
``neocc.cost`` is plain arithmetic, so what comes out of it bears the formula, down to the fields
of ``hardware.json``; nothing is written twice and nothing can drift. Of a ``max`` or ``min`` the
side that counts is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from neocc.cost.hardware import Chip
from neocc.cost.model import CostModel


@dataclass(frozen=True)
class Field:
    """A figure of a chip: its field in ``hardware.json``, and what is behind it."""

    path: str
    source: str


@dataclass(frozen=True)
class Calculation:
    """``sign`` between two numbers, either of them traced or plain."""

    sign: str
    left: float
    right: float


class Traced(float):
    """A float and where it comes from."""

    __slots__ = ("how",)
    how: Field | Calculation

    def __new__(cls, value: float, how: Field | Calculation) -> Traced:
        made = super().__new__(cls, value)
        made.how = how
        return made

    def __add__(self, other: float) -> Traced:
        return self if other == 0 else Traced(float(self) + other, Calculation("+", self, other))

    def __radd__(self, other: float) -> Traced:
        return self if other == 0 else Traced(other + float(self), Calculation("+", other, self))

    def __sub__(self, other: float) -> Traced:
        return self if other == 0 else Traced(float(self) - other, Calculation("-", self, other))

    def __rsub__(self, other: float) -> Traced:
        return Traced(other - float(self), Calculation("-", other, self))

    def __mul__(self, other: float) -> Traced:
        return self if other == 1 else Traced(float(self) * other, Calculation("x", self, other))

    def __rmul__(self, other: float) -> Traced:
        return self if other == 1 else Traced(other * float(self), Calculation("x", other, self))

    def __truediv__(self, other: float) -> Traced:
        return self if other == 1 else Traced(float(self) / other, Calculation("/", self, other))

    def __rtruediv__(self, other: float) -> Traced:
        return Traced(other / float(self), Calculation("/", other, self))

    def __repr__(self) -> str:
        return float.__repr__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Traced, (float(self), self.how))


def traced(chip: Chip) -> Chip:
    """The chip with every float that costs come from traced to its field."""

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, float):
            return Traced(value, Field(path, source(chip, path)))
        if isinstance(value, Mapping):
            return {k: walk(v, f"{path}.{k}") for k, v in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            inner = {
                f.name: walk(getattr(value, f.name), join(path, f.name)) for f in fields(value)
            }
            return replace(value, **inner)
        return value

    def join(path: str, name: str) -> str:
        # The table calls a group of devices that reach each other directly by what it is.
        if not path and name == "switch":
            name = "nvlink" if chip.kind == "gpu" else "die" if chip.kind == "tpu" else "host"
        return f"{path}.{name}" if path else name

    costs = ("sources", "assumptions", "calibration")
    inner = {
        f.name: walk(getattr(chip, f.name), join("", f.name))
        for f in fields(chip)
        if f.name not in costs
    }
    return replace(chip, **inner)


def source(chip: Chip, path: str) -> str:
    """What is behind a field: the table's word on it, or on what it belongs to; else the chip's
    sources."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        word = chip.assumptions.get(".".join(parts[:n]))
        if word:
            return f"assumed: {word}"
    return "; ".join(s for s in chip.sources if s.startswith("http")) or "; ".join(chip.sources)


def traced_cost(cost: CostModel) -> CostModel:
    """A cost model that gives the same seconds, each with its derivation."""
    chip = traced(cost.chip)
    own = {
        f.name: Traced(value, Field(f.name, "assumed by the cost model"))
        for f in fields(cost)
        if isinstance(value := getattr(cost, f.name), float)
    }
    return replace(cost, chip=chip, topology=replace(cost.topology, chip=chip), **own)


def chip_fields(value: float) -> dict[Field, float]:
    """The figures of the chip that a number came from, each once."""
    found: dict[Field, float] = {}
    seen: set[int] = set()
    stack = [value]  # a sum over a program is deeper than Python recurses
    while stack:
        one = stack.pop()
        if isinstance(one, Traced) and id(one) not in seen:
            seen.add(id(one))
            if isinstance(one.how, Field):
                found[one.how] = float(one)
            else:
                stack += (one.how.right, one.how.left)
    return found


BINDS = {"+": 1, "-": 1, "x": 2, "/": 2}


def formula(value: float, names: bool = True) -> str:
    """The calculation as text, with the names of the chip's fields or with their numbers."""
    return text(value, names, 0)


def text(value: float, names: bool, inside: int) -> str:
    if not isinstance(value, Traced):
        return number(value)
    if isinstance(value.how, Field):
        return value.how.path if names else number(value)
    sign = value.how.sign
    binds = BINDS[sign]
    left = text(value.how.left, names, binds)
    right = text(value.how.right, names, binds + (sign in "-/"))
    words = f"{left} {sign} {right}"
    return f"({words})" if binds < inside else words


def number(value: float) -> str:
    """``1,048,576``, ``8.2e+11``, ``0.9``: exact where that is short."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}" if abs(value) < 1e9 else f"{value:.6g}"
    return f"{value:.6g}"


def evaluate(value: float) -> float:
    """A number worked out again from the leaves of its derivation."""
    if not isinstance(value, Traced) or isinstance(value.how, Field):
        return float(value)
    left, right = evaluate(value.how.left), evaluate(value.how.right)
    match value.how.sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "x":
            return left * right
        case _:
            return left / right
