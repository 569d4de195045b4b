"""What a plan decides, under names that a person can find and change.

``decisions`` reads them off a plan; ``assign`` makes of them, changed or not, an assignment for
the program, and trusts nothing: whatever is not there, not legal by the algebra or not consistent
is told with the name that it has in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from neocc.cost.algorithms import FORMULAS
from neocc.cost.choice import runs
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh, Strategy, Through
from neocc.ir.ops import OPS
from neocc.ir.ops.base import SEQUENTIAL
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import Assignment, Boundary, op_layouts, ring_fault
from neocc.passes.layout.algebra import moves as legal_moves
from neocc.passes.layout.build import FOLLOWERS, unary_strategies
from neocc.passes.layout.cluster import Cluster
from neocc.passes.layout.notation import layout_text
from neocc.passes.names import Names, program_names, resharded, result_name
from neocc.passes.partition.verify import layout_of
from neocc.passes.plan import Plan

Moves = frozenset[tuple[Layout, Layout]]
Algorithms = Mapping[tuple[Layout, Layout], str]


@dataclass(frozen=True)
class RegionDecisions:
    """One region's part.

    ops: the names of all its ops, in order. arguments: of a loop, how each lies that it is given,
    carried ones at the end of a step too. outputs: how what it stacks lies. strategies: of each
    fused group, under the name of its first op; an op that only relabels or casts, and that has no
    entry, takes its operand as that lies. moves: the reshards of each value, by its name;
    algorithms: what runs those that XLA's own collectives do not.
    """

    name: str
    ops: tuple[str, ...]
    arguments: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    strategies: Mapping[str, Strategy]
    moves: Mapping[str, Moves]
    algorithms: Mapping[str, Algorithms] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """stored: how each input lies, which is how the output that replaces it lies; outputs: how the
    others do; regions: in the order of ``bodies``. saved: what happens to an activation kept for
    the backward pass; microbatches: parts that a batch is run in; zigzag: devices of the ring in
    whose order sequences lie, if they do in one."""

    stored: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    regions: tuple[RegionDecisions, ...]
    saved: Mapping[str, str] = field(default_factory=dict)
    microbatches: int = 1
    zigzag: int | None = None

    @property
    def offload(self) -> bool:
        """Whether anything lies on the hosts."""
        return any(lay.host for r in self.regions for lay in r.arguments.values())


def decisions(plan: Plan) -> Decisions:
    """What a plan decides; an entry that ``assign`` would make up by itself is left out."""
    program, assignment = plan.program, plan.assignment
    body = assignment.boundaries[program.body]
    names = program_names(program)
    inputs = [i.name for i in program.inputs]
    chosen = chosen_algorithms(plan)
    ends = zip(program.outputs, body.outputs, strict=True)
    return Decisions(
        dict(zip(inputs, body.args, strict=True)),
        {name: layout for name, layout in ends if name not in inputs},
        tuple(region_decisions(n, assignment, chosen) for n in names),
        plan.saved,
        plan.ready.microbatches,
        plan.ready.zigzag,
    )


def chosen_algorithms(plan: Plan) -> dict[Value, dict[tuple[Layout, Layout], str]]:
    """Of each value of a plan's program, what runs those of its moves that XLA's own collectives
    do not."""
    found: dict[Value, dict[tuple[Layout, Layout], str]] = {}
    for value, op in resharded(plan.program, plan.partitioned.program):
        if "algorithm" in op.attrs:
            ends = (layout_of(op.operands[0]), layout_of(op.result))
            found.setdefault(value, {})[ends] = op.attrs["algorithm"]
    return found


def region_decisions(
    names: Names,
    assignment: Assignment,
    chosen: Mapping[Value, Algorithms],
) -> RegionDecisions:
    region, carries = names.body.region, names.body.carries
    boundary = assignment.boundaries[region]
    arguments: dict[str, Layout] = {}
    outputs: dict[str, Layout] = {}
    if carries is not None:
        arguments = dict(zip(names.arguments, boundary.args, strict=True))
        stacked = zip(names.outputs[carries:], boundary.outputs[carries:], strict=True)
        outputs = dict(stacked)
    made: dict[Value, Layout] = dict(zip(region.args, boundary.args, strict=True))
    strategies: dict[str, Strategy] = {}
    firsts = {c.ops[0]: name for name, c in names.groups.items()}
    for op in region.ops:
        if op.kind == "repeat":
            made.update(zip(op.results, assignment.boundaries[op.regions[0]].outputs, strict=True))
            continue
        strategy = assignment.strategies[op]
        made.update(zip(op.results, op_layouts(op, strategy)[1], strict=True))
        if op in firsts and strategy != by_itself(op, names.groups[firsts[op]], made, strategy):
            strategies[firsts[op]] = strategy
    used = assignment.moves or {}
    moves = {name: used[v] for name, v in names.values.items() if used.get(v)}
    algorithms = {name: chosen[v] for name, v in names.values.items() if v in chosen}
    return RegionDecisions(
        names.body.name,
        tuple(names.ops),
        arguments,
        outputs,
        strategies,
        moves,
        algorithms,
    )


def by_itself(
    op: Op, group: Cluster, made: Mapping[Value, Layout], like: Strategy
) -> Strategy | None:
    """The strategy of an op that the file need not name: one that follows its operand, or one that
    has nothing to cut. ``like``: any strategy on the same mesh."""
    if len(group.ops) == 1 and op.kind in FOLLOWERS:
        return unary_strategies(op, [made[op.operands[0]]])[0]
    if not OPS[op.kind].space(op).iters:
        return Strategy((None,) * len(like.axes))
    return None


def assign(program: Program, mesh: Mesh, given: Decisions) -> Assignment:
    """The assignment that the decisions describe; its moves those recorded, per value.

    Raises:
        LayoutError: an entry names what is not there, is missing, or is not legal.
    """
    return Assigner(program, mesh, given).assignment()


def near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; there is none" if not known else f"; there are {len(known)}, like {known[0]!r}"


class Assigner:
    """Walks the program beside the decisions; only ``assign`` uses it."""

    def __init__(self, program: Program, mesh: Mesh, given: Decisions):
        self.program, self.mesh, self.given = program, mesh, given
        self.names = {n.body.region: n for n in program_names(program)}
        self.strategies: dict[Op, Strategy] = {}
        self.boundaries: dict[Region, Boundary] = {}
        self.moves: dict[Value, Moves] = {}
        self.algorithms: dict[Value, dict[tuple[Layout, Layout], str]] = {}
        repeats = (op.attrs["dim"].name for op in program.body.walk() if op.kind == "repeat")
        self.uncut = frozenset(repeats)

    def assignment(self) -> Assignment:
        program, given = self.program, self.given
        inputs = {i.name: v for i, v in program.named_inputs}
        outputs = dict(zip(program.outputs, program.body.outputs, strict=True))
        free = {name: v for name, v in outputs.items() if name not in inputs}
        same_names("stored", given.stored, inputs)
        same_names("outputs", given.outputs, free)
        ours = [n.body.name for n in self.names.values()]
        theirs = [r.name for r in given.regions]
        if ours != theirs:
            raise LayoutError(
                f"the plan has the regions {', '.join(theirs)}; the program has {', '.join(ours)}"
            )
        self.read = dict(zip(self.names, given.regions, strict=True))
        args = [self.whole("stored", i, given.stored[i], v.type) for i, v in inputs.items()]
        ends = [
            given.stored[name]
            if name in inputs
            else self.whole("outputs", name, given.outputs[name], v.type)
            for name, v in outputs.items()
        ]
        self.region(program.body, args, ends)
        return Assignment(self.strategies, self.boundaries, self.moves, self.algorithms)

    def region(self, region: Region, args: list[Layout], outputs: list[Layout]) -> None:
        """Decides a region whose boundary is known."""
        self.boundaries[region] = Boundary(tuple(args), tuple(outputs))
        names, said = self.names[region], self.read[region]
        where = said.name
        renamed = self.renamed(region)
        entries = {renamed.get(name, name): s for name, s in said.strategies.items()}
        unknown = [name for name in entries if name not in names.groups]
        if unknown:
            fused = {op: name for name in names.groups for op in self.members(names, name)}
            first = fused.get(unknown[0])
            hint = f"; it is fused with {first!r}: change that" if first else None
            raise LayoutError(
                f"{where}: there is no {unknown[0]!r} to give a strategy"
                f"{hint or near(unknown[0], names.groups)}"
            )
        made: dict[Value, Layout] = dict(zip(region.args, args, strict=True))
        group_of = {op: (name, c) for name, c in names.groups.items() for op in c.ops}
        for op in region.ops:
            if op.kind == "repeat":
                made.update(zip(op.results, self.loop(op), strict=True))
                continue
            name, group = group_of[op]
            strategy = entries.get(name)
            if strategy is None:
                nothing = Strategy((None,) * len(self.mesh))
                strategy = by_itself(op, group, made, nothing)
            if strategy is None:
                raise LayoutError(f"{where}: the plan gives no strategy for {name!r}")
            self.check(f"{where}: {name!r}", op, group, strategy)
            self.strategies[op] = strategy
            made.update(zip(op.results, op_layouts(op, strategy)[1], strict=True))
        self.record_moves(names, said, renamed)
        self.record_algorithms(names, said, renamed)

    def members(self, names: Names, group: str) -> list[str]:
        labels = {op: name for name, op in names.ops.items()}
        return [labels[op] for op in names.groups[group].ops]

    def renamed(self, region: Region) -> dict[str, str]:
        """From the file's name of each op, and of what each makes, to today's: lines move where a
        comment is added."""
        names, said = self.names[region], self.read[region]
        ours = list(names.ops)
        kinds = [name.split()[0] for name in said.ops]
        if kinds != [op.kind for op in names.ops.values()]:
            raise LayoutError(
                f"{said.name}: the plan is of a region with other ops ({len(kinds)}) than the "
                f"program's ({len(ours)}): plan again"
            )
        found = dict(zip(said.ops, ours, strict=True))
        for old, (new, op) in zip(said.ops, names.ops.items(), strict=True):
            found |= {result_name(old, i): result_name(new, i) for i in range(len(op.results))}
        for op in region.ops:
            for inner in op.regions:
                loop = self.read[inner].name
                inside = self.renamed(inner)
                found |= {f"{loop}: {old}": f"{loop}: {new}" for old, new in inside.items()}
        return found

    def loop(self, op: Op) -> tuple[Layout, ...]:
        """Decides a repeat's region; how its results lie."""
        region, carries = op.regions[0], op.attrs["carries"]
        names, said = self.names[region], self.read[region]
        renamed = self.renamed(region)
        stacked = {renamed.get(name, name): layout for name, layout in said.outputs.items()}
        same_names(f"{said.name}: arguments", said.arguments, names.arguments)
        same_names(f"{said.name}: outputs", stacked, names.outputs[carries:])
        args = [
            self.whole(f"{said.name}: argument", name, said.arguments[name], v.type)
            for name, v in zip(names.arguments, region.args, strict=True)
        ]
        outputs = args[:carries] + [
            self.fits(f"{said.name}: output", name, stacked[name], v.type)
            for name, v in zip(names.outputs[carries:], region.outputs[carries:], strict=True)
        ]
        self.region(region, args, outputs)
        return tuple(outputs)

    def whole(self, where: str, name: str, layout: Layout, type: TensorType) -> Layout:
        if layout.partial_axes:
            raise LayoutError(
                f"{where} {name!r}: {layout_text(layout, self.mesh)!r} is a partial sum; what is "
                "stored or enters a loop is whole: reduce it"
            )
        return self.fits(where, name, layout, type)

    def fits(self, where: str, name: str, layout: Layout, type: TensorType) -> Layout:
        """The layout, if a tensor can lie like that."""
        text = layout_text(layout, self.mesh)
        for dim in sorted(layout.dims):
            if not type.has(dim):
                raise LayoutError(f"{where} {name!r}: {text!r} cuts {dim!r}; it is {type}")
            if dim in self.uncut:
                raise LayoutError(
                    f"{where} {name!r}: {text!r} cuts {dim!r}, which a loop runs over"
                )
            parts, size = layout.parts(dim, self.mesh), type.dim(dim).size
            if size % parts:
                raise LayoutError(
                    f"{where} {name!r}: {text!r} cuts {dim!r} into {parts}, which does not divide "
                    f"its size {size}"
                )
        return layout

    def check(self, where: str, op: Op, group: Cluster, strategy: Strategy) -> None:
        """Each axis cuts a dim that may be cut, or passes on what the op is linear in."""
        space = OPS[op.kind].space(op)
        iters = {i.name: i for i in space.iters}
        for axis, choice in zip(self.mesh.names, strategy.axes, strict=True):
            if isinstance(choice, Through):
                self.check_through(f"{where}: {choice}:{axis}", op, group, choice)
            elif choice is not None:
                can = [n for n, i in iters.items() if i.kind != SEQUENTIAL and n not in self.uncut]
                if choice not in can:
                    raise LayoutError(
                        f"{where}: {op.kind} cannot be cut along {choice!r}; it can along "
                        f"{', '.join(can) or 'nothing'}"
                    )
                parts, size = strategy.parts(choice, self.mesh), iters[choice].size
                if size % parts:
                    raise LayoutError(
                        f"{where}: {choice!r} is cut into {parts}, which does not divide its size "
                        f"{size}"
                    )
        if fault := ring_fault(space, strategy, self.mesh):
            raise LayoutError(f"{where}: {fault}")

    def check_through(self, where: str, op: Op, group: Cluster, choice: Through) -> None:
        linear = OPS[op.kind].linear(op)
        if choice.operands not in linear:
            can = ", ".join(str(Through(s)) for s in linear)
            raise LayoutError(
                f"{where} passes a partial sum through {op.kind}, which is not linear in it"
                + (f"; it is in {can}" if can else ": reduce it before")
            )
        if len(group.ops) > 1 or op.kind == "einsum":
            raise LayoutError(
                f"{where} passes a partial sum through {op.kind}; only sums, casts and relabelings "
                "that stand alone do so in a plan: reduce it before"
            )

    def record_moves(self, names: Names, said: RegionDecisions, renamed: Mapping[str, str]) -> None:
        for entry, moves in said.moves.items():
            name = renamed.get(entry, entry)
            if name not in names.values:
                raise LayoutError(
                    f"{said.name}: there is no {entry!r} to move{near(entry, names.values)}"
                )
            value = names.values[name]
            for source, target in moves:
                where = f"{said.name}: moves of {entry!r}:"
                self.fits(where, "before", source, value.type)
                self.fits(where, "after", target, value.type)
                if all(m.target != target for m in legal_moves(source, value.type, self.mesh)):
                    raise LayoutError(
                        f"{where} no one collective makes {layout_text(target, self.mesh)!r} of "
                        f"{layout_text(source, self.mesh)!r}"
                    )
            self.moves[value] = moves

    def record_algorithms(
        self, names: Names, said: RegionDecisions, renamed: Mapping[str, str]
    ) -> None:
        for entry, algorithms in said.algorithms.items():
            where = f"{said.name}: algorithms of {entry!r}:"
            value = names.values.get(renamed.get(entry, entry))
            for (source, target), name in algorithms.items():
                moved = () if value is None else self.moves.get(value, ())
                texts = [layout_text(lay, self.mesh) for lay in (source, target)]
                if value is None or (source, target) not in moved:
                    raise LayoutError(f"{where} the plan has no move {' -> '.join(texts)!r} of it")
                found = legal_moves(source, value.type, self.mesh)
                move = next(m for m in found if m.target == target)
                if (move.kind, name) not in FORMULAS:
                    known = [n for kind, n in FORMULAS if kind == move.kind]
                    raise LayoutError(
                        f"{where} no algorithm {name!r} runs {move.kind}; one of "
                        f"{', '.join(known) or 'none'}"
                    )
                assert move.axis is not None  # no formula is of another kind
                if not runs(FORMULAS[move.kind, name], self.mesh.sizes[move.axis]):
                    axis, size = self.mesh.axes[move.axis]
                    raise LayoutError(f"{where} {name} cannot run on the {size} devices of {axis}")
                self.algorithms.setdefault(value, {})[source, target] = name


def same_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises:
    LayoutError: something is named that is not there, or something there is not named.
    """
    given, known = list(given), list(known)
    for name in given:
        if name not in known:
            raise LayoutError(f"{where}: there is no {name!r}{near(name, known)}")
    for name in known:
        if name not in given:
            raise LayoutError(f"{where}: the plan says nothing of {name!r}")
