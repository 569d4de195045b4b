"""Errors that name the user's thing, what is wrong with it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loc:
    """A place in the user's source: the file and the line that made an op."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class NeoccError(Exception):
    """Base of every error that a user can cause; the CLI prints it and exits with 2."""

    def __init__(self, message: str, loc: Loc | None = None):
        self.message = message
        self.loc = loc
        super().__init__(f"{loc}: {message}" if loc else message)


class IRError(NeoccError):
    """A program breaks a rule of the IR."""


class LayoutError(NeoccError):
    """A mesh, a layout or a strategy is not legal."""
