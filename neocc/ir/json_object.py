"""JSON files of users: an object each, or an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neocc.ir.errors import NeoccError


def read_object(path: Path, error: Callable[[str], Exception] = NeoccError) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        error: the file cannot be read, is not JSON, says a thing twice, or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=each_once)
    except OSError as why:
        raise error(f"cannot read {path}: {why.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not a text file") from None
    except ValueError as why:
        raise error(f"{path} is not JSON: {why}") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds no JSON object")
    return found


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one that says a thing twice says nothing."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return found
