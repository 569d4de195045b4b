"""What the ring of fused attention sends, and the seconds in which it waits for that.

A turn takes the longer of its products and of what is sent behind them, as a step of a collective
product does (``cost.products``); the permutes that bring operands and results into zig-zag order
and back are waited for. As no device has measured them, all take ``PREMIUM`` times what their bytes
over the busiest wire do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from neocc.cost.choice import PREMIUM
from neocc.cost.rounds import permute_seconds
from neocc.cost.topology import AxisLink
from neocc.ir.ops.attention_ring import Pairs, Sent


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


def sent_seconds(s: Sent, link: AxisLink) -> float:
    """Of one permute; where another is sent at once the other way, half of what both take."""
    both = PREMIUM * permute_seconds((*s.pairs, *s.beside), s.bytes, link)
    return both / 2 if s.beside else both


def ring_time(
    compute: float, computed: tuple[int, ...], sends: Iterable[Sent], link: AxisLink, beside: bool
) -> RingTime:
    """``computed``: tiles of each turn, which share the ``compute``; ``beside``: whether the chip
    runs permutes behind products."""
    sends = tuple(sends)
    seconds = {s: sent_seconds(s, link) for s in sends}
    total = max(1, sum(computed))
    hidden = dict.fromkeys(sends, 0.0)
    for turn, tiles in enumerate(computed if beside else ()):
        here = [s for s in sends if turn in s.turns]
        sending = sum(seconds[s] for s in here)
        fits = min(1.0, compute * tiles / total / sending) if sending else 0.0
        for s in here:
            hidden[s] += fits * seconds[s]
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
