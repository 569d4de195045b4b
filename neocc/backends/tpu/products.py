"""Matrix products that hide their gather or their scatter, as one kernel each.

As ``neocc.lower.collectives.products``, in the same steps: while remote DMAs carry what comes
next, the matrix unit multiplies what is there. Of the whole gathered operand a device holds four
blocks at most, two for each way round. Two-dimensional products; float32 sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neocc.backends.tpu import collectives
from neocc.backends.tpu.blocks import LANES, MEMORY, Matrix, even, fold, in_memory, sublanes
from neocc.backends.tpu.ring import Slots, enter, rounds, semaphores, ways_round
from neocc.ir.errors import LayoutError
from neocc.lower.collectives import products
from neocc.lower.collectives.group import Group

FLOATS = ("float32", "bfloat16")
BLOCK = 512  # most rows and columns of a block: two of each operand, and the sums, are 4 MiB


@dataclass(frozen=True)
class Product:
    """a[m, k] b[k, n] in blocks: padded sizes and those of a block, in this order."""

    sizes: tuple[int, int, int]
    blocks: tuple[int, int, int]
    dtype: Any
    precision: Any

    @property
    def out(self) -> Matrix:
        (m, _, n), (bm, _, bn) = self.sizes, self.blocks
        return Matrix((m, n), (bm, bn))


def product_of(m: int, k: int, n: int, dtype: Any, precision: Any) -> Product:
    units = (sublanes(dtype), LANES, LANES)
    padded = [even(size, unit, BLOCK) for size, unit in zip((m, k, n), units, strict=True)]
    sizes, blocks = zip(*padded, strict=True)
    return Product(sizes, blocks, jnp.dtype(dtype), precision)


def multiply(a: Any, b: Any, out: Any, scratch: Any, form: Product) -> None:
    """In a kernel: ``out`` becomes the product, of matrices in memory. ``scratch``: a block of
    sums on chip."""
    (bm, bk, bn) = form.blocks
    steps = form.sizes[1] // bk

    def body(x: Any, y: Any, z: Any) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            scratch[...] = jnp.zeros_like(scratch)

        scratch[...] += jnp.dot(
            x[...], y[...], preferred_element_type=jnp.float32, precision=form.precision
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            z[...] = scratch[...].astype(z.dtype)

    pltpu.emit_pipeline(
        body,
        grid=(*form.out.grid, steps),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, s: (i, s)),
            pl.BlockSpec((bk, bn), lambda i, j, s: (s, j)),
        ],
        out_specs=[pl.BlockSpec((bm, bn), lambda i, j, s: (i, j))],
    )(a, b, out)


def gather_kernel(
    x: Any,
    w: Any,
    out: Any,
    land: Any,
    sent: Any,
    came: Any,
    free: Any,
    sums: Any,
    *,
    group: Group,
    ways: int,
    form: Product,
):
    """x[m, k], w[k, n] to out[places, m, n]."""
    ring = enter(group)
    slots = Slots(ring, land, sent, came, free)
    going = ways_round(group.size, ways)
    every = [*rounds(going)]
    for t, running in every:
        for way in running:
            slots.send(way, t, x if t == 1 else None)
        if t == 1:
            multiply(x, w, out.at[ring.here], sums, form)
        for way in going:
            if 1 <= t - 1 <= way.steps:
                place = ring.place(-way.by * (t - 1))
                multiply(slots.slot(way, t - 1), w, out.at[place], sums, form)
        for way in running:
            slots.leave(way, t)
            slots.receive(way, t)
    for way in every[-1][1]:
        place = ring.place(-way.by * way.steps)
        multiply(slots.slot(way, way.steps), w, out.at[place], sums, form)


def scatter_kernel(
    x: Any,
    w: Any,
    out: Any,
    land: Any,
    part: Any,
    sent: Any,
    came: Any,
    free: Any,
    sums: Any,
    *,
    group: Group,
    ways: int,
    form: Product,
):
    """x[places, m, k], w[k, n] to out[m, n]. ``part[way, m, n]``: what is to be added to the next
    message, multiplied while it comes."""
    ring = enter(group)
    slots = Slots(ring, land, sent, came, free, first=0)
    going = ways_round(group.size, ways)
    for way in going:
        multiply(x.at[ring.place(way.by * way.steps)], w, slots.slot(way, 0), sums, form)
    for t, running in rounds(going):
        for way in running:
            if t > 1:
                held = slots.receive(way, t - 1)
                fold(jnp.add, held, [held, part.at[way.number]], form.out)
            slots.send(way, t)
        for way in running:
            if t < way.steps:
                mine = x.at[ring.place(way.by * (way.steps - t))]
                multiply(mine, w, part.at[way.number], sums, form)
        if t == 1:
            multiply(x.at[ring.here], w, out, sums, form)
        for way in running:
            slots.leave(way, t)
    last = [slots.receive(way, way.steps) for way in going]
    fold(jnp.add, out, [out, *last], form.out)


def call(kernel: Any, form: Product, group: Group, ways: int, x: Any, w: Any, shapes: Any) -> Any:
    (bm, _, bn) = form.blocks
    return pl.pallas_call(
        functools.partial(kernel, group=group, ways=ways, form=form),
        out_shape=[in_memory(shape, form.dtype) for shape in shapes],
        in_specs=[MEMORY, MEMORY],
        out_specs=[MEMORY] * len(shapes),
        scratch_shapes=[*semaphores(), pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            collective_id=collectives.collective_number(group), has_side_effects=True
        ),
        name=f"neocc_{kernel.__name__.replace('kernel', 'product')}",
    )(x, w)[0]


@dataclass(frozen=True)
class Form:
    """A spec as a plain product, rows of the first operand by columns of the second: letters."""

    dim: str
    rows: str
    summed: str
    columns: str
    out: str

    @staticmethod
    def of(spec: str, dim: str) -> Form:
        a, b, out = products.subscripts(spec)
        rows = dim + "".join(c for c in a if c in out and c != dim)
        summed = "".join(c for c in a if c not in out)
        return Form(dim, rows, summed, "".join(c for c in b if c in out), out)

    def first(self, a: str, x: Any) -> Any:
        """x in the order rows, summed: [size of dim, other rows, k]."""
        x = jnp.transpose(x, [a.index(c) for c in self.rows + self.summed])
        others = math.prod(x.shape[1 : len(self.rows)])
        return x.reshape(x.shape[0], others, -1)

    def second(self, b: str, w: Any) -> Any:
        """[k, columns]."""
        w = jnp.transpose(w, [b.index(c) for c in self.summed + self.columns])
        return w.reshape(math.prod(w.shape[: len(self.summed)]), -1)

    def result(self, out: Any, sizes: dict[str, int]) -> Any:
        """[rows, columns] with its dims as the spec has them; ``sizes``: of all but ``dim``."""
        letters = self.rows + self.columns
        out = out.reshape([sizes[c] if c != self.dim else -1 for c in letters])
        return jnp.transpose(out, [letters.index(c) for c in self.out])


def refused(spec: str, dim: str, x: Any, w: Any, group: Group) -> str | None:
    """Why a product is none of a TPU's own kernels, if so."""
    a, b, out = products.subscripts(spec)
    if x.dtype != w.dtype or jnp.dtype(x.dtype).name not in FLOATS:
        return f"a product of {x.dtype} and {w.dtype}; kernels are for {' and '.join(FLOATS)}"
    if set(a) & set(b) & set(out):
        return f"{spec} is a batch of products; kernels multiply two matrices"
    if dim not in a or dim not in out:
        return f"{dim} is not among the rows of {spec}"
    if 0 in (*x.shape, *w.shape):
        return "a product without elements"
    return collectives.refused(x.dtype, group)


