"""What a compiled step costs a device, read off its HLO: the same figures whoever planned it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.tpu_score import CLOCK
from neocc.cost.collectives import collective_time
from neocc.cost.topology import Topology
from neocc.lower.hlo import Collective, axes_of, axes_of_pairs, read_hlo

COSTED = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "all-to-all": "all_to_all",
    "collective-permute": "permute",
}


@dataclass(frozen=True)
class Figures:
    """Of one device and one step. cycles: the TPU compiler's estimates, times loop trips, without
    collectives; compute: these in seconds; wires: seconds of the collectives by neocc's cost model,
    none hidden; sent: bytes that leave the device; collectives: how many run; kinds: bytes sent by
    kind; flops: of matrix products."""

    cycles: int
    flops: int
    compute: float
    wires: float
    sent: int
    collectives: int
    kinds: dict[str, int]

    @property
    def step(self) -> float:
        """Seconds with nothing hidden behind anything."""
        return self.compute + self.wires


def figures(text: str, laid: Topology) -> Figures:
    """``text``: optimised HLO for the mesh of ``laid``.

    Raises:
        HloError: the text has a form that is not known.
    """
    facts = read_hlo(text)
    kinds: dict[str, float] = {}
    for c in facts.collectives:
        kinds[c.kind] = kinds.get(c.kind, 0.0) + sent(c) * c.trip_count
    return Figures(
        cycles=facts.estimated_cycles,
        flops=facts.flops,
        compute=facts.estimated_cycles / CLOCK[laid.chip.name],
        wires=sum(seconds(c, laid) * c.trip_count for c in facts.collectives),
        sent=round(sum(kinds.values())),
        collectives=sum(c.trip_count for c in facts.collectives),
        kinds={k: round(n) for k, n in sorted(kinds.items())},
    )


def sent(c: Collective) -> float:
    """Bytes that a device sends in one run, by the algorithm that sends the fewest: of n devices
    that gather, each sends all but its own part of the result (as a ring does)."""
    if c.kind == "collective-permute":
        pairs = [pair for pair in c.groups if pair[0] != pair[1]]
        return c.operand_bytes * len(pairs) / max(len(c.groups), 1)
    n = max(map(len, c.groups), default=1)
    share = (n - 1) / n
    match c.kind:
        case "all-gather":
            return c.result_bytes * share
        case "all-reduce":
            return 2 * c.operand_bytes * share
        case _:
            return c.operand_bytes * share


def seconds(c: Collective, laid: Topology) -> float:
    """Of one run: axis after axis, as ``neocc.cost`` prices a collective on one axis. Groups that
    are part of an axis are priced as the whole of it."""
    axes = axes_of_pairs(c.groups, laid.mesh_sizes)
    if c.kind != "collective-permute":
        axes = axes_of(c.groups, laid.mesh_sizes) or axes
    if axes is None:
        axes = tuple(range(len(laid.mesh_sizes)))
    axes = tuple(a for a in axes if laid.mesh_sizes[a] > 1)
    full = max(c.operand_bytes, c.result_bytes)
    kind, total, links = COSTED[c.kind], 0.0, laid.links()
    for i, axis in enumerate(axes):
        # A gather begins with its last axis, of which the first has yet to bring the others' parts.
        rest = math.prod(laid.mesh_sizes[a] for a in axes[:i])
        share = full if kind in ("all_to_all", "permute") else full / rest
        total += collective_time(kind, share, links[axis])
    return total
