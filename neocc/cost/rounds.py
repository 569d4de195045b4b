"""What a collective made of permutes sends, round by round, and the seconds that this takes.

An algorithm's *grid* is the rings that it runs on, outermost first: a mesh axis as one ring of all
its devices, or as rings of the wires that it lies on. In a round each device sends at most a few
messages at once. Sources: rings as in https://jax-ml.github.io/scaling-book/sharding; loads of
wires by counting the messages that cross one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from neocc.cost.topology import AxisLink, Ring
from neocc.ir.ops.attention_ring import Pairs


@dataclass(frozen=True, slots=True)
class Message:
    """``bytes`` from every device to the one ``by`` places on along a ring of the grid, the last to
    the first; backwards where ``by`` is negative."""

    ring: int
    by: int
    bytes: int


Round = tuple[Message, ...]  # sent at once
Grid = tuple[Ring, ...]  # outermost first


def rounds_seconds(
    rounds: Iterable[Round], grid: Grid, overhead: float, shared: bool = False
) -> float:
    """Seconds of rounds, one after the other. Each pays the launch, the hops of its farthest
    message, and its bytes over the busiest wire. Rings are wires of their own, or, if ``shared``,
    pieces of one ring on the same wires."""
    return sum(overhead + _round(messages, grid, shared) for messages in rounds)


def _round(messages: Round, grid: Grid, shared: bool) -> float:
    latency = 0.0
    loads: list[tuple[float, float]] = []  # seconds of each ring's busiest wire, both ways
    for i, ring in enumerate(grid):
        here = [m for m in messages if m.ring == i]
        forward = backward = 0.0
        for message in here:
            ahead, back, hops = wires(message.by, ring)
            forward += ahead * message.bytes
            backward += back * message.bytes
            latency = max(latency, hops * ring.latency)
        loads.append((forward / ring.bandwidth, backward / ring.bandwidth))
    if shared:
        return max(map(sum, zip(*loads, strict=True))) + latency
    return max(map(max, loads)) + latency


def permute_seconds(pairs: Pairs, bytes: int, link: AxisLink) -> float:
    """Seconds of messages of so many bytes between (source, target) places of an axis, as one ring,
    sent at once: the launch, the hops of the farthest, and the bytes over the busiest wire."""
    ring = one_ring(rings_of(link))
    load, hops = busiest(pairs, ring)
    return link.overhead + hops * ring.latency + load * bytes / ring.bandwidth


def busiest(pairs: Pairs, ring: Ring) -> tuple[int, int]:
    """Messages on the busiest wire of a ring, in one direction, and hops of the farthest message;
    each goes the shorter way. A switch takes all that a device sends through one port."""
    if ring.switched:
        return 1, 1
    n, most = ring.size, 0
    loads: dict[tuple[int, int], int] = defaultdict(int)  # by place and direction
    for source, target in pairs:
        ahead = (target - source) % n
        up = 2 * ahead <= n if ring.wraps else target > source
        step = 1 if up else -1
        hops = (target - source) * step % n if ring.wraps else abs(target - source)
        most = max(most, hops)
        for i in range(hops):
            loads[(source + step * i) % n, step] += 1
    return max(loads.values(), default=0), most


def wires(by: int, ring: Ring) -> tuple[int, int, int]:
    """Copies of a message on the busiest wire forward and backward, when every device sends it
    ``by`` places on, and its hops.

    On a line ``n - k`` devices send ``k`` places up and the others ``n - k`` places down: the
    middle wire carries the smaller number of the two each way. A switch takes all that a device
    sends through one port.
    """
    n = ring.size
    k = by % n
    if k == 0:
        return 0, 0, 0
    if ring.switched:
        return 1, 0, 1
    if ring.wraps:
        ahead = k < n - k or (k == n - k and by > 0)
        return (k, 0, k) if ahead else (0, n - k, n - k)
    return min(k, n - k), min(k, n - k), max(k, n - k)


def one_ring(rings: Sequence[Ring]) -> Ring:
    """All devices of some rings in one, in order: as slow as the slowest of them, and a way round
    as long as theirs together."""
    if len(rings) == 1:
        return rings[0]
    size = math.prod(ring.size for ring in rings)
    switched = any(ring.switched for ring in rings)
    if switched:
        latency = max((1 if r.switched else r.size - 1) * r.latency for r in rings)
    else:
        latency = sum((r.size - 1) * r.latency for r in rings) / max(1, size - 1)
    return Ring(
        size,
        min(ring.bandwidth for ring in rings),
        latency,
        wraps=all(ring.wraps for ring in rings),
        switched=switched,
        nodes=any(ring.nodes for ring in rings),
    )


def rings_of(link: AxisLink) -> Grid:
    """Every ring that an axis lies on, in the order of its devices, outermost first."""
    return tuple(ring for level in reversed(link.levels) for ring in level.rings)


def cut(ring: Ring, sizes: Sequence[int]) -> Grid:
    """One ring as a grid of ``sizes``: the innermost joins neighbours, the others devices that lie
    ``stride`` apart and share the wires between them with the others of their kind."""
    grid: list[Ring] = []
    stride = 1
    for size in reversed(sizes):
        if ring.switched:
            part = replace(ring, size=size)
        else:
            closed = ring.wraps and stride * size == ring.size
            part = Ring(size, ring.bandwidth / stride, ring.latency * stride, closed)
        grid.append(part)
        stride *= size
    return tuple(reversed(grid))


def factors(size: int, count: int) -> tuple[int, ...]:
    """``size`` as a product of ``count`` factors, as equal as they can be, largest first."""
    if count == 1:
        return (size,)
    least = max(f for f in range(1, size + 1) if size % f == 0 and f**count <= size)
    return (*factors(size // least, count - 1), least)
