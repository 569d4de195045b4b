"""Kinds of devices: where a mesh lies on them, how to compile for them, what they do themselves.

A backend is a folder here with a ``BACKEND`` (``neocc.backends.base.Backend``), or an entry point
of the group ``neocc.backends`` in another package that names one. docs/backends.md tells how.
"""

from __future__ import annotations

import copy
import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from neocc.cost.hardware import Chip, HardwareError, chip_of_row, known_name, table_row
from neocc.cost.hardware import device_chip as device_of_table
from neocc.ir.errors import NeoccError

if TYPE_CHECKING:  # JAX takes a second to import, which finding a chip need not wait for
    from neocc.backends.base import Backend

BUILT_IN = ("tpu", "gpu", "cpu")
GROUP = "neocc.backends"


def backend(kind: str) -> Backend:
    """The backend of a kind of chip (``Chip.kind``).

    Raises:
        NeoccError: there is none, or it cannot be loaded.
    """
    if kind in BUILT_IN:
        return importlib.import_module(f"neocc.backends.{kind}").BACKEND
    found = {b.kind: b for b in others()}
    if kind not in found:
        known = ", ".join((*BUILT_IN, *found))
        raise NeoccError(f"there is no backend for chips of kind {kind!r}; there are {known}")
    return found[kind]


def others() -> list[Backend]:
    """The backends that other packages add, by the names of their entry points.

    Raises:
        NeoccError: one cannot be loaded, is no backend, or is of a kind that another has.
    """
    from neocc.backends.base import Backend

    found: dict[str, Backend] = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: e.name):
        try:
            made = entry.load()
        except Exception as error:
            raise NeoccError(
                f"the backend {entry.name} ({entry.value}) does not load: {error}"
            ) from error
        if not isinstance(made, Backend):
            raise NeoccError(f"{entry.value}, the backend {entry.name}, is a {type(made).__name__}")
        if made.kind in BUILT_IN or made.kind in found:
            raise NeoccError(f"the backend {entry.name} is of kind {made.kind!r}, which is taken")
        found[made.kind] = made
    return list(found.values())


def row(name: str) -> tuple[str, dict[str, Any]]:
    """A chip's name, behind its aliases, and its row: of neocc's table, or of another package's
    backend.

    Raises:
        HardwareError: no such chip; names the nearest ones and all that are known.
        NeoccError: another package's backend does not load.
    """
    try:
        return known_name(name), table_row(name)
    except HardwareError as error:
        rows = {key: found for b in others() for key, found in b.rows.items()}
        if name in rows:
            return name, copy.deepcopy(dict(rows[name]))
        raise HardwareError(", ".join((str(error), *rows))) from None


def chip(name: str) -> Chip:
    """The chip called ``name``. Raises as ``row``."""
    return chip_of_row(*row(name))


def device_chip(device_kind: str) -> str:
    """The name of the chip that JAX calls ``device_kind`` (``NVIDIA H100 80GB HBM3``: h100).

    Raises:
        HardwareError: no backend knows such a device.
        NeoccError: another package's backend does not load.
    """
    try:
        return device_of_table(device_kind)
    except HardwareError:
        names = {key: name for b in others() for key, name in b.device_kinds.items()}
        if device_kind in names:
            return names[device_kind]
        raise
