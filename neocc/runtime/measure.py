"""Times of matrix products, memory passes and collectives on real devices.

All devices of the mesh work at once, as they do in a step. Each program runs what it measures many
times in a loop, each run on the result of the one before, so that none can be left out, and
launching the program weighs little.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neocc.cost.collectives import KINDS
from neocc.cost.fit import Pass, Product, Transfer

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
MOST_RUNS = 4096  # in one call
FEW = 16  # runs that tell how many make a call long enough
PATTERN = np.random.default_rng(0).standard_normal(2**20, np.float32)
ITEM = 4  # bytes of an element of passes and collectives, which are of f32
LANES = 128  # elements of a row of theirs: a TPU pads shorter ones, and sums 1-D ones whole

Point = Product | Pass | Transfer


@dataclass(frozen=True)
class Sweep:
    """What is measured: (m, n, k) of products, and bytes a device of passes and of collectives.

    call: seconds that one call should take at least, so that launching it weighs little;
    repeats: calls of which the median counts.
    """

    products: tuple[tuple[int, int, int], ...]
    passes: tuple[int, ...]
    transfers: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bf16", "f32")
    call: float = 0.02
    repeats: int = 5


def sweep(unit: int, largest: int, quick: bool = False) -> Sweep:
    """Sizes around ``unit``, the side of the smallest product, and up to ``largest`` bytes; with
    ``quick``, the least of them that can be fitted.

    Products: cubes, oblong ones, and some a little over and under whole tiles, which show what
    the matrix unit rounds up. Passes: a few tiny ones for the launch, and large ones past every
    cache. Collectives: from 1 KiB, in steps of 4.
    """
    u = unit
    cubes = [(s, s, s) for s in (u, 2 * u, 4 * u, 8 * u)]
    oblong = [
        (8 * u, u, 4 * u), (4 * u, 8 * u, u), (2 * u, 8 * u, 2 * u), (16 * u, 4 * u, u),
        (8 * u, 4 * u, 2 * u), (4 * u, 2 * u, 8 * u),
    ]  # fmt: skip
    uneven = [
        (4 * u, 4 * u + u // 16, 4 * u), (4 * u, u // 16, 4 * u), (4 * u, 3 * u // 32, 4 * u),
        (u - u // 32, u - u // 32, 4 * u), (4 * u, 4 * u, u - u // 32), (4 * u, 5 * u // 16, 2 * u),
    ]  # fmt: skip
    tiny = [2**12, 2**14, 2**16]
    large = [largest // 2, largest, 2 * largest, 4 * largest]
    transfers = [2**n for n in range(10, 31, 2) if 2**n <= largest]
    if quick:
        ends = (2**12, 2**16, largest // 4, largest)
        return Sweep((*cubes[1:3], *oblong[2:]), ends[1:], ends, call=0.002, repeats=3)
    return Sweep(tuple(cubes + oblong + uneven), tuple(tiny + large), tuple(transfers))


@dataclass(frozen=True)
class Work:
    """One run of what is measured: from the value that is carried from run to run, and others.

    arrays: the shapes of both on one device; first, scale: of the numbers in what is carried and
    in the others.
    """

    run: Callable[..., Any]
    arrays: tuple[tuple[int, ...], ...]
    dtype: Any
    first: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Bench:
    """The devices that are measured, as a mesh, and how."""

    mesh: Mesh
    sweep: Sweep

    @property
    def sharding(self) -> NamedSharding:
        """Every device has a block of its own."""
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    def lower(self, work: Work, runs: int | None) -> jax.stages.Lowered:
        """A program of that many runs; with None, of as many as its first argument says."""
        spec = P(self.mesh.axis_names)

        def looped(count: Any, first: Any, *others: Any) -> Any:
            upto = count if runs is None else runs
            return lax.fori_loop(0, upto, lambda _, carried: work.run(carried, *others), first)

        mapped = jax.shard_map(
            looped,
            mesh=self.mesh,
            in_specs=(P(), *(spec for _ in work.arrays)),
            out_specs=spec,
            check_vma=False,
        )
        shapes = [
            jax.ShapeDtypeStruct(self.whole(shape), work.dtype, sharding=self.sharding)
            for shape in work.arrays
        ]
        return jax.jit(mapped).lower(jax.ShapeDtypeStruct((), jnp.int32), *shapes)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.mesh.devices.size * shape[0], *shape[1:])

    def filled(self, work: Work) -> list[jax.Array]:
        """Normal random numbers: products of zeros draw less power, and let the clock rise."""
        made = []
        for i, shape in enumerate(work.arrays):
            scale = work.scale if i else work.first
            block = np.resize(scale * PATTERN, shape).astype(work.dtype)
            made.append(
                jax.make_array_from_callback(
                    self.whole(shape), self.sharding, lambda _, block=block: block
                )
            )
        return made

    def timed(self, work: Work) -> float:
        """Seconds of one run: median over calls of a program that makes many."""
        arrays = self.filled(work)
        # A GPU's loop asks the host whether to go on, unless it knows how often.
        fixed = self.mesh.devices.flat[0].platform == "gpu"
        any_count = None if fixed else self.lower(work, None).compile()

        def call(runs: int) -> Callable[[], float]:
            program = any_count or self.lower(work, runs).compile()

            def timer() -> float:
                start = time.perf_counter()
                jax.block_until_ready(program(np.int32(runs), *arrays))
                return time.perf_counter() - start

            timer()  # warm-up
            return timer

        runs = 1
        timer = call(runs)
        once = min(timer(), timer())
        if agreed(once < self.sweep.call):
            # What one call takes is mostly its launch: a few runs more tell what a run takes.
            few = call(FEW)
            each = max((min(few(), few()) - once) / (FEW - 1), self.sweep.call / MOST_RUNS)
            runs = agreed(max(FEW, round(self.sweep.call / each)))
            timer = call(runs)
        return statistics.median(timer() for _ in range(self.sweep.repeats)) / runs


def points(bench: Bench) -> list[Callable[[], Point]]:
    """One call for each point, in an order that mixes them, so that a part is a sample."""
    found: dict[str, Callable[[], Point]] = {}

    def add(kind: Callable[..., Point], *arguments: Any) -> None:
        name = hashlib.sha256(repr((kind.__name__, arguments)).encode()).hexdigest()
        found[name] = lambda: kind(bench, *arguments)

    for dtype in bench.sweep.dtypes:
        for m, n, k in bench.sweep.products:
            add(product, m, n, k, dtype)
    for size in bench.sweep.passes:
        for inputs in (1, 2, 3):
            add(memory_pass, size, inputs)
    for axis, size in enumerate(bench.mesh.devices.shape):
        if size > 1:
            for kind in KINDS:
                for full in bench.sweep.transfers:
                    add(transfer, kind, axis, dividing(full, size))
    return [found[name] for name in sorted(found)]


def dividing(full: int, size: int) -> int:
    """``full`` bytes, or the next more that are whole rows on each of ``size`` devices."""
    row = LANES * ITEM * size
    return -(-full // row) * row


def measure(bench: Bench, seconds: float) -> Iterator[tuple[int, int, Point]]:
    """Points as they are measured, as (done, of how many, point). Ends after ``seconds``, done or
    not; several processes of one mesh end at the same point, that of the first."""
    calls = points(bench)
    start = time.monotonic()
    for done, call in enumerate(calls, start=1):
        yield done, len(calls), call()
        if agreed(time.monotonic() - start > seconds):
            return


def agreed(value: int) -> int:
    """The first process's value: all must run the same collectives equally often."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def product(bench: Bench, m: int, n: int, k: int, dtype: str) -> Product:
    return Product(m, n, k, dtype, bench.timed(product_work(m, n, k, dtype)))


