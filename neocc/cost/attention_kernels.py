"""Fused attention as kernels of a backend's own: what they take, compute and cost.

``attention=splash`` (JAX's Pallas kernels on TPUs) and ``attention=cudnn`` (on GPUs) run in place
of the loop over tiles where they are asked for and an op's queries and keys are whole on a device.
Their seconds are computed from parts of the cost model; no device has measured them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from neocc.cost.hardware import Chip
from neocc.cost.roofline import elementwise_time, padded_mnk
from neocc.cost.vector import BASIC, CYCLES, REGISTER
from neocc.ir.ops.attention import PRODUCTS, keys_of, lowered_tiles, roles
from neocc.ir.program import Op

Parts = Callable[[str], int]  # iteration dim -> number of blocks it is cut into
LANES = 128
BLOCKS = (512, 256, 128)  # sizes of splash attention's tiles: the largest that divides
HEAD = 128  # most elements of a head under cuDNN, a multiple of 8

# Of a register of scores: scale, mask, difference and cast; then maximum, exponential and sum
# forward, and in each kernel of the gradient the exponential, a difference and a product.
FORWARD = 4 * BASIC + CYCLES["exp"] + 2 * CYCLES["reduce"]
BACKWARD = 6 * BASIC + CYCLES["exp"]


def splash_refused(op: Op) -> str | None:
    q, k = (v.type for v in op.operands[:2])
    seq, memory = q.dim(op.attrs["seq"]).size, k.dim(op.attrs["memory"]).size
    if q.dtype not in ("bf16", "f32"):
        return f"{q.dtype}; kernels are for bf16 and f32"
    if keys_of(op) != memory:
        return "keys are padding"
    if seq % LANES or memory % LANES:
        return f"{seq} queries and {memory} keys are not whole tiles of {LANES}"
    return None


def cudnn_refused(op: Op) -> str | None:
    q, k = (v.type for v in op.operands[:2])
    r, attrs = roles(op), op.attrs
    seq, memory, head = q.dim(r.seq).size, k.dim(r.memory).size, q.dim(r.head_dim).size
    masked = attrs["causal"] or attrs.get("window") is not None
    if q.dtype not in ("bf16", "f16"):
        return f"{q.dtype}; kernels are for bf16 and f16"
    if any(v.type.dtype != q.dtype for v in op.results if v.type.has(r.head_dim)):
        return "its results are of another dtype than its operands"
    if head > HEAD or head % 8:
        return f"heads of {head}; kernels are for multiples of 8 up to {HEAD}"
    if keys_of(op) != memory:
        return "keys are padding"
    if masked and not (attrs["causal"] and seq == memory):
        return "a mask that is not causal, or of other queries than keys"
    return None


def splash_tiles(op: Op) -> tuple[int, int, int]:
    """Rows and columns of splash attention's tiles, and how many hold a score that is seen."""
    q, k = (v.type for v in op.operands[:2])
    seq, memory = q.dim(op.attrs["seq"]).size, k.dim(op.attrs["memory"]).size
    rows, columns = (next(b for b in BLOCKS if size % b == 0) for size in (seq, memory))
    causal, window = op.attrs["causal"], op.attrs.get("window")

    def seen(first: int, low: int) -> bool:
        """Whether a tile's nearest corners are: its first query and its first key."""
        last, high = first + rows - 1, low + columns - 1
        if causal and low > last:
            return False
        ahead = not causal and window is not None and low - last >= window
        return not ahead and (window is None or first - high < window)

    every = ((a, b) for a in range(0, seq, rows) for b in range(0, memory, columns))
    return rows, columns, sum(seen(a, b) for a, b in every)


def cudnn_tiles(op: Op) -> tuple[int, int, int]:
    """cuDNN does not say what it computes: counted as the loop's tiles."""
    found = lowered_tiles(op, op.operands[0].type.dim(op.attrs["seq"]).size, False)
    return found.rows, found.columns, len(found.pairs)


@dataclass(frozen=True)
class AttentionKernels:
    """``chips``: the kind that has them. ``refused``: why they do not take an op, if so.
    ``tiles``: rows, columns and number of the tiles of scores that are computed. ``products``: of
    a tile, by kind of op; ``launches``: kernels that it is."""

    name: str
    chips: str
    refused: Callable[[Op], str | None]
    tiles: Callable[[Op], tuple[int, int, int]]
    products: dict[str, int]
    launches: dict[str, int]

    def takes(self, op: Op, parts: Parts) -> bool:
        """Whether an op runs as these, cut like this: of cut queries each part has another mask."""
        whole = parts(op.attrs["seq"]) == parts(op.attrs["memory"]) == 1
        whole = whole and "zigzag" not in op.attrs
        return whole and self.refused(op) is None

    def sizes(self, op: Op, parts: Parts) -> tuple[int, int, int, int]:
        """Local (batch, m, n, k) of each product of a tile, the batch with all tiles in it."""
        r, (rows, columns, count) = roles(op), self.tiles(op)
        dims = {d.name: d.size // parts(d.name) for v in op.operands for d in v.type.dims}
        batch = math.prod(dims[n] for n in (*r.batch, *r.group))
        return batch * count, rows, columns, dims[r.head_dim]

    def flops(self, op: Op, parts: Parts) -> int:
        """FLOPs of the products of one run on a device; a head's padding to lanes not counted."""
        return 2 * self.products[op.kind] * math.prod(self.sizes(op, parts))

    def seconds(self, chip: Chip, op: Op, parts: Parts, moved: int) -> float:
        """One run: the longest of its products, its arithmetic on scores, which stay on chip, and
        the traffic of operands and results, ``moved`` bytes; and the start of each kernel."""
        batch, m, n, k = self.sizes(op, parts)
        rate = chip.flops(op.operands[0].type.dtype) * chip.matmul_efficiency
        products = 2.0 * self.products[op.kind] * batch * padded_mnk(chip, m, n, k) / rate
        launches = self.launches[op.kind]
        cycles = FORWARD if op.kind == "attention" else launches * BACKWARD
        vector = cycles * batch * m * n / REGISTER / (chip.vector_clock or math.inf)
        traffic = elementwise_time(chip, moved)
        return max(products, vector, traffic) + launches * chip.kernel_overhead


KERNELS = {
    k.name: k
    for k in (
        AttentionKernels(
            "splash",
            "tpu",
            splash_refused,
            splash_tiles,
            {"attention": 2, "attention_grad": 7},  # scores and their gradients made twice
            {"attention": 1, "attention_grad": 2},
        ),
        AttentionKernels(
            "cudnn",
            "gpu",
            cudnn_refused,
            cudnn_tiles,
            PRODUCTS,
            {"attention": 1, "attention_grad": 1},
        ),
    )
}
