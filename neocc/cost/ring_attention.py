"""What the ring of fused attention sends, and the seconds in which it waits for that.

Each permute that runs behind the products of a turn hides behind them as far as a hideable transfer
does; those that bring operands and results into zig-zag order and back are waited for. As no device
has measured them, all take ``PREMIUM`` times what their bytes over the busiest wire do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from neocc.cost.choice import PREMIUM
from neocc.cost.rounds import one_ring, rings_of
from neocc.cost.topology import AxisLink, Ring
from neocc.ir.ops.attention_ring import Pairs, Sent

BESIDE = frozenset({"v4", "v5p", "v6e"})
"""Chips whose compiler was seen to put products between the start and the end of a permute. v5e's
(libtpu 0.0.42) starts and ends each at once; of the others it is not known."""


@dataclass(frozen=True)
class Permute:
    """What a ring sends alike: (source, target) places, bytes, ``count`` times in one run of the
    op; seconds of one, and of them those that run behind the op's own products. ``moving``: round
    the ring, not to another order or home."""

    what: tuple[str, ...]
    pairs: Pairs
    bytes: int
    count: int
    seconds: float
    hidden: float
    moving: bool


@dataclass(frozen=True)
class RingTime:
    """One run of ring attention on one device. ``compute``: seconds of its products."""

    compute: float
    permutes: tuple[Permute, ...]

    @cached_property
    def sending(self) -> float:
        return sum(p.count * p.seconds for p in self.permutes)

    @cached_property
    def hidden(self) -> float:
        return sum(p.count * p.hidden for p in self.permutes)

    @property
    def exposed(self) -> float:
        """Seconds in which the device waits."""
        return self.sending - self.hidden


def permute_seconds(pairs: Pairs, bytes: int, link: AxisLink, beside: Pairs = ()) -> float:
    """Seconds of one permute along a mesh axis: the launch, the hops of its farthest message, and
    its bytes over the busiest wire. With another ``beside`` it, of as many bytes, half of what both
    take."""
    ring = one_ring(rings_of(link))
    load, hops = busiest((*pairs, *beside), ring)
    wires = hops * ring.latency + load * bytes / ring.bandwidth
    return PREMIUM * (link.overhead + wires / (2 if beside else 1))


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


def ring_time(
    compute: float, computed: tuple[int, ...], sends: Iterable[Sent], link: AxisLink, overlap: float
) -> RingTime:
    """``computed``: tiles of each turn, which share the ``compute``; ``overlap``: the share of a
    permute that can run behind a turn's products."""
    sends = tuple(sends)
    seconds = {s: permute_seconds(s.pairs, s.bytes, link, s.beside) for s in sends}
    total = max(1, sum(computed))
    hidden = dict.fromkeys(sends, 0.0)
    for turn, tiles in enumerate(computed):
        here = [s for s in sends if turn in s.turns]
        sending = overlap * sum(seconds[s] for s in here)
        fits = min(1.0, compute * tiles / total / sending) if sending else 0.0
        for s in here:
            hidden[s] += fits * overlap * seconds[s]
    alike: dict[tuple[Pairs, int, bool], list[Sent]] = defaultdict(list)
    for s in sends:
        alike[s.pairs, s.bytes, bool(s.turns)].append(s)
    return RingTime(
        compute,
        tuple(
            Permute(
                tuple(dict.fromkeys(s.what.rstrip("+") for s in same)),
                same[0].pairs,
                same[0].bytes,
                count := sum(s.times for s in same),
                seconds[same[0]],
                sum(hidden[s] for s in same) / count,
                bool(same[0].turns),
            )
            for same in alike.values()
        ),
    )