def _gather(spec: str, x: Any, w: Any, dim: str, group: Group, ways: int, precision: Any) -> Any:
    a, b, _ = products.subscripts(spec)
    form = Form.of(spec, dim)
    left, right = form.first(a, x), form.second(b, w)
    local, others, k = left.shape
    columns, n = right.shape[1], group.size
    product = product_of(local * others, k, columns, x.dtype, precision)
    (m, depth, width) = product.sizes
    out = call(
        gather_kernel,
        product,
        group,
        ways,
        padded(left.reshape(-1, k), m, depth),
        padded(right, depth, width),
        [(n, m, width), (len(ways_round(n, ways)), 2, m, depth)],
    )
    sizes = dict(zip(a, x.shape, strict=True)) | dict(zip(b, w.shape, strict=True))
    return form.result(out[:, : local * others, :columns], sizes)


def _scatter(spec: str, x: Any, w: Any, dim: str, group: Group, ways: int, precision: Any) -> Any:
    a, b, _ = products.subscripts(spec)
    form = Form.of(spec, dim)
    left, right = form.first(a, x), form.second(b, w)
    size, others, k = left.shape
    columns, n = right.shape[1], group.size
    rows = size // n * others
    product = product_of(rows, k, columns, x.dtype, precision)
    (m, depth, width) = product.sizes
    going = len(ways_round(n, ways))
    out = call(
        scatter_kernel,
        product,
        group,
        ways,
        padded(left.reshape(n, rows, k), m, depth),
        padded(right, depth, width),
        [(m, width), (going, 2, m, width), (going, m, width)],
    )
    sizes = dict(zip(a, x.shape, strict=True)) | dict(zip(b, w.shape, strict=True))
    return form.result(out[:rows, :columns], sizes)


