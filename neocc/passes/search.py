"""The outer choices: the mesh's shape, the wires of each axis, the parts of the batch.

Each combination is a layout problem of its own. Bounds rule most of them out: what their choices
cost at the least, then a bound of all their layouts. What is left is solved. The least of all
bounds is a bound of everything that was searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from neocc.cost.hardware import Chip, HardwareError
from neocc.cost.mappings import mappings, mesh_shapes
from neocc.cost.topology import Topology
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import AXIS_NAMES, Mesh
from neocc.ir.program import Program
from neocc.passes.layout.problem import Problem, build
from neocc.passes.layout.rules import given_layout
from neocc.passes.layout.solve import floor
from neocc.passes.layout.within import TOLERANCE, solve_within
from neocc.passes.plan import SEARCH, USABLE, Plan, Ready, costed, prepare

MOST_PARTS = 64  # parts of a batch that are tried
FAR = 1.5  # a group whose bound is so many times the best step is told by its bound


@dataclass(frozen=True)
class Candidate:
    """One combination of the outer choices; ``topology``: where the mesh lies, None for the cost
    model's default."""

    mesh: Mesh
    topology: Topology | None = None
    microbatches: int = 1


@dataclass(frozen=True)
class Tried:
    """What came of a candidate: its plan, or, where it has none, why; ``bound``: seconds below
    which no plan of it is (with what ties count for)."""

    candidate: Candidate
    bound: float
    plan: Plan | None = None
    reason: str = ""


@dataclass(frozen=True)
class Searched:
    """``best``: the fastest plan that fits, else the one that needs least memory; None where no
    candidate has a plan. ``bound``: seconds below which no plan of any candidate that fits is."""

    best: Plan | None
    tried: tuple[Tried, ...]
    bound: float

    @property
    def proved(self) -> bool:
        """No candidate has a faster plan that fits."""
        if self.best is None or not self.best.fits:
            return False
        return self.bound >= self.best.solution.objective * (1 - TOLERANCE)


def parts_of(program: Program, most: int = MOST_PARTS) -> list[int]:
    """Numbers of microbatches to try: powers of two that divide the batch."""
    batch = program.dims.get("batch")
    return (
        [1]
        if batch is None
        else [2**i for i in range(most.bit_length()) if 2**i <= most and batch.size % 2**i == 0]
    )


def meshes_of(chips: int, axes: int = 3) -> list[Mesh]:
    """Every mesh of so many devices, up to the order of its axes."""
    shapes = mesh_shapes(chips, axes)
    return [Mesh(tuple(zip(AXIS_NAMES, s, strict=False))) for s in shapes]


def candidates(
    chip: Chip, meshes: Iterable[Mesh], microbatches: Sequence[int]
) -> Iterator[Candidate]:
    """Every mesh on every mapping that can be the best for some program, in every number of
    parts; a mesh that no slice of the chip holds is left out."""
    for mesh in meshes:
        try:
            laid = mappings(chip, mesh.sizes)
        except HardwareError:
            continue
        for topology in laid:
            for count in microbatches:
                yield Candidate(mesh, topology, count)


def search(
    program: Program,
    chip: Chip,
    tries: Iterable[Candidate],
    layout: str = "",
    memory_limit: float | None = None,
    group: Callable[[Candidate], Hashable] = lambda c: None,
    watch: Callable[[int, int], None] = lambda done, of: None,
    seconds: float = SEARCH,
) -> Searched:
    """The best plan over candidates.

    A candidate is not solved whose bound is no better than the best plan of its ``group`` (by
    default all are one), or ``FAR`` from the best of all. ``watch(done, of)`` hears how far it is.
    ``seconds``: what each search within memory may take.

    Raises:
        LayoutError: the layout names what is not there.
    """
    available = USABLE * chip.hbm_bytes if memory_limit is None else memory_limit
    waiting: list[tuple[float, int, Candidate, Ready, Problem]] = []
    tried: list[Tried] = []
    tries = list(tries)
    for number, c in enumerate(tries):
        try:
            ready = prepare(program, c.mesh, chip, layout, c.topology, c.microbatches)
            problem = build(ready.program, c.mesh, ready.cost, given_layout(ready.given))
        except (LayoutError, HardwareError) as error:
            tried.append(Tried(c, math.inf, None, str(error)))
            continue
        least = sum(min(choice.seconds) for choice in problem.choices)
        waiting.append((least, number, c, ready, problem))
    waiting.sort(key=lambda w: w[:2])
    best: dict[Hashable, Plan] = {}
    fastest = math.inf  # of all that fit

    def ruled_out(bound: float, c: Candidate) -> str:
        mine = best.get(group(c))
        if mine is not None and mine.fits and bound >= mine.solution.objective * (1 - TOLERANCE):
            return "no layout of it is faster"
        return "far from the best" if bound > FAR * fastest else ""

    for done, (least, _, c, ready, problem) in enumerate(waiting):
        watch(len(tried), len(tries))
        bound, why = least, ruled_out(least, c)
        if not why and done:
            bound = max(least, floor(problem, (), math.inf)[0])
            why = ruled_out(bound, c)
        if why:
            tried.append(Tried(c, bound, None, why))
            continue
        try:
            solution, memory = solve_within(problem, available, seconds)
        except NeoccError as error:
            tried.append(Tried(c, bound, None, error.message))
            continue
        plan = costed(ready, problem, solution, memory, available)
        tried.append(Tried(c, solution.bound if plan.fits else math.inf, plan))
        key = group(c)
        best[key] = min((p for p in (best.get(key), plan) if p), key=rank)
        if plan.fits:
            fastest = min(fastest, solution.objective)
    watch(len(tries), len(tries))
    found = min(best.values(), key=rank, default=None)
    return Searched(found, tuple(tried), min((t.bound for t in tried), default=math.inf))


def rank(plan: Plan) -> tuple[bool, float]:
    """Plans that fit first, the fastest of them; of others the one that needs least."""
    return (not plan.fits, plan.solution.objective if plan.fits else plan.memory.peak)
