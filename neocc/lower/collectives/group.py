"""Devices that talk to each other: a mesh axis, or every so-many-th device of it, as a ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax


@dataclass(frozen=True, slots=True)
class Group:
    """The devices along mesh axis ``axis`` (of ``total``) in rings of ``size``, ``stride`` apart.

    To be used where the axis is bound: under ``shard_map``, or ``vmap`` with ``axis_name``.
    """

    axis: str
    total: int
    size: int
    stride: int = 1

    def index(self) -> Any:
        """This device's place in its ring: i32."""
        return lax.axis_index(self.axis) // self.stride % self.size

    def shift(self, x: Any, by: int) -> Any:
        """What the device ``by`` places back sent: each sends ``x`` so far on, round the ring."""
        return self.send(x, [(i, (i + by) % self.size) for i in range(self.size)])

    def send(self, x: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        """One permute by (source, target) places; zeros where no one sends."""
        moves = []
        for device in range(self.total):
            place = device // self.stride % self.size
            moves += [(device, device + (t - s) * self.stride) for s, t in pairs if s == place]
        return lax.ppermute(x, self.axis, moves)


Groups = tuple[Group, ...]  # outermost first: the place of a device counts in this order


def axis_groups(axis: str, sizes: Sequence[int]) -> Groups:
    """An axis of ``prod(sizes)`` devices as a grid of rings, outermost first."""
    total = math.prod(sizes)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return tuple(Group(axis, total, n, s) for n, s in zip(sizes, strides, strict=True))


def mesh_groups(axes: Sequence[tuple[str, int]]) -> Groups:
    """Whole mesh axes as the rings of a grid, outermost first."""
    return tuple(Group(name, size, size) for name, size in axes)
