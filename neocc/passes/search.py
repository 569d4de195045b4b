"""The outer choices: the mesh's shape, the wires that each axis lies on, the parts of the batch.

Each combination is a layout problem of its own. All mappings of a mesh are bounded at once, by
wires as fast as any of them has for each transfer; what such a bound rules out is not solved. The
least of all bounds is a bound of everything that was searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from neocc.cost.hardware import Chip, HardwareError
from neocc.cost.mappings import mappings, mesh_shapes
from neocc.cost.model import CostModel
from neocc.cost.topology import Topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import AXIS_NAMES, Mesh
from neocc.ir.program import Program
from neocc.passes.layout.objective import MICRO
from neocc.passes.layout.prices import value
from neocc.passes.layout.problem import Problem, build
from neocc.passes.layout.rules import given_layout
from neocc.passes.layout.solve import Solution, floor
from neocc.passes.layout.within import TOLERANCE, solve_within
from neocc.passes.plan import SEARCH, USABLE, Plan, Ready, costed, prepare

MOST_PARTS = 64  # parts of a batch that are tried
SLOWER = "no layout is faster than the best plan"
FAR = 1.5  # a mesh whose bound is so many times the best step is told by its bound


@dataclass(frozen=True)
class Tried:
    """What came of a mesh with the batch in so many parts: its best plan, or, where it has none,
    why; ``bound``: seconds (with what ties count for) below which no plan of it that fits is, on
    any of its mappings."""

    mesh: Mesh
    microbatches: int
    bound: float
    plan: Plan | None = None
    reason: str = ""


@dataclass(frozen=True)
class Searched:
    """``best``: the fastest plan that fits, else the one that needs least memory; None where
    nothing has a plan."""

    best: Plan | None
    tried: tuple[Tried, ...]

    @property
    def bound(self) -> float:
        """Seconds below which no plan that fits is, of all that was searched."""
        return min((t.bound for t in self.tried), default=math.inf)

    @property
    def gap(self) -> float:
        """How far below the best plan's objective, as a share of it, another could be."""
        if self.best is None or not self.best.fits:
            return math.inf
        objective = self.best.solution.objective
        return max(0.0, (objective - self.bound) / objective)


def parts_of(program: Program, most: int = MOST_PARTS) -> list[int]:
    """Numbers of microbatches to try: powers of two that divide the batch."""
    batch = program.dims.get("batch")
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return [1] if batch is None else [p for p in powers if batch.size % p == 0]


def meshes_of(chip: Chip, chips: int, axes: int = 3) -> list[Mesh]:
    """Every mesh of so many devices that the chip comes in, up to the order of its axes.

    Raises:
        HardwareError: it comes in no such number.
    """
    shapes = mesh_shapes(chips, axes)
    found = []
    for shape in shapes:
        try:
            mappings(chip, shape)
        except HardwareError:
            if shape is shapes[-1] and not found:
                raise
            continue
        found.append(Mesh(tuple(zip(AXIS_NAMES, shape, strict=False))))
    return found


def search(
    program: Program,
    chip: Chip,
    meshes: Sequence[Mesh],
    microbatches: Sequence[int],
    layout: str = "",
    memory_limit: float | None = None,
    every: bool = False,
    watch: Callable[[int, int], None] = lambda done, of: None,
    seconds: float = SEARCH,
) -> Searched:
    """The best plan over meshes, their mappings, and numbers of microbatches (ascending); with
    ``every``, one of each mesh that is not far from the best.

    More parts than a number that a bound rules out are not tried: splitting a batch further runs
    the same work in smaller pieces and moves weights more often, so only memory asks for it.
    ``watch(done, of)`` hears how many meshes are through. ``seconds``: what each search within
    memory may take.

    Raises:
        LayoutError: the layout names what is not there.
    """
    available = USABLE * chip.hbm_bytes if memory_limit is None else memory_limit
    tried: list[Tried] = []
    bounded = []
    for number, mesh in enumerate(meshes):
        watch(number, 2 * len(meshes))
        problems = Problems(program, chip, mesh, layout)
        bound = problems.bound(microbatches[0])
        bounded.append((bound, number, mesh, problems))
    bounded.sort(key=lambda b: b[:2])
    best: tuple[Plan, Problems] | None = None
    far = FAR if every else 1.0
    for done, (bound, _, mesh, problems) in enumerate(bounded):
        watch(len(meshes) + done, 2 * len(meshes))
        mine: Plan | None = None
        for count in microbatches:
            if count != microbatches[0]:
                bound = problems.bound(count)
            why = ""
            if mine is not None and mine.fits and no_better(bound, mine):
                why = f"no layout is faster than with {mine.ready.microbatches}"
            elif best is not None and best[0].fits and no_better(bound / far, best[0]):
                why = f"no layout is within {FAR:g} times the best step" if every else SLOWER
            if why:
                tried.append(Tried(mesh, count, bound, None, why))
                break
            try:
                found = problems.solve(count, available, seconds)
            except NeoccError as error:
                tried.append(Tried(mesh, count, bound, None, error.message))
                continue
            tried.append(replace(found, bound=max(bound, found.bound)))
            assert found.plan is not None
            mine = found.plan if mine is None else min(mine, found.plan, key=rank)
        if mine is not None and (best is None or rank(mine) < rank(best[0])):
            best = (mine, problems)
    watch(2 * len(meshes), 2 * len(meshes))
    if best is None:
        return Searched(None, tuple(tried))
    plan, problems = best
    if plan.fits and plan.solution.gap > TOLERANCE:
        plan = min(plan, problems.solve_on(plan, seconds), key=rank)
    return Searched(plan, tuple(tried))


