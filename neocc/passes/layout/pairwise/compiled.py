"""Numba's compiler, or a message that says how to get it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neocc.ir.errors import NeoccError

try:
    import numba
except ImportError as error:
    raise NeoccError(
        "the pairwise solver's loops are compiled by numba, which is not installed: "
        "pip install 'neocc[solver]'"
    ) from error

# What the processor's wide instructions need; infinities and NaN stay as they are.
REORDER = {"reassoc", "contract", "arcp", "nsz"}


def njit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over arrays, once per machine: the result is kept beside the source."""
    return numba.njit(function, cache=True, nogil=True)


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `njit`, and the order of a sum is free."""
    return numba.njit(function, cache=True, nogil=True, fastmath=REORDER)
