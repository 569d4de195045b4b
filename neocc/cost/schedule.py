"""Seconds of a step that is cut into microbatches and, over a pipeline, into stages.

Pure formulas over what one microbatch costs on one stage. Sources: GPipe, arXiv 1811.06965; 1F1B
and interleaving, arXiv 2104.04473 section 2.2 (the bubble is (p - 1) / m of the ideal time, and
interleaving v chunks of layers on each device divides it by v and multiplies what is sent by v);
bucketed gradient reduction behind the last backward pass, arXiv 2006.15704.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class Stage:
    """What a microbatch takes on one device of the pipeline: all chunks of layers that it holds,
    with their exposed communication."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Idle time of a device as a share of the time that it works, all stages alike.

    Raises:
        ValueError: a count below 1.
    """
    if min(stages, microbatches, chunks) < 1:
        raise ValueError("stages, microbatches and chunks are at least 1")
    return (stages - 1) / (microbatches * chunks)


def warm_up(stages: Sequence[Stage], chunks: int = 1) -> float:
    """Seconds that the slowest device waits: one microbatch must pass the others before and after
    its own, of which interleaving leaves one chunk of ``chunks``."""
    slowest = max(s.both for s in stages)
    return (sum(s.both for s in stages) - slowest) / chunks


def crossings(microbatches: int, chunks: int) -> int:
    """Transfers that a device of the middle of a pipeline waits for in a step, if it waits for
    all: an activation in the forward and a gradient in the backward pass, for each microbatch
    and chunk."""
    return 2 * microbatches * chunks


def pipeline_time(
    stages: Sequence[Stage],
    microbatches: int,
    chunks: int = 1,
    send: float = 0.0,
    overlapped: bool = False,
) -> float:
    """Seconds from the first microbatch's start to the last one's end.

    GPipe and 1F1B take the same time, they differ in memory; with ``chunks`` > 1 the schedule is
    interleaved. ``send``: seconds of one transfer between neighbours. Where sends are
    ``overlapped`` with compute only those of the warm-up are waited for. One stage sends nothing.

    Raises:
        ValueError: no stage, or a count below 1.
    """
    if not stages or microbatches < 1 or chunks < 1:
        raise ValueError("a pipeline has at least 1 stage, 1 microbatch and 1 chunk")
    slowest = max(s.both for s in stages)
    time = microbatches * slowest + warm_up(stages, chunks)
    if len(stages) == 1:
        return time
    ramp = 2 * (len(stages) - 1) * send  # the first microbatch in, the last gradient out
    return time + ramp + (0.0 if overlapped else crossings(microbatches, chunks) * send)


def reduction_time(seconds: float, backward: float, overlapped: bool, share: float = 0.9) -> float:
    """Seconds of a gradient reduction that are waited for.

    ``seconds``: of the whole reduction; ``backward``: of the last microbatch's backward pass, which
    it can hide behind if it runs in buckets; ``share``: of the reduction that can, since the last
    bucket is ready only when the backward pass ends.
    """
    return seconds - min(share * seconds, backward) if overlapped else seconds


def step_time(pipeline: float, reduction: float, optimizer: float, gather: float = 0.0) -> float:
    """A whole step: the pipeline, what is exposed of the gradient reduction, the update, and what
    is exposed of gathering updated parameters whose update was sharded."""
    return pipeline + reduction + optimizer + gather