Run = Callable[[str, Any, Any, str, Group, int, Any], Any]


def _differentiable(run: Run, portable: Callable[..., Any]) -> Run:
    """With the gradient of the same made of permutes."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
    def f(spec: str, x: Any, w: Any, dim: str, group: Group, ways: int, precision: Any) -> Any:
        reason = refused(spec, dim, x, w, group)
        if reason:
            raise LayoutError(reason)
        if group.size == 1:
            return jnp.einsum(spec, x, w, precision=precision)
        return run(spec, x, w, dim, group, ways, precision)

    def forward(spec: str, x: Any, w: Any, *rest: Any) -> Any:
        return f(spec, x, w, *rest), (x, w)

    def backward(
        spec: str, dim: str, group: Group, ways: int, precision: Any, saved: Any, dout: Any
    ) -> Any:
        _, pull = jax.vjp(lambda x, w: portable(spec, x, w, dim, group, ways), *saved)
        return pull(dout)

    f.defvjp(forward, backward)
    return f


gather_runs = _differentiable(_gather, products.gather_product)
scatter_runs = _differentiable(_scatter, products.scatter_product)


def gather_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, precision: Any = None
) -> Any:
    """``einsum(spec, X, w)`` where ``X`` is ``x`` of every device, joined along ``dim``: one of the
    rows, which ``w`` lacks.

    Raises:
        LayoutError: what ``refused`` says.
    """
    return gather_runs(spec, x, w, dim, group, ways, precision)


def scatter_product(
    spec: str, x: Any, w: Any, dim: str, group: Group, ways: int = 2, precision: Any = None
) -> Any:
    """This device's block along ``dim``, one of the rows, which divides, of the sum of all
    devices' ``einsum(spec, x, w)``. Raises as ``gather_product``."""
    return scatter_runs(spec, x, w, dim, group, ways, precision)


def padded(x: Any, *sizes: int) -> Any:
    """Zeros behind the last dims, up to sizes."""
    lead = x.ndim - len(sizes)
    more = [(0, s - n) for s, n in zip(sizes, x.shape[lead:], strict=True)]
    return jnp.pad(x, [(0, 0)] * lead + more)
