"""How a model's weights lie in a checkpoint: one layer's at a time, whatever stacks them.

A *weight* is a parameter of one layer, ``h3.attn.q``, of all layers, ``h.attn.q``, or of the whole
model, ``wte``; its optimizer moments are ``h3.attn.q.m`` and ``.v``, with Adafactor ``.vr`` and
``.vc``. As a matrix it is [in, out], as a stack of them [n, in, out], as a vector [n], or [].
A form says in which tensor of a checkpoint each lies, and how; two forms of one model make a
conversion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from neocc.ir.errors import NeoccError
from neocc.ir.program import Program
from neocc.ir.types import Dim

LAYER = re.compile(r"h(\d*)\.(.+)")  # no number: of every layer
MOMENTS = ("m", "v", "vr", "vc")
SIDES = (".vr", ".vc")  # moments of a matrix's rows, and of its columns


@dataclass(frozen=True)
class Part:
    """Where a weight lies: the whole ``tensor``, or its row ``row`` of stacked layers, or its
    columns from ``column`` on; as it is, or ``transposed``: [out, in]."""

    tensor: str
    row: int | None = None
    column: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Form:
    """A checkpoint's tensors, in order, and the part of them that each weight is.

    shapes: of the tensors; weights: of each weight, its sides.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Part]
    weights: Mapping[str, tuple[int, ...]]
    held: Mapping[str, list[str]] = field(init=False)  # by tensor, its weights in order

    def __post_init__(self) -> None:
        held: dict[str, list[str]] = {name: [] for name in self.shapes}
        for weight, part in self.parts.items():
            held[part.tensor].append(weight)
        for weights in held.values():
            weights.sort(key=lambda w: (self.parts[w].row or 0, self.parts[w].column or 0))
        object.__setattr__(self, "held", held)

    def only(self, names: Iterable[str]) -> Form:
        """This form of the tensors named alone."""
        kept = set(names)
        parts = {w: p for w, p in self.parts.items() if p.tensor in kept}
        shapes = {n: s for n, s in self.shapes.items() if n in kept}
        return Form(shapes, parts, {w: self.weights[w] for w in parts})


class Tensor(Protocol):
    """A tensor of a checkpoint that is there to be read."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray: ...

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]: ...


def model_form(program: Program, sides: Mapping[str, tuple[int, ...]]) -> Form:
    """That of neocc's own checkpoints: the program's parameters and moments, layers stacked.

    ``sides``: by a weight's name within its layer, where its dims are parted: ``(1,)`` is a matrix
    whose ``in`` is one dim, ``(1, 2)`` a stack of such. A weight that it does not name is a vector.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    weights: dict[str, tuple[int, ...]] = {}
    stored = {i.name: (i.role, v.type) for i, v in program.named_inputs if i.role != "data"}
    kept = {n for n, (role, _) in stored.items() if role == "parameter" or is_moment(n, stored)}
    types = {n: type for n, (_, type) in stored.items() if n in kept}
    numbered = {n: layer for n in types if (layer := LAYER.fullmatch(n)) and layer[1]}
    periods = stack_periods({n: types[n].dims for n in numbered})
    for name, type in types.items():
        plain, moment = without_moment(name, types)
        layer = LAYER.fullmatch(plain)
        inner = layer[2] if layer else plain
        dims = type.shape[1:] if name in numbered else type.shape
        own = parted(dims, sides.get(inner, ()), moment in SIDES)
        shapes[name] = type.shape
        if layer is None or name not in numbered:
            parts[name], weights[name] = Part(name), own
            continue
        for row in range(type.shape[0]):
            number = int(layer[1]) + row * periods[type.dims[0].name]
            weight = f"h{number}.{inner}{moment}"
            parts[weight], weights[weight] = Part(name, row), own
    return Form(shapes, parts, weights)


def parted(dims: tuple[int, ...], at: tuple[int, ...], side: bool) -> tuple[int, ...]:
    """Sizes of what lies between the places ``at``; a ``side`` lacks the last of them."""
    at = at[:-1] if side else at
    if not dims and not at:
        return ()
    ends = zip((0, *at), (*at, len(dims)), strict=True)
    return tuple(math.prod(dims[a:b]) for a, b in ends)


