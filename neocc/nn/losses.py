"""Losses of logits against labels."""

from __future__ import annotations

from typing import Any

from neocc.ir.builder import Tensor, detach, iota, maximum, repeat, select
from neocc.ir.types import Dim
from neocc.nn.norms import logsumexp

ENTMAX_ALPHA = 1.3  # GPT-Neo's, models/utils.py
BISECTIONS = 50  # GPT-Neo's too; each halves the error, so that it ends below float64's


def cross_entropy(logits: Tensor, labels: Tensor, dim: Dim, z_loss: float = 0.0) -> Tensor:
    """-log softmax of each label's logit, plus z_loss times the squared log-partition.

    logits[..., dim], labels[...] i32. The label's logit is picked by comparison, so that a
    ``dim`` that is cut over devices needs no gather.
    """
    partition = logsumexp(logits, dim)
    chosen = iota(logits, dim).equals(labels)
    loss = partition - select(chosen, logits, 0.0).sum(dim)
    return loss + z_loss * (partition * partition) if z_loss else loss


def entmax(x: Tensor, dim: Dim, alpha: float = ENTMAX_ALPHA) -> Tensor:
    """The alpha-entmax of ``x`` along ``dim`` (Peters, Niculae and Martins, 2019), 1 < alpha < 2: a
    softmax that gives small logits exactly 0. Without a gradient.

    With a = alpha - 1 it is (a max(0, x - t)) ** (1 / a), with the t that makes the sum 1: found by
    bisection, a loop over one reduction, so that ``dim`` may be cut over devices. The loop reads
    ``x`` itself, not a x, which would be held beside it.
    """
    power = 1.0 / (alpha - 1.0)
    x = detach(x)

    def of(x: Tensor, threshold: Tensor) -> Tensor:
        return maximum(x - threshold, 0.0) ** power

    def halve(bounds: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        middle = bounds["low"] + bounds["width"] * 0.5
        enough = of(x, middle).sum(dim) >= power**power
        return {
            "low": select(enough, middle, bounds["low"]),
            "width": bounds["width"] * 0.5,
        }

    # The largest element alone gives 1 at low; all alike give at most 1 at low + width.
    low = x.max(dim) - power
    widest = power * (1.0 - dim.size ** (1.0 - alpha))
    width = low.block.emit("constant", (), value=widest, dtype=x.dtype)
    found = repeat(Dim("bisection", BISECTIONS), halve, {"low": low, "width": width}, {})
    p = of(x, found["low"])
    return p / p.sum(dim)


def entmax_loss(logits: Tensor, labels: Tensor, dim: Dim, alpha: float = ENTMAX_ALPHA) -> Tensor:
    """The loss that goes with ``entmax`` as the cross entropy does with softmax (Peters, Niculae
    and Martins, 2019): 0 where the label has all the weight, never infinite, and its gradient
    is p - onehot(label).

    logits[..., dim], labels[...] i32. sum p (x - x_label) + H(p), H the Tsallis entropy. By
    Danskin's theorem the derivative through p vanishes, so p is taken as a constant and neither
    the bisection nor the entropy has a backward pass.
    """
    p = entmax(logits, dim, alpha)
    entropy = (p - p**alpha).sum(dim) * (1.0 / (alpha * (alpha - 1.0)))
    chosen = iota(logits, dim).equals(labels)
    return (p * logits).sum(dim) - select(chosen, logits, 0.0).sum(dim) + entropy
