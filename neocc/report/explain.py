"""Why a plan does what it does at one op or with one tensor, and what else it could have done."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Layout, Mesh, Strategy
from neocc.ir.ops import OPS
from neocc.ir.program import Op, Value
from neocc.ir.types import TensorType
from neocc.passes.alternatives import Alternative, Place, alternatives, choice_at
from neocc.passes.layout.algebra import op_layouts
from neocc.passes.layout.notation import cuts_text, layout_text
from neocc.passes.names import Names, matching, program_names, resharded
from neocc.passes.plan import Collective, Plan
from neocc.report.derivation import Node, Source, node, sources
from neocc.report.facts import algorithm_words

MANY = 12  # matches that are listed when a name is not clear


@dataclass(frozen=True)
class Moved:
    """A collective by which a value gets elsewhere: layouts before and after, bytes that a device
    puts in and gets out in one run, runs of a step, the link, what runs it and the seconds of all
    runs by XLA's own, and how its seconds come about; inside products, what of these is waited for,
    and what the products take more."""

    id: int
    kind: str
    axis: str
    before: str
    after: str
    bytes: int
    result_bytes: int
    runs: int
    hideable: bool
    link: str
    algorithm: str
    standard: float
    seconds: Node
    waiting: Node | None = None
    working: Node | None = None


@dataclass(frozen=True)
class Use:
    """A reader or the writer of a value: what it does, and the layout that it wants or makes."""

    name: str
    strategy: str
    layout: str


@dataclass(frozen=True)
class TensorFacts:
    """One value of one region: where it lies, who makes and reads it, and how it gets there."""

    region: str
    name: str
    type: str
    layout: str
    bytes: int
    made: Use
    read: tuple[Use, ...]
    moves: tuple[Moved, ...]


@dataclass(frozen=True)
class Option:
    """An alternative in figures: ``how`` is ``chosen``, ``solved again``, ``all else as it was``
    (the step is at most this, and at least ``bound``) or why it cannot be."""

    option: str
    chosen: bool
    compute: float
    moved: float
    local_step: float | None
    step: float | None
    memory: int | None
    fits: bool
    bound: float
    how: str


@dataclass(frozen=True)
class OpFacts:
    """One group of ops that take a strategy together."""

    region: str
    name: str
    ops: tuple[str, ...]
    space: str
    runs: int
    strategy: str
    compute: Node
    operands: tuple[TensorFacts, ...]
    results: tuple[TensorFacts, ...]
    options: tuple[Option, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class TensorAnswer:
    """A tensor wherever it is; where it is stored, the other ways to store it."""

    where: tuple[TensorFacts, ...]
    options: tuple[Option, ...]
    sources: tuple[Source, ...]


def explain_op(plan: Plan, traced: Plan, text: str, seconds: float, bound: float = 0.0) -> OpFacts:
    """Of a plan that is ``closed``. ``traced``: the same plan by ``derived``; ``seconds``: for
    solving alternatives again; ``bound``: of the step of any plan.

    Raises:
        NeoccError: no op is called like that, or several are.
    """
    every = program_names(plan.problem.program)
    named = [(n.body.name, name, n) for n in every for name in n.ops]
    groups: dict[tuple[str, str], Names] = {}
    for region, name, names in matching(text, named):
        groups[region, names.group_of(names.ops[name])] = names
    only([f"{r}: {n}" for r, n in groups], text, "op", [f"{r}: {n}" for r, n, _ in named])
    (((region, name), names),) = groups.items()
    cluster = names.groups[name]
    first = cluster.ops[0]
    labels = {op: label for label, op in names.ops.items()}
    choice = choice_at(traced.problem, Place(op=first))
    compute = node("compute", choice.seconds[traced.solution.picked[choice]])
    tensors = Tensors(plan, traced)
    made = [r for op in cluster.ops for r in op.results]
    used = {v for op in names.body.region.ops if op not in cluster.ops for v in op.operands}
    used |= set(names.body.region.outputs)
    operands = [tensors.facts(names, v) for v in cluster.inputs()]
    results = [tensors.facts(names, v) for v in made if v in used]
    strategy = plan.solution.assignment.strategies[first]
    others = alternatives(plan, Place(op=first), seconds, bound)
    return OpFacts(
        region,
        name,
        tuple(labels[op] for op in cluster.ops),
        space_words(first),
        names.body.trips,
        cuts_text(strategy.axes, plan.mesh),
        compute,
        tuple(operands),
        tuple(results),
        option_rows(others, plan.mesh),
        sources(choice.seconds[traced.solution.picked[choice]], *tensors.seconds),
    )


def explain_tensor(
    plan: Plan, traced: Plan, text: str, seconds: float, bound: float = 0.0
) -> TensorAnswer:
    """As ``explain_op``, for a value; one name may stand for a stored input and for what loops are
    given of it."""
    every = program_names(plan.problem.program)
    named = [(n.body.name, name, n) for n in every for name in n.values]
    found = matching(text, named)
    distinct = list(dict.fromkeys(name for _, name, _ in found))
    if len(distinct) != 1:
        labels = [f"{r}: {n}" for r, n, _ in found]
        only(labels, text, "tensor", [f"{r}: {n}" for r, n, _ in named])
    tensors = Tensors(plan, traced)
    where = tuple(tensors.facts(names, names.values[name]) for _, name, names in found)
    inputs = {v: i for i, v in plan.problem.program.named_inputs}
    stored = [i for _, name, n in found if (i := inputs.get(n.values[name]))]
    others = alternatives(plan, Place(stored=stored[0]), seconds, bound) if stored else []
    if stored:
        others = lying(plan, stored[0].name, others)
    return TensorAnswer(where, option_rows(others, plan.mesh), sources(*tensors.seconds))


def lying(plan: Plan, name: str, others: Sequence[Alternative]) -> list[Alternative]:
    """Alternatives of a stored tensor as its layouts, where a cluster's strategy decides them."""
    shown = []
    for a in others:
        found = a.local or a.solved
        layout = found.partitioned.program.input_value(name).type.layout if found else None
        shown.append(replace(a, option=layout) if layout else a)
    return shown


