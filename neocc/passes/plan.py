"""Plan a program on a mesh: pad, solve within memory, partition, and count what it costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from neocc.cost.algorithms import PRODUCTS, STANDARD
from neocc.cost.choice import RING, RING_KIND, STANDARD_ONLY, Collectives, Way
from neocc.cost.hardware import Chip
from neocc.cost.model import CostModel, formula_flops, on_vector_unit, product_flops
from neocc.cost.products import Overlapped
from neocc.cost.topology import Topology
from neocc.ir.errors import LayoutError, Loc, NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.ops import ATTENTION, COLLECTIVES, HOST_MOVES
from neocc.ir.ops.attention import ring_axis
from neocc.ir.ops.attention_ring import Pairs
from neocc.ir.program import Op, Program, Region, Value
from neocc.passes.hoist import hoist_casts
from neocc.passes.layout.algebra import Assignment, Move, Strategy
from neocc.passes.layout.build import build, hideable_values
from neocc.passes.layout.memory import Memory
from neocc.passes.layout.problem import Problem, Rules
from neocc.passes.layout.rings import gains_in_order, gathered_seconds
from neocc.passes.layout.rules import given_layout, padded_sizes, parse_layout
from neocc.passes.layout.solve import Solution
from neocc.passes.layout.within import solve_within
from neocc.passes.microbatch import split_batch
from neocc.passes.narrow import narrow_products
from neocc.passes.pad import Padding, pad_program
from neocc.passes.partition import Partitioned, Ways, apply
from neocc.passes.partition.apply import marked
from neocc.passes.partition.verify import layout_of
from neocc.passes.products import WORTH, Attrs, choose, priced
from neocc.passes.remat import KEEP, RECOMPUTE, open_values
from neocc.passes.simplify import simplify
from neocc.passes.zigzag import in_zigzag

USABLE = 0.92  # share of HBM that a plan may fill: a compiler's block for temporaries has gaps
SEARCH = 60.0  # seconds for the last search when memory is short


@dataclass(frozen=True)
class Collective:
    """One collective of the plan.

    bytes: what one device puts in; result_bytes: what it gets out; count: times a step runs it;
    seconds: of one run; copying: those of them in which the device itself copies, along its lanes,
    or runs a kernel; hideable: the others can run behind the compute of its region. algorithm:
    what runs it, on a grid of ``grid`` devices; standard: seconds of one run by XLA's own;
    itemsize: bytes of a value.
    inside: what it takes inside products, if it runs so; seconds are then those of its transfers.

    A permute of ring attention bears the id of the op that sends it; pairs: (source, target) places
    along the axis; within: seconds of a run that pass behind the op's own products.
    """

    id: int
    kind: str
    axis: str
    dim: str | None
    tensor: str
    loc: Loc | None
    bytes: int
    result_bytes: int
    count: int
    seconds: float
    copying: float
    hideable: bool
    region: str
    algorithm: str = STANDARD
    grid: tuple[int, ...] = ()
    standard: float = 0.0
    itemsize: int = 1
    inside: Overlapped | None = None
    pairs: Pairs = ()
    within: float = 0.0

    @property
    def behind(self) -> float:
        """Seconds of a step in which it can run behind compute."""
        if self.inside is not None:
            return (self.inside.wires - self.inside.waiting) * self.count
        return (self.seconds - self.copying) * self.count if self.hideable else 0.0


@dataclass(frozen=True)
class Timeline:
    """Predicted seconds of one step. hidden: communication that runs behind compute."""

    compute: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed

    @staticmethod
    def of(compute: float, collectives: Sequence[Collective], share: float) -> Timeline:
        """Of one region: a share of what is hideable hides behind compute as far as there is any.
        What runs inside products has its own part of the compute; the others share the rest."""
        own = sum(c.behind for c in collectives if c.inside is not None)
        others = sum(c.behind for c in collectives if c.inside is None)
        behind = min(share * others, max(0.0, compute - own))
        total = sum(c.seconds * c.count for c in collectives)
        more = sum(c.inside.working * c.count for c in collectives if c.inside is not None)
        # Rings hide what they hide behind their own op, whose seconds have what they wait for.
        within = sum(c.within * c.count for c in collectives)
        waits = sum((c.seconds - c.within) * c.count for c in collectives if c.pairs)
        hidden = behind + own + within
        return Timeline(compute + more - waits, total - hidden, hidden)


@dataclass(frozen=True)
class Ready:
    """A program made ready for a mesh, before anything of its layout is decided.

    source: as the caller gave it; unpadded: simplified; program: padded, what a layout is of.
    layout: as the caller wrote it, and given: the dims that it has each mesh axis cut.
    microbatches: parts that the batch is run in, one after the other. products: collectives run
    inside products where ``cost.collectives`` lets them. zigzag: devices of the ring in whose order
    ``program`` has its sequences (``passes.zigzag``); None: as they come.
    """

    source: Program
    unpadded: Program
    program: Program
    paddings: tuple[Padding, ...]
    mesh: Mesh
    chip: Chip
    cost: CostModel
    layout: str
    given: dict[int, tuple[str, ...]]
    microbatches: int = 1
    products: bool = False
    zigzag: int | None = None

    def in_zigzag(self, devices: int) -> Ready | None:
        """The same with its sequences in the order of a ring, if they can be."""
        program = in_zigzag(self.program, devices)
        return program and replace(self, program=program, zigzag=devices)


@dataclass(frozen=True)
class Plan:
    """A program laid out on a mesh, what it costs, and how good it is proved to be.

    memory_limit: bytes per device that the plan may hold. flops: of matrix products, per device
    and step, recomputation included; model_flops: of the whole unpadded step on all devices
    together, without recomputation. ready: what was planned, with what was still open: program
    and assignment are decided, problem and solution speak of ready's. saved: for each
    value that ready leaves open, ``keep`` or ``recompute``. given: the layout was read, not solved
    for, and nothing is proved of it.
    """

    program: Program
    assignment: Assignment
    paddings: tuple[Padding, ...]
    mesh: Mesh
    chip: Chip
    problem: Problem
    solution: Solution
    partitioned: Partitioned
    collectives: tuple[Collective, ...]
    timeline: Timeline
    memory: Memory
    memory_limit: float
    flops: int
    model_flops: int
    ready: Ready
    saved: Mapping[str, str]
    given: bool = False

    @property
    def topology(self) -> Topology:
        """Where the mesh lies on the devices."""
        return self.problem.cost.topology

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_limit

    @property
    def overlaps(self) -> bool:
        """Whether collectives run inside products."""
        return any(c.inside is not None for c in self.collectives)

    @property
    def mfu(self) -> float:
        """Model FLOP/s over peak FLOP/s of the matrix unit in bf16, all devices."""
        peak_flops = self.chip.peak_flops["bf16"] * self.mesh.size
        step = self.timeline.step
        return self.model_flops / (step * peak_flops) if step else 0.0


def make_plan(
    program: Program,
    mesh: Mesh,
    chip: Chip,
    layout: str = "",
    rules: Rules | None = None,
    memory_limit: float | None = None,
    topology: Topology | None = None,
    microbatches: int = 1,
    offload: bool = False,
    sizes: Mapping[str, int] | None = None,
    collectives: Collectives = STANDARD_ONLY,
) -> Plan:
    """The best plan within a device's memory, or the nearest to fitting (see ``Plan.fits``).

    ``layout``: a full or partial layout in Mesh TensorFlow's syntax, ``batch:x,heads:y``.
    ``memory_limit``: bytes per device; by default ``USABLE`` of the chip's. ``topology``: the
    mapping of the mesh onto the devices (``neocc.cost.mappings``); by default that of the cost
    model. ``microbatches``: parts that the batch is run in (``passes.microbatch``). ``offload``:
    what loops keep for the backward pass may lie in the memory of the devices' hosts. ``sizes``: of
    some dims after padding, in place of what would be chosen. ``collectives``: what may run them.

    Raises:
        LayoutError: the layout names what is not there, or leaves an op no strategy; the batch
            cannot be split; a collective is to run by what cannot run on the mesh.
        HardwareError: offload on a chip whose way to its host the table does not know.
    """
    ready = prepare(
        program, mesh, chip, layout, topology, microbatches, offload, sizes, collectives
    )
    ready = replace(ready, products=collectives.products)
    available = USABLE * chip.hbm_bytes if memory_limit is None else memory_limit
    return laid_out(ready, rules or given_layout(ready.given), available)


def laid_out(ready: Ready, rules: Rules, available: float) -> Plan:
    """The best plan that rules leave free."""
    found = solved(ready, rules, available)
    return in_best_order(costed(ready, *found, available), rules)


def solved(ready: Ready, rules: Rules, available: float) -> tuple[Problem, Solution, Memory]:
    """The best that rules leave free with the sequences in the order that they have."""
    problem = build(ready.program, ready.mesh, ready.cost, rules)
    return problem, *solve_within(problem, available, SEARCH)


def in_best_order(plan: Plan, rules: Rules) -> Plan:
    """The best of a plan and of those that rules leave free with the sequences in the order of a
    ring, for each mesh axis whose ring may gain by that. Its bound is of all of them."""
    ready, found = plan.ready, [plan]
    if ready.cost.collectives.of(RING_KIND) == STANDARD:
        return plan
    for devices in sorted({size for size in ready.mesh.sizes if size > 1}):
        other = ready.in_zigzag(devices)
        if other is None or not gains_in_order(ready.program, other.program, ready.cost):
            continue
        try:
            made = solved(other, rules, plan.memory_limit)
        except NeoccError:  # rules that no such layout follows
            continue
        found.append(costed(other, *made, plan.memory_limit))
    best = min(found, key=lambda p: (not p.fits, p.timeline.step if p.fits else p.memory.peak))
    bound = min(p.solution.bound for p in found)
    return replace(best, solution=replace(best.solution, bound=bound))


def prepare(
    program: Program,
    mesh: Mesh,
    chip: Chip,
    layout: str = "",
    topology: Topology | None = None,
    microbatches: int = 1,
    offload: bool = False,
    sizes: Mapping[str, int] | None = None,
    collectives: Collectives = STANDARD_ONLY,
) -> Ready:
    """What ``make_plan`` does before it decides anything.

    Raises:
        LayoutError: the layout names what is not there, or the batch cannot be split; a collective
            is to run by what cannot run on the mesh.
    """
    given = parse_layout(layout, program, mesh) if layout else {}
    narrow = hoist_casts(narrow_products(program, chip))
    unpadded = split_batch(simplify(narrow), microbatches)
    grown = padded_sizes(unpadded, mesh, given) | dict(sizes or {})
    padded, paddings = pad_program(unpadded, grown)
    check_attention(padded, collectives)
    cost = CostModel.of(chip, mesh, topology, offload, collectives)
    return Ready(
        program,
        unpadded,
        padded,
        tuple(paddings),
        mesh,
        chip,
        cost,
        layout,
        dict(given),
        microbatches,
    )


def costed(
    ready: Ready, problem: Problem, solution: Solution, memory: Memory, available: float
) -> Plan:
    """The plan that a solution is: its partitioned program, and all that this costs."""
    mesh = ready.mesh
    program, assignment = problem.resolve(solution.picked, solution.assignment)
    partitioned = apply(
        program,
        mesh,
        assignment,
        lambda m, t: problem.move_seconds(m, t) + 1e-12,
        ways(assignment, ready.cost),
    )
    if ready.cost.collectives.attention:
        own = partial(in_kernels, ready.cost)
        partitioned = replace(partitioned, program=marked(partitioned.program, own))
    collectives = list_collectives(partitioned, ready.cost)
    if ready.products and assignment.algorithms is None:
        chosen = inside_products(partitioned, problem, solution, collectives)
        partitioned = replace(partitioned, program=marked(partitioned.program, chosen))
        collectives = list_collectives(partitioned, ready.cost)
    return Plan(
        program=program,
        assignment=assignment,
        paddings=ready.paddings,
        mesh=mesh,
        chip=ready.chip,
        problem=problem,
        solution=solution,
        partitioned=partitioned,
        collectives=tuple(collectives),
        timeline=timeline(problem, solution, collectives),
        memory=memory,
        memory_limit=available,
        flops=local_flops(partitioned.program.body, mesh),
        model_flops=model_flops(ready.unpadded.body),
        ready=ready,
        saved={
            name: RECOMPUTE if problem.recomputes(solution.picked, op) else KEEP
            for name, op in open_values(problem.program).items()
        },
    )


def in_kernels(cost: CostModel, op: Op) -> Attrs:
    """What fused attention of a partitioned program runs as, as an attribute of its."""
    if op.kind not in ATTENTION:
        return {}
    strategy: Strategy = op.attrs["strategy"]
    found = cost.kernels_of(op, lambda dim: strategy.parts(dim, cost.mesh))
    return {"kernel": found.name} if found else {}


def check_attention(program: Program, collectives: Collectives) -> None:
    """Raises:
    LayoutError: kernels are to run fused attention, and there is an op that they never take, or
        none at all.
    """
    asked = collectives.attention
    if asked is None:
        return
    ops = [op for op in program.body.walk() if op.kind in ATTENTION]
    if not ops:
        raise LayoutError(f"attention={asked.name}: {program.name!r} has no fused attention")
    for op in ops:
        if reason := asked.refused(op):
            raise LayoutError(f"attention={asked.name} does not take {op.kind}: {reason}", op.loc)


def ways(assignment: Assignment, cost: CostModel) -> Ways:
    """What runs each move: as the assignment has it, else as the cost model chooses."""
    named = assignment.algorithms

    def way(value: Value, move: Move) -> Way:
        ends = (move.source, move.target)
        name = None if named is None else named.get(value, {}).get(ends, STANDARD)
        if name == PRODUCTS:
            assert move.axis is not None  # nothing else has algorithms
            plain = cost.way(move.kind, move.axis, value.type, ends, STANDARD)
            return replace(plain, algorithm=name, grid=(cost.mesh.sizes[move.axis],))
        return cost.way(move.kind, move.axis, value.type, ends, name)

    return way


@dataclass(frozen=True)
class Body:
    """A region of a program: its name for the reader, how often a step runs it, and its number
    of carried values (None for the whole program's body)."""

    name: str
    region: Region
    trips: int
    carries: int | None


def bodies(region: Region) -> list[Body]:
    """A program's body and those of its repeats, in an order that partitioning keeps. Names
    differ: the second forward loop over ``layers`` is ``layers 2 forward``."""
    seen: Counter[tuple[str, str]] = Counter()

    def nested(body: Body) -> list[Body]:
        found = [body]
        for op in body.region.ops:
            if op.kind == "repeat":
                dim, direction = op.attrs["dim"], "backward" if op.attrs["reverse"] else "forward"
                seen[dim.name, direction] += 1
                count = seen[dim.name, direction]
                number = f" {count}" if count > 1 else ""
                name = f"{dim.name}{number} {direction}"
                trips = body.trips * dim.size
                found += nested(Body(name, op.regions[0], trips, op.attrs["carries"]))
        return found

    return nested(Body("outside layers", region, 1, None))


def origins(region: Region) -> dict[Value, Value]:
    """The value that each resharded copy in a partitioned region is a copy of."""
    found: dict[Value, Value] = {}
    for op in region.ops:
        if op.kind in COLLECTIVES:
            source = op.operands[0]
            found[op.result] = found.get(source, source)
    return found


def list_collectives(partitioned: Partitioned, cost: CostModel) -> list[Collective]:
    """Every collective and local slice of a partitioned program."""
    mesh = partitioned.mesh
    found = []
    for body in bodies(partitioned.program.body):
        hideable: set[Value] = set()
        if body.carries is not None:
            hideable = hideable_values(body.region, body.carries)
        whole = origins(body.region)
        inside = priced(body.region, cost)
        for op in body.region.ops:
            found += ring_collectives(op, body, cost)
            if op.kind not in COLLECTIVES:
                continue
            before = op.operands[0].type.local_bytes(mesh)
            after = op.result.type.local_bytes(mesh)
            kind = "slice" if op.kind == "local_slice" else op.kind
            to_host = op.kind in HOST_MOVES
            axis = None if to_host else mesh.index(op.attrs["axis"])
            ends = (layout_of(op.operands[0]), layout_of(op.result))
            moved = (op.attrs.get("dim"), op.attrs.get("to"))
            copying = cost.copy_seconds(kind, moved, op.result.type, ends)
            algorithm = op.attrs.get("algorithm", STANDARD)
            way = cost.way(kind, axis, op.result.type, ends, algorithm)
            own = inside.get(op)
            found.append(
                Collective(
                    id=op.attrs["id"],
                    kind=kind,
                    axis=op.attrs.get("axis", "host"),
                    dim=op.attrs.get("dim"),
                    tensor=op.operands[0].name,
                    loc=op.loc,
                    bytes=before,
                    result_bytes=after,
                    count=body.trips,
                    seconds=own.wires if own else way.seconds + copying,
                    copying=0.0 if own else copying + way.seconds - way.wires,
                    # Every leg of a value's way hides or none does: the problem prices them alike.
                    hideable=to_host
                    or (whole.get(op.operands[0], op.operands[0]) in hideable and not way.alone),
                    region=body.name,
                    algorithm=PRODUCTS if own else way.algorithm,
                    grid=op.attrs.get("grid", ()),
                    itemsize=op.result.type.itemsize,
                    standard=way.standard + copying,
                    inside=own,
                )
            )
    return found


def ring_collectives(op: Op, body: Body, cost: CostModel) -> list[Collective]:
    """The permutes of ring attention (``standard``: the collectives that they take the
    place of), if it is one."""
    strategy = op.attrs.get("strategy")
    if not isinstance(strategy, Strategy) or (axis := ring_axis(op, strategy)) is None:
        return []
    time = cost.ring(op, strategy)
    assert time is not None
    name, devices = cost.mesh.axes[axis]
    _, gathered = gathered_seconds(op, strategy, cost) or (0.0, 0.0)
    standard = gathered / max(1, sum(p.count for p in time.permutes))
    return [
        Collective(
            id=op.attrs["id"],
            kind="permute",
            axis=name,
            dim=op.attrs["memory"] if p.moving else op.attrs["seq"],
            tensor=f"{', '.join(p.what)} of {op.kind}",
            loc=op.loc,
            bytes=p.bytes,
            result_bytes=p.bytes,
            count=body.trips * p.count,
            seconds=p.seconds,
            copying=0.0,
            hideable=False,
            region=body.name,
            algorithm=RING,
            grid=(devices,),
            standard=standard,
            itemsize=op.operands[0].type.itemsize,
            pairs=p.pairs,
            within=p.hidden,
        )
        for p in time.permutes
    ]


def compute_of(problem: Problem, solution: Solution) -> dict[Region, float]:
    """Seconds of a step that each region of a problem computes."""
    found: dict[Region, float] = defaultdict(float)
    for choice, i in solution.picked.items():
        found[choice.region] += choice.seconds[i]
    return found


def timeline(problem: Problem, solution: Solution, collectives: Iterable[Collective]) -> Timeline:
    """The sum of all regions'."""
    compute = compute_of(problem, solution)
    by_region: dict[str, list[Collective]] = defaultdict(list)
    for c in collectives:
        by_region[c.region].append(c)
    parts = [
        Timeline.of(compute.get(body.region, 0.0), by_region[body.name], problem.cost.overlap)
        for body in bodies(problem.program.body)
    ]
    return Timeline(
        sum(t.compute for t in parts),
        sum(t.exposed for t in parts),
        sum(t.hidden for t in parts),
    )


def inside_products(
    partitioned: Partitioned,
    problem: Problem,
    solution: Solution,
    collectives: Sequence[Collective],
) -> Callable[[Op], Attrs]:
    """Which collectives run inside products, as attributes of theirs: of the kinds that are to, all
    that can; of those that may, where this makes the step shorter."""
    compute, share = compute_of(problem, solution), problem.cost.overlap
    least = WORTH * timeline(problem, solution, collectives).step
    chosen: dict[Op, Attrs] = {}
    regions = zip(bodies(problem.program.body), bodies(partitioned.program.body), strict=True)
    for before, body in regions:
        here = [c for c in collectives if c.region == body.name]

        def seconds(rows: Sequence[Collective], region: Region = before.region) -> float:
            return Timeline.of(compute.get(region, 0.0), rows, share).step

        chosen |= choose(body.region, here, problem.cost, seconds, least)
    return lambda op: chosen.get(op, {})


def local_flops(region: Region, mesh: Mesh, chip: Chip | None = None) -> int:
    """FLOPs of the matrix products that one device runs in a step; with ``chip``, of those that
    its compiler leaves to the matrix unit."""
    total = 0
    for op in region.ops:
        if op.kind == "repeat":
            total += op.attrs["dim"].size * local_flops(op.regions[0], mesh, chip)
        elif op.kind not in COLLECTIVES:
            strategy: Strategy = op.attrs["strategy"]

            def parts(dim: str, s: Strategy = strategy) -> int:
                return s.parts(dim, mesh)

            if chip is None or not on_vector_unit(chip, op, parts):
                total += product_flops(op, parts)
    return total


@dataclass(frozen=True)
class InKernels:
    """Fused attention of a plan that runs as kernels: their name, how many ops of all, seconds of
    a step, and those of the loop over tiles in their place."""

    name: str
    ops: int
    of: int
    seconds: float
    loop: float


def attention_in_kernels(plan: Plan) -> InKernels | None:
    """What kernels run of a plan's fused attention, if any were asked for."""
    asked = plan.ready.cost.collectives.attention
    if asked is None:
        return None
    plain = replace(plan.ready.cost, collectives=STANDARD_ONLY)
    count = of = 0
    seconds = loop = 0.0
    for body in bodies(plan.partitioned.program.body):
        for op in (op for op in body.region.ops if op.kind in ATTENTION):
            strategy: Strategy = op.attrs["strategy"]
            of += 1
            if "kernel" in op.attrs:
                parts = partial(strategy.parts, mesh=plan.mesh)
                count += 1
                seconds += body.trips * plan.ready.cost.op_seconds(op, parts)
                loop += body.trips * plain.op_seconds(op, parts)
    return InKernels(asked.name, count, of, seconds, loop)


def model_flops(region: Region) -> int:
    """FLOPs of a program's matrix products that are not recomputation, on all devices; of fused
    attention those of the form that is not fused, with every score (``formula_flops``)."""
    total = 0
    for op in region.ops:
        if op.kind == "repeat":
            total += op.attrs["dim"].size * model_flops(op.regions[0])
        elif not op.attrs.get("recomputed"):
            total += formula_flops(op)
    return total
