"""A ring of devices as a Pallas kernel sees it: its neighbours, and when they may be sent to.

A remote DMA writes into another device's memory whether or not that is ready, so two rules hold:

- no device sends before both its neighbours are in the kernel (``enter``);
- a buffer that is used again is sent to only after its owner has said that it is free. ``Slots``
  are two such buffers for each way round, so that one fills while the other is read.

After https://docs.jax.dev/en/latest/pallas/tpu/distributed.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neocc.cost.algorithms import steps
from neocc.lower.collectives.group import Group


@dataclass(frozen=True)
class Way:
    """One of the ways round a ring: ``by`` 1 forward or -1 backward, in ``steps`` steps."""

    number: int
    by: int
    steps: int


def ways_round(size: int, ways: int) -> tuple[Way, ...]:
    """The ways that have a step to go."""
    ahead, back = steps(size, ways)
    return tuple(w for w in (Way(0, 1, ahead), Way(1, -1, back)) if w.steps)


@dataclass(frozen=True)
class Ring:
    """A group in a kernel. ``here``: this device's place in it."""

    group: Group
    here: Any

    def place(self, by: int) -> Any:
        """The place ``by`` places on, round the ring."""
        n = self.group.size
        return lax.rem(self.here + by % n, n)

    def device(self, by: int) -> dict[str | tuple[str, ...], Any]:
        """Which device that is. On the mesh's other axes it is where this one is."""
        own = lax.axis_index(self.group.axis)
        return {self.group.axis: own + (self.place(by) - self.here) * self.group.stride}


def enter(group: Group) -> Ring:
    """To be called first: waits until both neighbours are in the kernel too."""
    ring = Ring(group, group.index())
    barrier = pltpu.get_barrier_semaphore()
    for by in (1, -1):
        pl.semaphore_signal(barrier, 1, device_id=ring.device(by))
    pl.semaphore_wait(barrier, 2)
    return ring


@dataclass(frozen=True)
class Slots:
    """Two buffers for each way round, ``land[way, 2, ...]``, that the neighbours send into.

    Message ``t`` of a way (from 1) lies in slot ``t % 2``. The device that owns it sends it on as
    its message ``t + 1``, and when that has left tells the sender that the slot is free. ``first``:
    the first message that lies in a slot: 1, or 0 where a device starts from slot 0 and not from
    elsewhere. Semaphores: ``sent`` and ``came`` [ways, 2], ``free`` [ways].
    """

    ring: Ring
    land: Any
    sent: Any
    came: Any
    free: Any
    first: int = 1

    def slot(self, way: Way, t: int) -> Any:
        return self.land.at[way.number, t % 2]

    def copy(self, way: Way, t: int, source: Any) -> Any:
        w, s = way.number, t % 2
        return pltpu.make_async_remote_copy(
            source,
            self.slot(way, t),
            self.sent.at[w, s],
            self.came.at[w, s],
            device_id=self.ring.device(way.by),
        )

    def send(self, way: Way, t: int, source: Any = None) -> None:
        """Starts message ``t``; without a ``source``, what lies in the slot of the one before."""
        if t - 2 >= self.first:  # which lay where this one goes
            pl.semaphore_wait(self.free.at[way.number], 1)
        self.copy(way, t, self.slot(way, t - 1) if source is None else source).start()

    def leave(self, way: Way, t: int) -> None:
        """Waits until message ``t`` has left. Where it came from a slot, nothing may read that any
        more: it is free for message ``t + 1``, if there is one."""
        self.copy(way, t, self.slot(way, t - 1)).wait_send()
        if t - 1 >= self.first and t + 1 <= way.steps:
            pl.semaphore_signal(self.free.at[way.number], 1, device_id=self.ring.device(-way.by))

    def receive(self, way: Way, t: int) -> Any:
        """Message ``t``, when it has come."""
        self.copy(way, t, self.slot(way, t - 1)).wait_recv()
        return self.slot(way, t)


def semaphores() -> list[Any]:
    """Scratch of ``Slots``: sent, came, free."""
    pairs = pltpu.SemaphoreType.DMA((2, 2))
    return [pairs, pairs, pltpu.SemaphoreType.REGULAR((2,))]


def rounds(ways: tuple[Way, ...]) -> Iterator[tuple[int, list[Way]]]:
    """Each step with the ways that have it."""
    for t in range(1, max((w.steps for w in ways), default=0) + 1):
        yield t, [w for w in ways if t <= w.steps]