def product_work(m: int, n: int, k: int, dtype: str) -> Work:
    """[m, k] x [k, n] on every device."""

    def run(carried: Any, b: Any) -> Any:
        # One element of the result goes into the next run; the barrier keeps all the others.
        a, made = lax.optimization_barrier((carried, carried @ b))
        return a.at[0, 0].set(made[0, 0])

    return Work(run, ((m, k), (k, n)), DTYPES[dtype], scale=k**-0.5)


def memory_pass(bench: Bench, size: int, inputs: int) -> Pass:
    return Pass((inputs + 1) * size, inputs, bench.timed(pass_work(size, inputs)))


def pass_work(size: int, inputs: int) -> Work:
    """An elementwise fusion of ``inputs`` arrays of ``size`` bytes into one, on every device."""

    def run(carried: Any, *others: Any) -> Any:
        made = carried * 0.5 + 0.25
        for other in others:
            made = made + other
        return lax.optimization_barrier(made)

    return Work(run, ((size // ITEM // LANES, LANES),) * inputs, jnp.float32)


def transfer(bench: Bench, kind: str, axis: int, full: int) -> Transfer:
    size, name = bench.mesh.devices.shape[axis], bench.mesh.axis_names[axis]
    return Transfer(kind, axis, full, bench.timed(transfer_work(kind, str(name), size, full)))


def transfer_work(kind: str, name: str, size: int, full: int) -> Work:
    """One collective along the mesh axis ``name`` of ``size`` devices, in all its lines at once;
    ``full`` bytes is the larger of what a device holds before and after."""
    rows = full // ITEM // LANES
    held = rows // size if kind == "all_gather" else rows
    ring = [(i, (i + 1) % size) for i in range(size)]

    def run(carried: Any) -> Any:
        match kind:
            case "all_gather":
                made = lax.all_gather(carried, name, tiled=True)
                return lax.optimization_barrier(made)[:held]
            case "reduce_scatter":
                made = lax.psum_scatter(carried, name, tiled=True)
                return lax.dynamic_update_slice(carried, lax.optimization_barrier(made), (0, 0))
            case "all_reduce":
                made = lax.psum(carried, name)
            case "all_to_all":
                made = lax.all_to_all(carried, name, 0, 0, tiled=True)
            case _:
                made = lax.ppermute(carried, name, ring)
        return lax.optimization_barrier(made)

    return Work(run, ((held, LANES),), jnp.float32, first=0.0)  # sums of sums stay finite