def rank(plan: Plan) -> tuple[bool, float]:
    """Plans that fit first, the fastest of them; of others the one that needs least."""
    return (not plan.fits, plan.solution.objective if plan.fits else plan.memory.peak)


def no_better(bound: float, plan: Plan) -> bool:
    return bound >= plan.solution.objective * (1 - TOLERANCE)


@dataclass(frozen=True)
class Problems:
    """The layout problems of one mesh."""

    program: Program
    chip: Chip
    mesh: Mesh
    layout: str

    @property
    def mappings(self) -> tuple[Topology, ...]:
        return mappings(self.chip, self.mesh.sizes)

    def ready(self, count: int, cost: CostModel) -> Ready:
        made = prepare(self.program, self.mesh, self.chip, self.layout, None, count)
        return replace(made, cost=cost)

    def problem(self, ready: Ready) -> Problem:
        return build(ready.program, self.mesh, ready.cost, given_layout(ready.given))

    def fastest_wires(self, count: int) -> Problem:
        """The problem under which every plan costs no more than on any mapping."""
        cost = CostModel.floor(self.chip, self.mesh, self.mappings)
        return self.problem(self.ready(count, cost))

    def bound(self, count: int) -> float:
        """Seconds below which no plan is, on any mapping and in any memory."""
        return value(floor(self.fastest_wires(count), (), math.inf), True) / MICRO

    def solve(self, count: int, available: float, seconds: float) -> Tried:
        """The best layout for the fastest wires, on the mapping where it costs least: on no mapping
        is any faster than it would be with such wires."""
        ideal = self.fastest_wires(count)
        solution, memory = solve_within(ideal, available, seconds)
        laid = min(self.mappings, key=lambda t: self.time_on(t, ideal, solution))
        ready = self.ready(count, ideal.cost)
        ties = solution.objective - costed(ready, ideal, solution, memory, available).timeline.step
        ready = replace(ready, cost=CostModel.of(self.chip, self.mesh, laid))
        problem = replace(ideal, cost=ready.cost)
        plan = costed(ready, problem, solution, memory, available)
        slower = replace(solution, objective=plan.timeline.step + ties)
        plan = replace(plan, solution=slower)
        return Tried(self.mesh, count, solution.bound if plan.fits else math.inf, plan)

    def solve_on(self, plan: Plan, seconds: float) -> Plan:
        """The best plan on the mapping of one; its bound is of all mappings still."""
        problem = self.problem(plan.ready)
        solution, memory = solve_within(problem, plan.memory_limit, seconds)
        solution = replace(solution, bound=min(solution.bound, plan.solution.bound))
        return costed(plan.ready, problem, solution, memory, plan.memory_limit)

    def time_on(self, laid: Topology, problem: Problem, solution: Solution) -> float:
        """Seconds that a solution's transfers take on a mapping."""
        there = replace(problem, cost=CostModel.of(self.chip, self.mesh, laid))
        used = solution.assignment.moves or {}
        return sum(
            there.seconds(flow, move)
            for flow in problem.flows
            for source, target in used.get(flow.value, ())
            for move in problem.moves_from(source, flow.value.type)
            if move.target == target
        )
