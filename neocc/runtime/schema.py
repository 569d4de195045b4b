"""Checks a document against a JSON Schema: the few words of it that neocc's own schemas use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from neocc.ir.errors import NeoccError

KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
WORDS = {"object": "an object", "array": "a list", "integer": "an integer", "null": "null"}


@cache
def schema(name: str) -> dict[str, Any]:
    """The schema that ships as ``neocc/runtime/NAME.schema.json``."""
    return json.loads(resources.files("neocc.runtime").joinpath(f"{name}.schema.json").read_text())


def check(value: Any, rule: Mapping[str, Any], where: str = "") -> None:
    """Checks ``type``, ``enum``, ``const``, ``minimum``, ``required``, ``properties``,
    ``additionalProperties`` and ``items``.

    Raises:
        NeoccError: the first place that breaks the rule, what is there and what should be.
    """
    place = where or "the document"
    kinds = rule.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if kinds and not any(is_a(value, kind) for kind in kinds):
        wanted = " or ".join(WORDS.get(k, f"a {k}") for k in kinds)
        raise NeoccError(f"{place} is {shown(value)}; it must be {wanted}")
    if "const" in rule and value != rule["const"]:
        raise NeoccError(f"{place} is {shown(value)}; it must be {shown(rule['const'])}")
    if "enum" in rule and value not in rule["enum"]:
        known = ", ".join(map(shown, rule["enum"]))
        raise NeoccError(f"{place} is {shown(value)}; it must be one of {known}")
    if "minimum" in rule and is_a(value, "number") and value < rule["minimum"]:
        raise NeoccError(f"{place} is {shown(value)}; it must be at least {rule['minimum']}")
    if isinstance(value, dict):
        check_object(value, rule, where)
    if isinstance(value, list) and "items" in rule:
        for i, item in enumerate(value):
            check(item, rule["items"], f"{where}[{i}]")


def check_object(value: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> None:
    place = where or "the document"
    for name in rule.get("required", ()):
        if name not in value:
            raise NeoccError(f"{place} has no {name!r}")
    known = rule.get("properties", {})
    others = rule.get("additionalProperties", True)
    for name, inner in value.items():
        inside = f"{where}.{name}" if where else name
        if name in known:
            check(inner, known[name], inside)
        elif others is False:
            raise NeoccError(f"{place} has {name!r}, which means nothing here")
        elif isinstance(others, Mapping):
            check(inner, others, inside)


def is_a(value: Any, kind: str) -> bool:
    # True is an int in Python, and a boolean in JSON.
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
