"""Explicit collectives: apply an assignment, verify it, run it on virtual devices."""

from __future__ import annotations

from neocc.passes.partition.apply import Partitioned, Ways, apply
from neocc.passes.partition.simulate import simulate
from neocc.passes.partition.verify import erase, first_difference, verify_partitioned

__all__ = [
    "Partitioned",
    "Ways",
    "apply",
    "erase",
    "first_difference",
    "simulate",
    "verify_partitioned",
]
