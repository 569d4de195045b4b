"""Layouts and strategies as a person writes them: ``batch:x, mlp:y``.

Each part is what an axis does, then the axis: a dim that it cuts, ``+sum`` (or ``+max``, ``+min``)
where a layout is partial on it, ``+0+1`` where a strategy passes partial sums of operands 0 and 1
on. Axes that are not named do nothing; the empty text is "whole on every device". ``on host`` ends
a layout that lies in the hosts' memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Choice, Layout, Mesh, Partial, Placement, Strategy, Through
from neocc.ir.types import NAME

ARROW = "->"
ON_HOST = "on host"


def cuts_text(axes: Iterable[Choice | Placement], mesh: Mesh) -> str:
    """The text of a layout's or strategy's ``axes``, in mesh order."""
    named = zip(mesh.names, axes, strict=True)
    return ", ".join(f"{what}:{axis}" for axis, what in named if what is not None)


def layout_text(layout: Layout, mesh: Mesh) -> str:
    cuts = cuts_text(layout.axes, mesh)
    return f"{cuts} {ON_HOST}".strip() if layout.host else cuts


def move_text(source: Layout, target: Layout, mesh: Mesh) -> str:
    """``embd:x, mlp:y -> mlp:y``."""
    return f"{layout_text(source, mesh)} {ARROW} {layout_text(target, mesh)}".strip()


def parts_of(text: str, mesh: Mesh) -> dict[int, str]:
    """What each mesh axis is said to do, by its index; an axis of size 1 does nothing.

    Raises:
        LayoutError: a part is not ``dim:axis``, or names no axis of the mesh, or one twice.
    """
    found: dict[int, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        what, colon, axis = (p.strip() for p in part.partition(":"))
        if not (what and colon and axis):
            raise LayoutError(f"{part!r} is not of the form dim:axis")
        index = mesh.index(axis)
        if index in found:
            raise LayoutError(
                f"{text!r} has the axis {axis!r} do two things; one axis cuts one dim of a tensor"
            )
        found[index] = what
    return {index: what for index, what in found.items() if mesh.sizes[index] > 1}


def parse_layout_text(text: str, mesh: Mesh) -> Layout:
    """The layout that ``layout_text`` prints.

    Raises:
        LayoutError: another form.
    """

    def placement(what: str) -> Placement:
        if what in ("+sum", "+max", "+min"):
            return Partial(what[1:])
        if NAME.match(what):
            return what
        raise LayoutError(f"{what!r} is neither a dim nor +sum, +max or +min")

    cuts = text.strip().removesuffix(ON_HOST)
    parts = parts_of(cuts, mesh)
    places = tuple(placement(parts[i]) if i in parts else None for i in range(len(mesh)))
    return Layout(places, cuts != text.strip())


def parse_strategy_text(text: str, mesh: Mesh) -> Strategy:
    """The strategy that ``cuts_text`` prints.

    Raises:
        LayoutError: another form.
    """

    def choice(what: str) -> Choice:
        if re.fullmatch(r"(\+\d+)+", what):
            return Through(frozenset(map(int, what[1:].split("+"))))
        if NAME.match(what):
            return what
        raise LayoutError(f"{what!r} is neither a dim nor, for partial sums passed on, like +0+1")

    parts = parts_of(text, mesh)
    return Strategy(tuple(choice(parts[i]) if i in parts else None for i in range(len(mesh))))


def parse_move_text(text: str, mesh: Mesh) -> tuple[Layout, Layout]:
    """The two layouts that ``move_text`` prints.

    Raises:
        LayoutError: another form.
    """
    before, arrow, after = text.partition(ARROW)
    if not arrow:
        raise LayoutError(f"{text!r} is no move; one is like 'embd:x, mlp:y -> mlp:y'")
    return parse_layout_text(before, mesh), parse_layout_text(after, mesh)
