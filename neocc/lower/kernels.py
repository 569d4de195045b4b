"""Kernels of a backend's own: those that the ops of a plan run as, and those of the program."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neocc.cost.rounds import Round
from neocc.ir.mesh import Mesh
from neocc.ir.program import Op
from neocc.lower.hlo import Kernel, Message
from neocc.passes.partition import Partitioned
from neocc.passes.plan import bodies


@dataclass(frozen=True)
class Call:
    """A kernel that one run of an op is: its name, bytes of each operand and result on a device,
    all that it sends to others, and FLOPs of matrix products, which HLO does not show."""

    name: str
    operand_bytes: tuple[int, ...]
    result_bytes: tuple[int, ...]
    sent: tuple[Message, ...] = ()
    flops: int = 0
    others: bool = False  # it has operands and results of its own beside these


Calls = Callable[[Op, Mesh], Sequence[Call]]


@dataclass(frozen=True)
class Ran:
    """An op that runs as kernels, or has some in the program: ``as_planned`` if those are the ones
    that it runs as, each as often as the op. ``flops``: of a step, planned."""

    id: int
    kind: str
    kernels: tuple[Kernel, ...]
    as_planned: bool
    flops: int


def ran(
    partitioned: Partitioned, calls: Calls, kernels: Mapping[Kernel, Sequence[int]]
) -> Iterator[Ran]:
    """Every op of a program with kernels in the plan or in the compiled program. ``kernels``: of
    the latter, with the op's id where there is one."""
    by_id: dict[int, list[Kernel]] = defaultdict(list)
    for k, ids in kernels.items():
        for i in ids:
            by_id[i].append(k)
    for body in bodies(partitioned.program.body):
        for op in body.region.ops:
            i = op.attrs["id"]
            wanted = Counter(calls(op, partitioned.mesh))
            if wanted or by_id[i]:
                runs = {c: sum(k.trip_count for k in by_id[i] if fits(c, k)) for c in wanted}
                known = all(any(fits(c, k) for c in wanted) for k in by_id[i])
                right = all(runs[c] == count * body.trips for c, count in wanted.items())
                flops = sum(c.flops * count for c, count in wanted.items()) * body.trips
                yield Ran(i, op.kind, tuple(by_id[i]), known and right, flops)


def fits(c: Call, k: Kernel) -> bool:
    """Whether a kernel of the program is that of the plan."""
    if c.name != k.name or Counter(c.sent) != Counter(k.sent or ()):
        return False
    if c.others:
        into, out = Counter(k.operand_bytes), Counter(k.result_bytes)
        return Counter(c.operand_bytes) <= into and Counter(c.result_bytes) <= out
    return (c.operand_bytes, c.result_bytes) == (k.operand_bytes, k.result_bytes)


def messages(
    rounds: Iterable[Round], grid: Sequence[int], mesh: Mesh, axis: str
) -> Iterator[Message]:
    """What the rounds of an algorithm send, on a mesh axis as a grid of rings."""
    before = np.prod(mesh.sizes[: mesh.index(axis)], dtype=int)
    devices = np.arange(mesh.size).reshape(before, *grid, -1)
    for m in (m for sent in rounds for m in sent):
        targets = np.roll(devices, -m.by, axis=1 + m.ring).ravel().tolist()
        yield Message(frozenset(zip(devices.ravel().tolist(), targets, strict=True)), m.bytes)
