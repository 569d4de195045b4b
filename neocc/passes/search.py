"""The outer choices: the mesh's shape, the wires that each axis lies on, the parts of the batch.

Each combination is a layout problem of its own. All mappings of a mesh are bounded at once, by
wires as fast as any of them has for each transfer; what such a bound rules out is not solved. The
least of all bounds is a bound of everything that was searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from neocc.cost.choice import STANDARD_ONLY, Collectives
from neocc.cost.hardware import Chip, HardwareError
from neocc.cost.mappings import mappings, mesh_shapes
from neocc.cost.model import CostModel
from neocc.cost.topology import Topology
from neocc.ir.errors import LayoutError, NeoccError
from neocc.ir.mesh import AXIS_NAMES, Mesh
from neocc.ir.program import Program
from neocc.passes.layout.bound import Relaxation
from neocc.passes.layout.build import build
from neocc.passes.layout.objective import MICRO
from neocc.passes.layout.prices import improve, value
from neocc.passes.layout.problem import Problem
from neocc.passes.layout.rules import given_layout
from neocc.passes.layout.solve import MARGIN, Solution, solve
from neocc.passes.layout.within import TOLERANCE, bound_within, seems_to_fit, solve_within
from neocc.passes.overlap import overlapped
from neocc.passes.plan import SEARCH, USABLE, Plan, Ready, costed, in_best_order, prepare
from neocc.passes.rivals import no_slower

MOST_PARTS = 64  # parts of a batch that are tried
SLOWER = "no layout is faster than the best plan"
NEAR = 0.02  # in a sweep of meshes: parts that may gain less than this are told by their bound
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
    offload: bool = False,
    collectives: Collectives = STANDARD_ONLY,
) -> Searched:
    """The best plan over meshes, their mappings, and numbers of microbatches (ascending); with
    ``every``, one of each mesh that is not far from the best.

    More parts than a number that a bound rules out are not tried: splitting a batch further runs
    the same work in smaller pieces and moves weights more often, so only memory asks for it.
    ``watch(done, of)`` hears how many meshes are through. ``seconds``: what each search within
    memory may take. ``offload``, ``collectives``: as in ``make_plan``.

    Raises:
        LayoutError: the layout names what is not there.
    """
    available = USABLE * chip.hbm_bytes if memory_limit is None else memory_limit
    tried: list[Tried] = []
    bounded = []
    for number, mesh in enumerate(meshes):
        watch(number, 2 * len(meshes))
        try:
            collectives.check(mesh, chip)
        except LayoutError as error:
            tried.append(Tried(mesh, microbatches[0], math.inf, None, error.message))
            continue
        problems = Problems(program, chip, mesh, layout, offload, collectives)
        bounded.append((problems.quick_bound(microbatches[0]), number, problems))
    bounded.sort(key=lambda b: b[:2])
    best: tuple[Plan, Problems] | None = None
    likely: int | None = None
    for done, (bound, _, problems) in enumerate(bounded):
        watch(len(meshes) + done, 2 * len(meshes))
        known = best[0] if best is not None and best[0].fits else None
        far = FAR if every else 1.0
        if known is not None and no_better(bound / far, known):
            why = f"no layout is within {FAR:g} times the best step" if every else SLOWER
            tried.append(Tried(problems.mesh, microbatches[0], bound, None, why))
            continue
        if likely is None:
            likely = problems.likely(microbatches, available)
        found = problems.search(
            microbatches,
            likely,
            available,
            seconds,
            None if every else known,
            NEAR if every else 0.0,
        )
        tried += found
        problems.known.clear()
        plans = [t.plan for t in found if t.plan is not None]
        mine = min(plans, key=rank, default=None)
        if mine is not None and (best is None or rank(mine) < rank(best[0])):
            best = (mine, problems)
            likely = mine.ready.microbatches
    watch(2 * len(meshes), 2 * len(meshes))
    if best is None:
        return Searched(None, tuple(tried))
    plan, problems = best
    if plan.fits and plan.solution.gap > TOLERANCE:
        plan = min(plan, problems.solve_on(plan, seconds), key=rank)
        plan = no_slower(plan, [n for n in microbatches if n <= plan.ready.microbatches])
    plan = in_best_order(plan, given_layout(plan.ready.given))
    return Searched(overlapped(plan), tuple(tried))


def rank(plan: Plan) -> tuple[bool, float]:
    """Plans that fit first, the fastest of them; of others the one that needs least."""
    return (not plan.fits, plan.solution.objective if plan.fits else plan.memory.peak)


def no_better(bound: float, plan: Plan) -> bool:
    return bound >= plan.solution.objective * (1 - TOLERANCE)


@dataclass(frozen=True)
class Problems:
    """The layout problems of one mesh; ``known``: those of numbers of microbatches, relaxed."""

    program: Program
    chip: Chip
    mesh: Mesh
    layout: str
    offload: bool = False
    collectives: Collectives = STANDARD_ONLY
    known: dict[int, Relaxation] = field(default_factory=dict)

    @property
    def mappings(self) -> tuple[Topology, ...]:
        return mappings(self.chip, self.mesh.sizes, collectives=self.collectives)

    def cost_on(self, laid: Topology) -> CostModel:
        return CostModel.of(self.chip, self.mesh, laid, self.offload, self.collectives)

    def ready(self, count: int, cost: CostModel) -> Ready:
        made = prepare(self.program, self.mesh, self.chip, self.layout, None, count)
        return replace(made, cost=cost)

    def problem(self, ready: Ready) -> Problem:
        return build(ready.program, self.mesh, ready.cost, given_layout(ready.given))

    def fastest_wires(self, count: int) -> Problem:
        """The problem under which every plan costs no more than on any mapping."""
        cost = CostModel.floor(self.chip, self.mesh, self.mappings, self.offload, self.collectives)
        return self.problem(self.ready(count, cost))

    def relaxed(self, count: int) -> Relaxation:
        """The relaxation of ``fastest_wires``, under no prices yet."""
        if count not in self.known:
            self.known[count] = Relaxation(self.fastest_wires(count))
            self.known[count].settle()
        return self.known[count]

    def quick_bound(self, count: int) -> float:
        """``bound``, if not as near."""
        return value(self.relaxed(count), True) / MICRO

    def bound(self, count: int) -> float:
        """Seconds below which no plan is, on any mapping and in any memory."""
        relaxation = self.relaxed(count)
        improve(relaxation, (), None, MARGIN, math.inf)
        return value(relaxation, True) / MICRO

    def likely(self, microbatches: Sequence[int], available: float) -> int:
        """The least number for which memory seems not to be short; the first if it is for all that
        may be within ``FAR`` of that."""
        first = microbatches[0]
        for count in microbatches:
            if self.quick_bound(count) > FAR * self.quick_bound(first):
                break
            if seems_to_fit(self.relaxed(count), available):
                return count
        return first

    def search(
        self,
        microbatches: Sequence[int],
        likely: int,
        available: float,
        seconds: float,
        rival: Plan | None,
        near: float,
    ) -> list[Tried]:
        """What comes of the numbers of microbatches, from the ``likely`` one on: with more parts
        while memory is short, then with fewer. Those that bounds rule out are not solved: more
        parts only by what they cost in any memory, fewer also by what fits. ``rival``: a plan that
        any other one is to beat. ``near``: nor are those solved that are no more than this share
        below the bound of one that is."""
        start = microbatches.index(likely)
        tried: list[Tried] = []
        mine, more = rival, True
        for count in (*microbatches[start:], *reversed(microbatches[:start])):
            if count > likely and not more:
                continue
            bound = self.quick_bound(count)
            if mine is not None:
                if count > likely and not no_better(bound, mine):
                    bound = self.bound(count)
                if no_better(bound, mine):
                    more = False
                else:
                    least = min((t.bound for t in tried if t.plan is not None), default=0.0)
                    enough = mine.solution.objective
                    if near and least > 0 and not no_better(least, mine):
                        enough = (1 - near) * least  # it is told by its bound anyway
                    bound = max(bound, bound_within(self.relaxed(count), available, enough))
                if no_better(bound, mine):
                    parts = mine.ready.microbatches
                    why = SLOWER if mine is rival else f"no layout is faster than with {parts}"
                    tried.append(Tried(self.mesh, count, bound, None, why))
                    continue
                least = min((t.bound for t in tried if t.plan is not None), default=0.0)
                if near and bound >= (1 - near) * least > 0:
                    why = f"within {100 * near:g} % of the bound with {mine.ready.microbatches}"
                    tried.append(Tried(self.mesh, count, bound, None, why))
                    continue
            try:
                found, short = self.solve(count, available, seconds)
            except NeoccError as error:
                tried.append(Tried(self.mesh, count, bound, None, error.message))
                continue
            assert found.plan is not None
            tried.append(replace(found, bound=max(bound, found.bound)))
            more = more and (short or not found.plan.fits)
            if found.plan.fits and (mine is None or rank(found.plan) < rank(mine)):
                mine = found.plan
        return tried

    def solve(self, count: int, available: float, seconds: float) -> tuple[Tried, bool]:
        """The best layout for the fastest wires, on the mapping where it costs least: on no mapping
        is any faster than it would be with such wires. And whether memory was short."""
        relaxation = self.relaxed(count)
        ideal = relaxation.problem
        fastest = solve(ideal, relaxation=relaxation)
        solution, memory = solve_within(ideal, available, seconds, fastest)
        laid = min(self.mappings, key=lambda t: self.time_on(t, ideal, solution))
        ready = self.ready(count, ideal.cost)
        # The problem's program is the one that the solution is of.
        ready = replace(ready, program=ideal.program)
        ties = solution.objective - costed(ready, ideal, solution, memory, available).timeline.step
        ready = replace(ready, cost=self.cost_on(laid))
        problem = replace(ideal, cost=ready.cost)
        plan = costed(ready, problem, solution, memory, available)
        slower = replace(solution, objective=plan.timeline.step + ties)
        plan = replace(plan, solution=slower)
        bound = solution.bound if plan.fits else math.inf
        return Tried(self.mesh, count, bound, plan), solution is not fastest

    def solve_on(self, plan: Plan, seconds: float) -> Plan:
        """The best plan on the mapping of one, which it is itself where time does not do to find
        one; its bound is of all mappings still."""
        problem = self.problem(plan.ready)
        try:
            solution, memory = solve_within(problem, plan.memory_limit, seconds)
        except NeoccError:
            return plan
        solution = replace(solution, bound=min(solution.bound, plan.solution.bound))
        return costed(plan.ready, problem, solution, memory, plan.memory_limit)

    def time_on(self, laid: Topology, problem: Problem, solution: Solution) -> float:
        """Seconds that a solution's transfers take on a mapping."""
        there = replace(problem, cost=self.cost_on(laid))
        used = solution.assignment.moves or {}
        return sum(
            there.seconds(flow, move)
            for flow in problem.flows
            for source, target in used.get(flow.value, ())
            for move in problem.moves_from(source, flow.value.type)
            if move.target == target
        )
