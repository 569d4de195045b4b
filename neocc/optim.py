"""Learning rate, clipping, Adam and Adafactor, as IR: part of the step that is planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neocc.ir.builder import Tensor, cos, maximum, minimum, rsqrt, sqrt
from neocc.ir.errors import NeoccError
from neocc.ir.types import Dim

DECAYS = ("cosine", "linear", "constant")
FACTORED = 128  # Mesh TensorFlow's min_dim_size_to_factor
MEMORY = 0.8  # the exponent of Adafactor's decay rate


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


@dataclass(frozen=True)
class Matrix:
    """A parameter as an optimizer sees it: ``stack`` of matrices, each of ``rows`` times
    ``columns``; either may be several dims, taken as one."""

    stack: tuple[Dim, ...]
    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]

    @property
    def own(self) -> tuple[Dim, ...]:
        return (*self.rows, *self.columns)

    @property
    def dims(self) -> tuple[Dim, ...]:
        return (*self.stack, *self.own)

    @property
    def factored(self) -> bool:
        sides = (math.prod(d.size for d in side) for side in (self.rows, self.columns))
        return bool(self.rows and self.columns) and min(sides) >= FACTORED


Slots = dict[str, tuple[Dim, ...]]  # what is kept beside a parameter: dims by name
State = dict[str, Tensor]
# shape, value, gradient, state, weight decay -> what is taken off the value, and the next state
Update = Callable[[Matrix, Tensor, Tensor, State, float], tuple[Tensor, State]]


@dataclass(frozen=True)
class Adam:
    """``adam`` with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    beta1: float
    beta2: float
    epsilon: float
    bias_correction: bool = True

    def slots(self, shape: Matrix) -> Slots:
        return {"m": shape.dims, "v": shape.dims}

    def updates(self, time: Tensor, lr: Tensor) -> Update:
        """Of step number ``time`` (a float scalar, from 0)."""
        correct = None
        if self.bias_correction:
            correct = moment_weights(time + 1.0, self.beta1, self.beta2)

        def update(
            shape: Matrix, value: Tensor, gradient: Tensor, old: State, decay: float
        ) -> tuple[Tensor, State]:
            moments = Moments(old["m"], old["v"])
            change, (m, v) = adam(gradient, moments, self.beta1, self.beta2, self.epsilon, correct)
            if decay:
                change = change + decay * value
            return lr * change, {"m": m, "v": v}

        return update


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern, 2018, algorithms 4 to 6) with a given learning rate.

    The gradient over the root of its second moment, the outer product of those of rows and columns
    over their mean; cut to a root mean square of ``threshold``; times the learning rate and the
    parameter's own root mean square, ``epsilon2`` at least. Each matrix of a stack for itself. With
    ``beta1``, the exponential mean of that. Weight decay is decoupled and times the learning rate.
    """

    beta1: float = 0.0
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    threshold: float = 1.0

    def slots(self, shape: Matrix) -> Slots:
        """The second moments of rows and of columns, ``vr`` and ``vc``, or of each element, ``v``,
        if a side is short; with a ``beta1`` also ``m``."""
        if shape.factored:
            found: Slots = {
                "vr": (*shape.stack, *shape.rows),
                "vc": (*shape.stack, *shape.columns),
            }
        else:
            found = {"v": shape.dims}
        return found | ({"m": shape.dims} if self.beta1 else {})

    def updates(self, time: Tensor, lr: Tensor) -> Update:
        """Of step number ``time`` (a float scalar, from 0)."""
        decay = 1.0 - (time + 1.0) ** -MEMORY  # how much of the old second moments is kept
        take = 1.0 - decay

        def update(
            shape: Matrix, value: Tensor, gradient: Tensor, old: State, weight_decay: float
        ) -> tuple[Tensor, State]:
            square = gradient * gradient + self.epsilon1
            if shape.factored:
                rows = decay * old["vr"] + take * square.mean(*shape.columns)
                columns = decay * old["vc"] + take * square.mean(*shape.rows)
                new = {"vr": rows, "vc": columns}
                change = gradient * rsqrt(rows / rows.mean(*shape.rows)) * rsqrt(columns)
            else:
                new = {"v": decay * old["v"] + take * square}
                change = gradient * rsqrt(new["v"])
            change = change / maximum(rms(change, shape) * (1.0 / self.threshold), 1.0)
            change = change * (maximum(rms(value, shape), self.epsilon2) * lr)
            if self.beta1:
                change = self.beta1 * old["m"] + (1.0 - self.beta1) * change
                new["m"] = change
            if weight_decay:
                change = change + lr * (weight_decay * value)
            return change, new

        return update


def rms(x: Tensor, shape: Matrix) -> Tensor:
    """Root mean square of each matrix of a stack."""
    return sqrt((x * x).mean(*shape.own))
