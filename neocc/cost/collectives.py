"""Seconds that a collective takes on one mesh axis.

Alpha-beta: a launch, a latency for each step, and the bytes through the slowest level at its
bandwidth. Sources: the ring formulas of https://jax-ml.github.io/scaling-book/sharding and
https://jax-ml.github.io/scaling-book/gpus; that book takes the larger of latency and transfer, here
they add, so that time always grows with bytes.

On an axis of several levels a gather sends over the slow level only what the fast one does not
already hold (each device of a node brings its own part of the other nodes' data), and chunks
flow through the levels at once: the slowest level sets the pace, the latencies add.

Between GPU nodes NCCL lays one ring through all devices, so a gather takes a step for each of them,
at the pace of the slowest hop: at a thousand GPUs that is 14 ms, whatever the bytes (arXiv
2205.00119 measures how gathers slow down with the number of devices). An all-reduce may go up and
down trees instead, whose latency grows with the logarithm of the nodes (NCCL 2.4,
https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4).
"""

from __future__ import annotations

import math

from neocc.cost.topology import AxisLink, Level, Ring

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")


def collective_time(kind: str, full_bytes: float, link: AxisLink) -> float:
    """Seconds of one collective over the devices of one mesh axis.

    ``full_bytes`` is what one device holds, before or after, whichever is larger:

    - ``all_gather``: the gathered result;
    - ``reduce_scatter``: the unreduced operand;
    - ``all_reduce``: the operand (as large as the result);
    - ``all_to_all``: the operand (as large as the result);
    - ``permute``: the operand, which each device sends to the next along the axis, the last to
      the first.

    No time passes on an axis of size 1.

    Raises:
        ValueError: a kind that is not among ``KINDS``, or negative bytes.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown collective {kind!r}; known: {', '.join(KINDS)}")
    if full_bytes < 0:
        raise ValueError(f"{kind} of {full_bytes} bytes; bytes cannot be negative")
    if link.size == 1:
        return 0.0
    match kind:
        case "all_gather" | "reduce_scatter":
            seconds = _gather(full_bytes, link)
        case "all_reduce":  # a reduce-scatter, then an all-gather
            seconds = 2 * min(_gather(full_bytes, link), _tree(full_bytes, link))
        case "all_to_all":
            seconds = _exchange(full_bytes, link)
        case _:
            seconds = _shift(full_bytes, link)
    return link.overhead + seconds


def _gather(full: float, link: AxisLink) -> float:
    if any(ring.nodes for level in link.levels for ring in level.rings):
        latency = (link.size - 1) * max(r.latency for level in link.levels for r in level.rings)
    else:
        latency = sum(level.latency for level in link.levels)
    return _transfer(full, link) + latency


def _transfer(full: float, link: AxisLink) -> float:
    transfer, inside = 0.0, 1
    for level in link.levels:
        transfer = max(transfer, _level_gather(full / inside, level))
        inside *= level.size
    return transfer


def _tree(full: float, link: AxisLink) -> float:
    """Half of an all-reduce over trees between nodes and chains within them."""
    latency = 0.0
    for level in link.levels:
        nodes = [ring for ring in level.rings if ring.nodes]
        trees = sum(math.ceil(math.log2(ring.size)) * ring.latency for ring in nodes)
        latency += trees if nodes else level.latency
    return _transfer(full, link) + latency


def _level_gather(full: float, level: Level) -> float:
    # Rings in both directions take size/2 steps of one shard each: all of `full`, since the
    # farthest shard does not split. In one direction a device takes in all but its own shard.
    taken = full if level.wraps else full * (level.size - 1) / level.size
    return taken / level.bandwidth


def _exchange(full: float, link: AxisLink) -> float:
    transfer = max(_ring_exchange(full, ring) for level in link.levels for ring in level.rings)
    return transfer + sum(
        (1 if ring.switched else ring.steps) * ring.latency
        for level in link.levels
        for ring in level.rings
    )


def _ring_exchange(full: float, ring: Ring) -> float:
    n = ring.size
    if ring.switched:
        return full * (n - 1) / n / ring.bandwidth
    # Load of the busiest wire: half of the devices send to the other half across it.
    return full * (n * n // 4) / n / (ring.directions * ring.bandwidth)


def _shift(full: float, link: AxisLink) -> float:
    rings = [ring for level in link.levels for ring in level.rings]
    hops = (1 if ring.wraps or ring.switched else ring.size - 1 for ring in rings)
    latency = max(hop * ring.latency for hop, ring in zip(hops, rings, strict=True))
    return full / min(ring.bandwidth for ring in rings) + latency
