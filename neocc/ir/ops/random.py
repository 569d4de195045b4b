"""Random numbers that depend on the seed and the global index alone, never on the layout.

The counter-based generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC11).
"""

from __future__ import annotations

import math
from typing import Any

from neocc.ir.ops.base import Attrs, Context, Iter, OpDef, Space, need
from neocc.ir.program import Op
from neocc.ir.types import DTYPES, TensorType

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
DISTRIBUTIONS = ("uniform", "normal")


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any], xp: Any) -> tuple[Any, Any]:
    """Two words of 32 random bits per counter; all words are uint32 arrays."""
    u32 = xp.uint32
    ks = (key[0], key[1], key[0] ^ key[1] ^ u32(0x1BD11BDA))
    x0, x1 = counter[0] + ks[0], counter[1] + ks[1]
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << u32(r)) | (x1 >> u32(32 - r))) ^ x0
        x0 = x0 + ks[(group + 1) % 3]
        x1 = x1 + ks[(group + 2) % 3] + u32(group + 1)
    return x0, x1


def infer_random(types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
    """``part``, an attribute: the dim of which this is a part only, that begins at the second
    operand; ``counted`` then has the size of the whole."""
    part = attrs.get("part")
    need(len(types) == (2 if part else 1), "random takes the seed, and where its part begins")
    need(types[0] == TensorType((), "u32"), f"random's seed is {types[0]}, not a u32 scalar")
    if part:
        need(types[1] == TensorType((), "i32"), f"random's part begins at {types[1]}")
        need(any(d.name == part for d in attrs["dims"]), f"random has no dim {part!r}")
    known = attrs["distribution"] in DISTRIBUTIONS
    need(known, f"random has no distribution {attrs['distribution']!r}")
    need(attrs["dtype"] in ("f32", "f64"), "random makes f32 or f64; cast the result")
    sizes = counted_sizes(attrs)
    need(len(sizes) == len(attrs["dims"]), "random: one counted size per dim")
    for d, size in zip(attrs["dims"], sizes, strict=True):
        need(0 <= size <= d.size or d.name == part, f"random counts {size} of the dim {d}")
    split_counter(sizes)
    return (TensorType(tuple(attrs["dims"]), attrs["dtype"]),)


def counted_sizes(attrs: Attrs) -> tuple[int, ...]:
    """Sizes by which a global index becomes a counter. ``counted`` gives those before padding,
    so that the elements of the unpadded tensor keep their numbers."""
    return tuple(attrs.get("counted", (d.size for d in attrs["dims"])))


def split_counter(sizes: tuple[int, ...]) -> int:
    """How many leading dims go into the counter's high word; each word holds below 2**32."""
    cut = len(sizes)
    while cut and math.prod(sizes[cut - 1 :]) <= 2**32:
        cut -= 1
    need(math.prod(sizes[:cut]) <= 2**32, "random: the tensor is too large")
    return cut


def evaluate_random(op: Op, args: list[Any], ctx: Context) -> list[Any]:
    xp = ctx.xp
    dims = op.attrs["dims"]
    sizes = counted_sizes(op.attrs)
    cut, rank = split_counter(sizes), len(dims)
    words = []
    for group in (range(cut), range(cut, rank)):
        word = xp.zeros((1,) * (ctx.lead + rank), xp.uint32)
        for axis in group:
            index = ctx.index(dims[axis].name, dims[axis].size, rank, axis)
            if dims[axis].name == op.attrs.get("part"):
                index = index + args[1].reshape(args[1].shape + (1,) * rank)
            word = word * xp.uint32(sizes[axis] & 0xFFFFFFFF) + index.astype(xp.uint32)
        words.append(word)
    seed = args[0].reshape(args[0].shape + (1,) * rank)
    salt = xp.full((1,) * (ctx.lead + rank), op.attrs["salt"], xp.uint32)
    a, b = threefry((seed, salt), (words[0], words[1]), xp)
    dtype = DTYPES[op.attrs["dtype"]]
    u, v = ((w >> xp.uint32(8)).astype(dtype) * dtype.type(2.0**-24) for w in (a, b))
    if op.attrs["distribution"] == "uniform":
        return [u]
    # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
    return [xp.sqrt(-2 * xp.log(1 - u)) * xp.cos(dtype.type(2 * math.pi) * v)]


def random_space(op: Op) -> Space:
    dims = op.attrs["dims"]
    names = tuple(d.name for d in dims)
    return Space(tuple(Iter(d.name, d.size) for d in dims), ((),) * len(op.operands), (names,))


def random_indices(op: Op) -> tuple[str, ...]:
    return tuple(d.name for d in op.attrs["dims"])


DEFS = {
    "random": OpDef(infer_random, random_space, evaluate_random, indexed=random_indices),
}
