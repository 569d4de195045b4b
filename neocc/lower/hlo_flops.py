"""FLOPs of the matrix products in HLO text, from shapes and dimension numbers."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np

from neocc.lower.hlo_text import Computation, HloError, Instruction, arrays


def dot_flops(comp: Computation, inst: Instruction) -> int:
    """2*M*N*K of a ``dot``: result elements times contracted elements, times two."""
    lhs = arrays(comp.shape(inst.operands[0]))[0]
    contracted = math.prod(lhs.shape[d] for d in inst.integers("lhs_contracting_dims"))
    return 2 * inst.arrays[0].size * contracted


def convolution_flops(comp: Computation, inst: Instruction) -> int:
    """FLOPs of a ``convolution``, counting only products of real elements.

    The TPU compiler writes every ``dot`` as a convolution; a batch dim becomes a spatial one whose
    window, stride and dilation let each output meet a single input, so the padding that the window
    runs over must not be counted (as in XLA's HloCostAnalysis).
    """
    lhs, rhs, out = (a[0] for a in (*map(arrays, map(comp.shape, inst.operands)), inst.arrays))
    labels = inst.attribute("dim_labels") or ""
    left, right, result = re.split(r"_|->", labels)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", inst.attribute("window") or ""))

    def per_dim(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * (len(left) - 2)

    positions = 1
    for d, (size, stride, pad, lhs_dilate, rhs_dilate) in enumerate(
        zip(
            per_dim("size", "1"),
            per_dim("stride", "1"),
            per_dim("pad", "0_0"),
            per_dim("lhs_dilate", "1"),
            per_dim("rhs_dilate", "1"),
            strict=True,
        )
    ):
        positions *= valid_positions(
            lhs.shape[left.index(str(d))],
            out.shape[result.index(str(d))],
            int(size),
            int(stride),
            int(pad.split("_")[0]),
            int(lhs_dilate),
            int(rhs_dilate),
        )
    (feature_groups,) = inst.integers("feature_group_count") or (1,)
    (batch_groups,) = inst.integers("batch_group_count") or (1,)
    batch = lhs.shape[left.index("b")] // batch_groups
    features = lhs.shape[left.index("f")] // feature_groups
    if features != rhs.shape[right.index("i")]:
        raise HloError(
            f"convolution {inst.name!r}: its operands contract {features} features with"
            f" {rhs.shape[right.index('i')]}"
        )
    return 2 * batch * features * out.shape[result.index("f")] * positions


@lru_cache(maxsize=4096)
def valid_positions(
    size: int, out: int, window: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs (output position, window position) of one spatial dim that meet a real input element.

    Args:
        size, out: input and output elements along the dim.
        pad: low padding; negative crops.
    """
    starts = np.arange(out, dtype=np.int64) * stride - pad
    total = 0
    for k in range(window):
        at = starts + k * rhs_dilate
        total += int(((at >= 0) & (at % lhs_dilate == 0) & (at < size * lhs_dilate)).sum())
    return total


def library_flops(comp: Computation, inst: Instruction) -> int | None:
    """FLOPs of a GPU library product, whose contraction stands in ``backend_config``."""
    match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', inst.rest)
    if match is None:
        return None
    lhs = arrays(comp.shape(inst.operands[0]))[0]
    contracted = math.prod(lhs.shape[int(d)] for d in re.findall(r"\d+", match[1]))
    return 2 * inst.arrays[0].size * contracted