def only(found: Sequence[str], text: str, what: str, known: Sequence[str]) -> None:
    """Raises:
    NeoccError: not just one thing was found; names it may be, or that are near.
    """
    if not found:
        near = difflib.get_close_matches(text, known, 3, cutoff=0.3)
        hint = f"; the nearest: {', '.join(map(repr, near))}" if near else ""
        raise NeoccError(f"the plan has no {what} {text!r}{hint}")
    if len(found) > 1:
        more = f" and {len(found) - MANY} more" if len(found) > MANY else ""
        raise NeoccError(
            f"{text!r} may be {', '.join(map(repr, found[:MANY]))}{more}: say more of the name"
        )


def space_words(op: Op) -> str:
    """``batch 512, seq 2048, mlp 8192; summed: embd 2048``."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for i in OPS[op.kind].space(op).iters:
        kinds[i.kind].append(f"{i.name} {i.size:,}")
    words = {"parallel": "", "sum": "summed: ", "sequential": "whole: "}
    return "; ".join(f"{words.get(k, k + ': ')}{', '.join(v)}" for k, v in kinds.items())


def option_rows(found: Sequence[Alternative], mesh: Mesh) -> tuple[Option, ...]:
    return tuple(option_row(a, mesh) for a in found)


def option_row(a: Alternative, mesh: Mesh) -> Option:
    option: Strategy | Layout = a.option
    known = a.best
    if a.chosen:
        how = "chosen"
    elif a.solved:
        how = "solved again"
    else:
        how = "all else as it was" if a.local else a.reason
    return Option(
        cuts_text(option.axes, mesh),
        a.chosen,
        a.compute,
        a.moved,
        a.local.timeline.step if a.local else None,
        known.timeline.step if known else None,
        known.memory.peak if known else None,
        known.fits if known else False,
        a.bound,
        how,
    )


class Tensors:
    """The facts of values of one plan; ``seconds`` collects the figures that were used."""

    def __init__(self, plan: Plan, traced: Plan):
        self.plan, self.traced = plan, traced
        self.moves = moves_by_value(traced)
        self.seconds: list[float] = []

    def facts(self, names: Names, value: Value) -> TensorFacts:
        plan = self.plan
        labels = {v: name for name, v in names.values.items()}
        made, layout = self.writer(names, value)
        return TensorFacts(
            names.body.name,
            labels[value],
            str(value.type),
            layout_text(layout, plan.mesh),
            value.type.local_bytes(plan.mesh, layout),
            made,
            tuple(self.readers(names, value)),
            tuple(self.moved(c, op) for c, op in self.moves.get(value, ())),
        )

    def writer(self, names: Names, value: Value) -> tuple[Use, Layout]:
        plan, region = self.plan, names.body.region
        boundary = plan.solution.assignment.boundaries[region]
        if value in region.args:
            layout = boundary.args[region.args.index(value)]
            words = "the program's input" if names.body.carries is None else "outside the loop"
            return Use(words, "", layout_text(layout, plan.mesh)), layout
        for op in region.ops:
            if value in op.results:
                layout = self.results(op)[op.results.index(value)]
                return Use(*self.said(names, op), layout_text(layout, plan.mesh)), layout
        raise AssertionError(f"{value!r} is not of the region")

    def readers(self, names: Names, value: Value) -> list[Use]:
        plan, region = self.plan, names.body.region
        found = []
        for op in region.ops:
            for i, v in enumerate(op.operands):
                if v is value:
                    layout = self.operands(op)[i]
                    found.append(Use(*self.said(names, op), layout_text(layout, plan.mesh)))
        ends = zip(region.outputs, plan.solution.assignment.boundaries[region].outputs, strict=True)
        for i, (v, layout) in enumerate(ends):
            if v is value:
                carries = names.body.carries
                if carries is None:
                    words = f"output {plan.problem.program.outputs[i]}"
                else:
                    words = "carried to the next step" if i < carries else "stacked"
                found.append(Use(words, "", layout_text(layout, plan.mesh)))
        return found

    def said(self, names: Names, op: Op) -> tuple[str, str]:
        """An op's name and strategy."""
        if op.kind == "repeat":
            inner = op.regions[0]
            every = program_names(self.plan.problem.program)
            return next(n.body.name for n in every if n.body.region is inner), "a loop"
        label = next(name for name, o in names.ops.items() if o is op)
        strategy = self.plan.solution.assignment.strategies[op]
        return label, cuts_text(strategy.axes, self.plan.mesh) or "nothing cut"

    def operands(self, op: Op) -> tuple[Layout, ...]:
        if op.kind == "repeat":
            return self.plan.solution.assignment.boundaries[op.regions[0]].args
        return op_layouts(op, self.plan.solution.assignment.strategies[op])[0]

    def results(self, op: Op) -> tuple[Layout, ...]:
        if op.kind == "repeat":
            return self.plan.solution.assignment.boundaries[op.regions[0]].outputs
        return op_layouts(op, self.plan.solution.assignment.strategies[op])[1]

    def moved(self, c: Collective, op: Op) -> Moved:
        self.seconds.append(c.seconds)
        axis = self.plan.mesh.index(c.axis)
        links = self.traced.problem.cost.links[axis]
        link = " or ".join(map(str, links)) if c.kind != "slice" else "memory"
        return Moved(
            c.id,
            c.kind,
            c.axis,
            text_of(op.operands[0].type, self.plan.mesh),
            text_of(op.result.type, self.plan.mesh),
            c.bytes,
            c.result_bytes,
            c.count,
            c.hideable,
            link,
            algorithm_words(c.algorithm, c.grid),
            float(c.standard * c.count),
            node(c.kind, c.seconds, c.count),
            node("waited for", c.inside.waiting, c.count) if c.inside else None,
            node("products take more", c.inside.working, c.count) if c.inside else None,
        )


def text_of(type: TensorType, mesh: Mesh) -> str:
    return layout_text(type.layout, mesh) if type.layout else ""


def moves_by_value(plan: Plan) -> dict[Value, list[tuple[Collective, Op]]]:
    """The collectives by which each value of the program, as it was before partitioning, moves."""
    by_id = {c.id: c for c in plan.collectives}
    found: dict[Value, list[tuple[Collective, Op]]] = defaultdict(list)
    for value, op in resharded(plan.problem.program, plan.partitioned.program):
        found[value].append((by_id[op.attrs["id"]], op))
    return found
