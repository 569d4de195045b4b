"""Collectives made of permutes, in a form that runs on any backend.

An ``Algorithm`` stands in for one kind of the plan's collectives on one mesh axis;
``ALGORITHMS`` has them by kind and name. What each sends, where it fits and what it costs is its
``formula`` (``neocc.cost.algorithms``). One that runs inside products is here without them.
``grids`` has the same over several mesh axes,
``quantised`` error feedback, ``products`` and ``attention`` the collectives that hide behind their
products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from neocc.cost.algorithms import FORMULAS, PRODUCTS, Formula
from neocc.lower.collectives import grids, quantised
from neocc.lower.collectives.buckets import all_reduce_together
from neocc.lower.collectives.group import Group, Groups, axis_groups, mesh_groups

__all__ = [
    "ALGORITHMS",
    "COMBINE",
    "Algorithm",
    "Group",
    "Groups",
    "Move",
    "all_reduce_together",
    "axis_groups",
    "mesh_groups",
]

COMBINE = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


@dataclass(frozen=True)
class Move:
    """What a collective does beside its kind: ``at``, the dim that it joins or cuts; ``to``, the
    dim that an all-to-all cuts (``at`` is the one that it joins); ``reduction``."""

    at: int = 0
    to: int = 0
    reduction: str = "sum"


Run = Callable[[Any, Groups, Move], Any]


@dataclass(frozen=True)
class Algorithm:
    """``run(x, groups, move)`` on every device of the groups, where their axes are bound."""

    formula: Formula
    run: Run

    def __call__(self, x: Any, axis: str, sizes: Sequence[int], move: Move) -> Any:
        """Runs it on one mesh axis as a grid of ``sizes``."""
        return self.run(x, axis_groups(axis, sizes), move)


def _gather(x: Any, groups: Groups, move: Move, ways: int, torus: bool) -> Any:
    return grids.all_gather(x, groups, move.at, ways, torus)


def _scatter(x: Any, groups: Groups, move: Move, ways: int, torus: bool) -> Any:
    return grids.reduce_scatter(x, groups, move.at, COMBINE[move.reduction], ways, torus)


def _reduce(x: Any, groups: Groups, move: Move, ways: int, torus: bool) -> Any:
    return grids.all_reduce(x, groups, COMBINE[move.reduction], ways, torus)


def _exchange(x: Any, groups: Groups, move: Move) -> Any:
    return grids.all_to_all(x, groups, move.to, move.at)


def _bucket(x: Any, groups: Groups, move: Move) -> Any:
    return all_reduce_together([x], groups, COMBINE[move.reduction])[0]


def _quantised(kind: str, name: str) -> Run:
    def run(x: Any, groups: Groups, move: Move) -> Any:
        (group,), form = groups, quantised.FORMATS[name]
        if kind == "all_reduce":
            return quantised.all_reduce(x, group, form)
        if kind == "all_gather":
            return quantised.all_gather(x, group, move.at, form)
        return quantised.reduce_scatter(x, group, move.at, form)

    return run


WAYS = {"ring": 1, "ring2": 2, PRODUCTS: 2, "dma": 2, "torus": 2, "hierarchical": 2}
GRIDS = {"all_gather": _gather, "reduce_scatter": _scatter, "all_reduce": _reduce}


def _implementation(kind: str, name: str) -> Run:
    if name in quantised.FORMATS:
        return _quantised(kind, name)
    if kind == "all_to_all":
        return _exchange
    if name == "bucketed":
        return _bucket
    return functools.partial(GRIDS[kind], ways=WAYS[name], torus=name == "torus")


ALGORITHMS = {key: Algorithm(f, _implementation(*key)) for key, f in FORMULAS.items()}