def without_moment(name: str, names: Iterable[str]) -> tuple[str, str]:
    """``h0.attn.q.m`` as (``h0.attn.q``, ``.m``); a parameter as (itself, nothing)."""
    plain, _, end = name.rpartition(".")
    return (plain, f".{end}") if end in MOMENTS and plain in names else (name, "")


def is_moment(weight: str, weights: Iterable[str]) -> bool:
    """``h0.attn.q.v`` is one, ``h0.attn.v`` is not."""
    return without_moment(weight, weights)[1] != ""


def stack_periods(dims: Mapping[str, tuple[Dim, ...]]) -> dict[str, int]:
    """By the dim that layers are stacked along, how many layers one period has: ``h0.*`` and
    ``h1.*`` along one dim are layers 0, 2, 4 ... and 1, 3, 5 ..."""
    first: dict[str, set[str]] = {}
    for name, (stack, *_) in dims.items():
        first.setdefault(stack.name, set()).add(name.split(".")[0])
    return {stack: len(found) for stack, found in first.items()}


def as_weight(form: Form, weight: str, tensors: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """A weight out of a checkpoint, by rows: those of all arrays together are the weight."""
    part, shape = form.parts[weight], form.weights[weight]
    tensor = tensors[part.tensor]
    if part.row is not None:
        yield tensor.read(part.row, part.row + 1).reshape(shape)
    elif part.transposed:
        yield tensor.read().reshape(shape[::-1]).T
    elif part.column is not None:
        end = part.column + shape[-1]
        if len(shape) == 1:
            yield tensor.read(part.column, end)
            return
        for rows in tensor.chunks():
            yield rows[:, part.column : end]
    elif not shape:
        yield tensor.read().reshape(())
    else:
        for rows in tensor.chunks(0, form.shapes[part.tensor][0]):
            yield rows.reshape(-1, *shape[1:])


def as_tensor(
    to: Form, name: str, source: Form, tensors: Mapping[str, Tensor], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """A tensor of the form ``to``, made of the weights in a checkpoint of the form ``source``. A
    weight that is not there is zero."""

    def arrays(weight: str) -> Iterator[np.ndarray]:
        if weight in source.parts:
            return as_weight(source, weight, tensors)
        return iter([np.zeros(to.weights[weight], dtype)])

    held = to.held[name]
    if to.parts[held[0]].column is not None:
        yield np.concatenate([joined(arrays(w)) for w in held], axis=-1)
        return
    for weight in held:
        if to.parts[weight].transposed:
            yield joined(arrays(weight)).T
        else:
            yield from arrays(weight)


def joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
    found = list(arrays)
    return found[0] if len(found) == 1 else np.concatenate(found)


def check_tensors(
    where: str, of: str, form: Form, tensors: Mapping[str, Tensor], optional: Iterable[str] = ()
) -> None:
    """Whether a checkpoint has the tensors of a form, and no others.

    Raises:
        NeoccError: the first one that is missing, too many or of another shape, by name; ``of``
            says what they should be of.
    """
    missing = [n for n in form.shapes if n not in tensors and n not in set(optional)]
    others = sorted(n for n in tensors if n not in form.shapes)
    if missing:
        instead = f"; it has {others[0]!r}, which is none of its" if others else ""
        raise NeoccError(f"{where} has no tensor {missing[0]!r}, which {of} has{instead}")
    if others:
        raise NeoccError(f"tensor {others[0]!r} of {where} is none of {of}")
    for name, shape in form.shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise NeoccError(
                f"tensor {name!r} of {where} has the shape {list(tensors[name].shape)}; that of "
                f"{of} has {list(shape)}"
            )


def dtype_of(
    to: Form, name: str, source: Form, tensors: Mapping[str, Tensor], default: np.dtype
) -> np.dtype:
    """The dtype of a tensor of ``to``: that of the tensors which its weights come from.

    Raises:
        NeoccError: they have several.
    """
    found: dict[np.dtype, str] = {}
    for weight in to.held[name]:
        if weight in source.parts:
            tensor = source.parts[weight].tensor
            found.setdefault(tensors[tensor].dtype, tensor)
    if len(found) > 1:
        (a, first), (b, second), *_ = found.items()
        raise NeoccError(
            f"{name!r} would hold {first!r}, which is {a}, and {second!r}, which is {b}: give one "
            "dtype for all"
        )
    return next(iter(found), default)
