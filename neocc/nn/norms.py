"""What brings numbers to a common scale: softmax, its logarithm, norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from neocc.ir.builder import Tensor, detach, exp, log, maximum, rsqrt
from neocc.ir.types import Dim


def softmax(x: Tensor, dim: str | Dim) -> Tensor:
    """exp(x) over its sum along ``dim``, stable: the maximum is taken off first."""
    e = exp(x - detach(x.max(dim)))
    return e / e.sum(dim)


def joint_softmax(parts: Sequence[tuple[Tensor, str]]) -> list[Tensor]:
    """One softmax over the named dims of several tensors together, as if they were one long dim."""
    top = detach(reduce(maximum, [x.max(dim) for x, dim in parts]))
    e = [exp(x - top) for x, _ in parts]
    total = reduce(add, [y.sum(dim) for y, (_, dim) in zip(e, parts, strict=True)])
    return [y / total for y in e]


def logsumexp(x: Tensor, dim: str | Dim) -> Tensor:
    """log of the sum of exp(x) along ``dim``, stable."""
    top = detach(x.max(dim))
    return log(exp(x - top).sum(dim)) + top


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, dim: Dim, epsilon: float = 1e-5) -> Tensor:
    """``x`` with mean 0 and variance 1 along ``dim``, times gain[dim], plus bias[dim].

    It runs in the gain's dtype, and so does what it returns.
    """
    x = x.cast(gain.dtype)
    x = x - x.mean(dim)
    return x * rsqrt((x * x).mean(dim) + epsilon) * gain + bias


def scale_norm(x: Tensor, gain: Tensor, dim: Dim, epsilon: float = 1e-5) -> Tensor:
    """``x`` with mean 0 and variance 1 along ``dim``, times one number, ``gain``: as GPT-Neo has
    it. (Nguyen and Salazar, 2019, take no mean off.) Runs in the gain's dtype."""
    x = x.cast(gain.dtype)
    x = x - x.mean(dim)
    return x * rsqrt((x * x).mean(dim) + epsilon) * gain
