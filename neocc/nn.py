"""Small composites that more than one model wants; each is a handful of IR ops."""

from __future__ import annotations

import math

from neocc.ir.builder import Tensor, detach, exp, iota, log, random, rsqrt, select, tanh
from neocc.ir.types import Dim


def softmax(x: Tensor, dim: str | Dim) -> Tensor:
    """exp(x) over its sum along ``dim``, stable: the maximum is taken off first."""
    e = exp(x - detach(x.max(dim)))
    return e / e.sum(dim)


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


def gelu(x: Tensor) -> Tensor:
    """The tanh form of the Gaussian error linear unit (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1.0 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def dropout(x: Tensor, rate: float, seed: Tensor | None, salt: int) -> Tensor:
    """Elements zeroed with probability ``rate``, the others scaled by 1 / (1 - rate).

    The same for one seed (u32 scalar) and salt wherever it runs, so that a backward pass makes
    the mask again instead of keeping it.
    """
    if rate == 0 or seed is None:
        return x
    kept = random(seed, x.dims, salt) >= rate
    return select(kept, x * (1.0 / (1.0 - rate)), 0.0)


def cross_entropy(logits: Tensor, labels: Tensor, dim: Dim, z_loss: float = 0.0) -> Tensor:
    """-log softmax of each label's logit, plus z_loss times the squared log-partition.

    logits[..., dim], labels[...] i32. The label's logit is picked by comparison, so that a
    ``dim`` that is cut over devices needs no gather.
    """
    partition = logsumexp(logits, dim)
    chosen = iota(logits, dim).equals(labels)
    loss = partition - select(chosen, logits, 0.0).sum(dim)
    return loss + z_loss * (partition * partition) if z_loss else loss
