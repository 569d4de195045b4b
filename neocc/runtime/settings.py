"""What a command's arguments set in a model's config."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from neocc.ir.errors import NeoccError


def parse_settings(config: Any, texts: Iterable[str]) -> dict[str, Any]:
    """Fields of a config (a dataclass) from ``key=value`` texts: numbers, true, false, none,
    text, or a tuple as Python writes it.

    Raises:
        NeoccError: not of that form, no such field, or a value of another type.
    """
    if not dataclasses.is_dataclass(config):
        raise NeoccError("this model's config is not a dataclass: it has no fields to set")
    known = {f.name for f in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise NeoccError(f"setting {text!r} is not of the form key=value")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise NeoccError(f"setting {text!r}: the model's config has no field {name!r}; {hint}")
        found[name] = typed(text, value, hints[name])
    return found


def typed(text: str, value: str, hint: Any) -> Any:
    """The value as the field's type has it."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = [typing.get_origin(h) or h for h in (typing.get_args(hint) if union else (hint,))]
    read = literal(value)
    if str in allowed and not isinstance(read, str):
        return value
    if float in allowed and type(read) is int:
        return float(read)
    if any(type(read) is kind for kind in allowed):
        return read
    names = " or ".join("none" if kind is type(None) else kind.__name__ for kind in allowed)
    raise NeoccError(f"setting {text!r}: {value!r} is not of the type {names}")


def literal(value: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
