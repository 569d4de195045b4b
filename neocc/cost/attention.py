"""What fused attention costs on one chip: the form that neocc lowers to, and a kernel's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from neocc.cost.hardware import Chip
from neocc.cost.roofline import elementwise_time, padded_mnk
from neocc.cost.vector import REGISTER
from neocc.ir.ops.attention import PRODUCTS, circle_of, lowered_tiles, roles
from neocc.ir.program import Op

Parts = Callable[[str], int]  # iteration dim -> number of blocks it is cut into
UNFUSED = {"attention": 2, "attention_grad": 4}  # products, where no score is made again


@dataclass(frozen=True)
class AttentionForm:
    """How fused attention runs. ``score_passes``: how often the tiles' scores, in f32, are read or
    written between ops, counted as traffic of memory; ``score_cycles``, in its place where a chip's
    vector units are known: cycles of one core for a register of scores, 1024 of them."""

    name: str
    score_passes: float
    score_cycles: float


# Seen in the TPU compiler's estimates: beyond products and operands, 17 picoseconds a score on v5e
# and v5p, 24 on v4, forward, with tiles that stay on chip. The two cores of v4 and v5p, which share
# other work, do not share a step of the loop.
PORTABLE = AttentionForm("a loop over tiles", 3.0, 26.0)
# One kernel that holds its tile in registers: FlashAttention, splash attention.
KERNEL = AttentionForm("a kernel", 0.0, 0.0)


def attention_seconds(chip: Chip, op: Op, parts: Parts, form: AttentionForm) -> float:
    """One run of ``attention`` or ``attention_grad``: its products tile by tile, in steps of the
    matrix unit; and the traffic of operands, results and scores. One kernel overlaps the two; a
    loop of several ops runs one after the other."""
    batch, m, n, k, count = local_products(op, parts)
    rate = chip.flops(op.operands[0].type.dtype) * chip.matmul_efficiency
    products = 2.0 * batch * count * padded_mnk(chip, m, n, k) / rate
    values = (*op.operands, *op.results)
    cut = along(op, parts)
    moved = sum(
        math.prod(d.size // cut(d.name) for d in v.type.dims) * v.type.itemsize for v in values
    )
    if not form.score_passes:
        return max(products, elementwise_time(chip, moved))
    scores = batch * m * n * count // PRODUCTS[op.kind]
    if chip.vector_clock is not None:
        cycles = form.score_cycles * scores / REGISTER
        return chip.cores * (products + cycles / chip.vector_clock) + elementwise_time(chip, moved)
    return products + elementwise_time(chip, moved + 4 * form.score_passes * scores)


def along(op: Op, parts: Parts) -> Parts:
    """``parts`` in which what cuts ``memory`` cuts ``seq`` too."""
    seq, memory = op.attrs["seq"], op.attrs["memory"]
    return lambda dim: parts(dim) * (parts(memory) if dim == seq else 1)


def local_products(op: Op, parts: Parts) -> tuple[int, int, int, int, int]:
    """Local (batch, m, n, k) of each product, and how many run: one per tile of scores that is not
    wholly masked for each of 2 (forward) or 5 (backward). Where ``seq`` is cut no tile is left
    out, since all devices run one program; where ``memory`` is, which goes round, those that are
    left out on every device (``ir.ops.attention_ring``)."""
    r = roles(op)
    dims = {d.name: d.size // parts(d.name) for v in op.operands for d in v.type.dims}
    devices = parts(r.memory)
    if devices > 1:
        shape = circle_of(op, devices)
        cut, count = shape.tiles, sum(shape.computed)
    else:
        cut = lowered_tiles(op, dims[r.seq], parts(r.seq) > 1)
        count = len(cut.pairs)
    batch = math.prod(dims[n] for n in r.batch)
    rows = math.prod(dims[n] for n in r.group) * cut.rows
    return batch, rows, cut.columns, dims[r.head_dim], PRODUCTS[op.kind] * count


def attention_flops(op: Op, parts: Parts) -> int:
    """FLOPs of the products that one device runs; those of the compiled program."""
    return 2 * math.prod(local_products(op, parts))


def unfused_flops(op: Op) -> int:
    """FLOPs of the whole op as einsum, softmax, einsum: every score, seen or not, and 4 products
    backward. What utilisation counts, so that both forms, and published figures, compare."""
    q, k = (v.type for v in op.operands[:2])
    return UNFUSED[op.kind] * 2 * q.size * k.dim(op.attrs["memory"]).size
