"""Which of an op's rings a plan may choose: ring attention, in place of gathered keys and values.

A ring that cannot gain is left out, so that problems are no larger for it: from the same layouts to
the same layouts, one of the op's other strategies takes no longer, all of its reshards counted and
none hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neocc.cost.choice import RING, RING_KIND
from neocc.cost.model import CostModel
from neocc.ir.mesh import Layout, Strategy
from neocc.ir.ops import ATTENTION
from neocc.ir.ops.attention import contiguous, ring_axis
from neocc.ir.program import Op, Program, Value
from neocc.passes.layout.algebra import moves, op_layouts, strategies


def offered(op: Op, found: Sequence[Strategy], cost: CostModel, every: bool) -> list[Strategy]:
    """An op's strategies without the rings that are not asked for or cannot gain; where rings are
    asked for, without what they take the place of. ``every``: all that are legal."""
    rings = {s: axis for s in found if (axis := ring_axis(op, s)) is not None}
    asked = cost.collectives.of(RING_KIND)
    if not rings or every:
        return list(found)
    if asked == RING:
        replaced = {s.replace(axis, op.attrs["seq"]) for s, axis in rings.items()}
        return [s for s in found if s not in replaced]
    if asked is not None:  # XLA's own collectives, or a kernel, which takes whole sequences
        return [s for s in found if s not in rings]
    others = [s for s in found if s not in rings]
    return [s for s in found if s not in rings or gains(op, s, rings[s], others, cost)]


def gains_in_order(before: Program, after: Program, cost: CostModel) -> bool:
    """Whether a ring may gain where all sequences of a program lie in its order: ``after`` is
    ``before`` so (``passes.zigzag``)."""
    asked = cost.collectives.of(RING_KIND)
    if asked is not None:
        return asked == RING
    ops, runs = ([o for o in p.body.walk() if o.kind in ATTENTION] for p in (before, after))
    for op, run in zip(ops, runs, strict=True):
        others = [s for s in strategies(op, cost.mesh) if ring_axis(op, s) is None]
        for ring in strategies(run, cost.mesh):
            axis = ring_axis(run, ring)
            if axis is not None and gains(op, ring, axis, others, cost, run):
                return True
    return False


def gains(
    op: Op,
    ring: Strategy,
    axis: int,
    others: Iterable[Strategy],
    cost: CostModel,
    run: Op | None = None,
) -> bool:
    """Whether a ring takes less time than each strategy that differs from it on its axis alone and
    is reached by one move of each operand and result there. ``run``: the op that the ring runs, if
    it is another one."""
    time = cost.ring(run or op, ring)
    assert time is not None
    within = time.compute + time.exposed
    for other in others:
        if other.replace(axis, ring.axes[axis]) == ring:
            instead = instead_seconds(op, ring, other, cost)
            if instead is not None and sum(instead) <= within:
                return False
    return True


def instead_seconds(
    op: Op, ring: Strategy, other: Strategy, cost: CostModel
) -> tuple[float, float] | None:
    """Seconds of an op's compute under another strategy, and of the moves from the layouts that a
    ring takes and to those that it makes; None where no single moves lead there."""
    blocks = other.blocks(cost.mesh)
    compute = cost.op_seconds(op, lambda dim: blocks.get(dim, 1))
    (takes, makes), (wants, gives) = op_layouts(op, ring), op_layouts(op, other)
    moved = 0.0
    for value, source, target in (
        *zip(op.operands, takes, wants, strict=True),
        *zip(op.results, gives, makes, strict=True),
    ):
        seconds = move_seconds(value, source, target, cost)
        if seconds is None:
            return None
        moved += seconds
    return compute, moved


def move_seconds(value: Value, source: Layout, target: Layout, cost: CostModel) -> float | None:
    """Seconds of the one move from a layout to another; None where there is none."""
    if source == target:
        return 0.0
    for move in moves(source, value.type, cost.mesh):
        if move.target == target:
            ends = (source, target)
            copied = cost.copy_seconds(move.kind, (move.dim, move.to), value.type, ends)
            return cost.way(move.kind, move.axis, value.type, ends).seconds + copied
    return None


def gathered_seconds(op: Op, ring: Strategy, cost: CostModel) -> tuple[float, float] | None:
    """Seconds of what a ring takes the place of: compute with whole keys and values; and to gather
    them, and scatter their gradients' sums."""
    axis = ring_axis(op, ring)
    assert axis is not None
    return instead_seconds(contiguous(op), ring, ring.replace(axis, op.attrs["seq"]), cost)
