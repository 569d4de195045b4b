"""Learning rate, clipping and Adam, as IR: they are part of the step that is planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from neocc.ir.builder import Tensor, cos, maximum, minimum, sqrt
from neocc.ir.errors import NeoccError

DECAYS = ("cosine", "linear", "constant")


def learning_rate(step: Tensor, peak: float, warmup: int, decay: str, steps: int) -> Tensor:
    """The rate at ``step`` (a float scalar, from 0): linear from 0 over ``warmup`` steps, times a
    decay from the peak at step 0 to a tenth of it at ``steps`` and after.

    Raises:
        NeoccError: an unknown decay.
    """
    if decay not in DECAYS:
        raise NeoccError(f"learning rate decay {decay!r}; one of {', '.join(DECAYS)}")
    done = minimum(step * (1.0 / max(steps, 1)), 1.0)
    if decay == "cosine":
        rate = peak * (0.55 + 0.45 * cos(math.pi * done))
    elif decay == "linear":
        rate = peak * (1.0 - 0.9 * done)
    else:
        rate = peak + 0.0 * done
    return rate * minimum(step * (1.0 / warmup), 1.0) if warmup else rate


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Square root of the sum of the squares of every element."""
    total = None
    for t in tensors:
        square = (t * t).sum(*t.dims)
        total = square if total is None else total + square
    assert total is not None
    return sqrt(total)


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """The factor that brings gradients of this global norm down to ``limit``, at most 1."""
    return limit / maximum(norm, limit)


class Moments(NamedTuple):
    """A parameter's exponential means of the gradient and of its square."""

    m: Tensor
    v: Tensor


def moment_weights(time: Tensor, beta1: float, beta2: float) -> Moments:
    """How much of the gradients so far update number ``time`` (a float scalar, from 1) finds in
    each moment; the rest is the zero that it started from."""
    return Moments(1.0 - beta1**time, 1.0 - beta2**time)


def adam(
    gradient: Tensor,
    old: Moments,
    beta1: float,
    beta2: float,
    epsilon: float,
    weights: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """Adam's direction (to be subtracted, times the learning rate) and the next moments.

    ``weights``: those of ``moment_weights``; the moments' bias towards zero is corrected (Kingma
    and Ba, 2015). None: it is not, as in GPT-Neo and BERT.
    """
    m = beta1 * old.m + (1.0 - beta1) * gradient
    v = beta2 * old.v + (1.0 - beta2) * (gradient * gradient)
    if weights is None:
        return m / (sqrt(v) + epsilon), Moments(m, v)
    return m / weights.m / (sqrt(v / weights.v) + epsilon), Moments(m, v)
