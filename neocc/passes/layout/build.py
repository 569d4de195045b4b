"""Build a program's layout problem: a choice for each cluster of ops and each boundary of a region,
and a flow for each value between them.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from neocc.cost.model import CostModel
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import OPS
from neocc.ir.program import Input, Op, Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import (
    SUM,
    Strategy,
    Through,
    laid,
    layouts,
    strategies,
)
from neocc.passes.layout.cluster import Cluster, accumulates, clusters
from neocc.passes.layout.compute import Computes, Prices, Switch, states
from neocc.passes.layout.problem import Agreement, Case, Choice, End, Flow, Problem, Rules
from neocc.passes.layout.rings import offered
from neocc.passes.remat import droppable

FOLLOWERS = ("rename", "cast", "detach")  # ops that may take their operand's layout for free


def build(program: Program, mesh: Mesh, cost: CostModel, rules: Rules | None = None) -> Problem:
    """The layout problem of a whole program.

    Raises:
        LayoutError: the rules leave an op or an input no option.
    """
    return Builder(Problem(program, mesh, cost), rules or Rules()).build()


class Builder:
    """Walks the program's regions; only ``build`` uses it."""

    def __init__(self, problem: Problem, rules: Rules):
        self.problem = problem
        self.mesh = problem.mesh
        self.cost = problem.cost
        self.rules = rules
        self.uncut = problem.uncut
        self.spare = droppable(problem.program)
        self.computes = Computes(self.mesh, self.cost, self.spare)
        self.varying: list[tuple[Choice, Prices, int]] = []

    def build(self) -> Problem:
        program, body = self.problem.program, self.problem.program.body
        made = self.cluster_choices(body, 1)
        ends: dict[str, End] = {}
        for info, value in program.named_inputs:
            ends[info.name] = self.tied_to_cluster(info, value, made) or self.stored(info, value)
        outputs = [
            ends[name] if name in ends else self.boundary(name, v.type, body)
            for name, v in zip(program.outputs, body.outputs, strict=True)
        ]
        self.region(body, 1, list(ends.values()), outputs, made)
        self.settle_prices()
        return self.problem

    def add(self, choice: Choice) -> Choice:
        if not choice.options:
            raise LayoutError(f"{choice.name}: the layout given leaves no legal way to place it")
        self.problem.choices.append(choice)
        return choice

    def placed(
        self, name: str, type: TensorType, region: Region, options: Sequence[Layout | None]
    ) -> End:
        """The choice among layouts of one value."""
        zero = [0.0] * len(options)
        return End(self.add(Choice(name, region, type.dims, options, zero)), tuple(options))

    def boundary(
        self,
        name: str,
        type: TensorType,
        region: Region,
        partial: bool = False,
        spare: bool = False,
        offload: bool = False,
    ) -> End:
        """``partial``: partial sums are layouts too; ``spare``: it may be off; ``offload``: it may
        lie on the host."""
        every = layouts(type, self.mesh, partial)
        here = [lay for lay in every if not lay.dims & self.uncut]
        found: list[Layout | None] = [*here]
        if offload:
            self.problem.offloaded.add(type.dims)
            found += [lay.moved for lay in here if not lay.partial_axes]
        return self.placed(name, type, region, [*found, None] if spare else found)

    def stored(self, info: Input, value: Value) -> End:
        options = [
            layout
            for layout in layouts(value.type, self.mesh)
            if not layout.dims & self.uncut and self.rules.stored(info, value.type, layout)
        ]
        return self.placed(info.name, value.type, self.problem.program.body, options)

    def tied_to_cluster(self, info: Input, value: Value, made: dict[Op, Choice]) -> End | None:
        """A state that one cluster alone reads and replaces is stored as that cluster cuts it:
        any other layout would only add a reshard."""
        program = self.problem.program
        if not self.rules.tied:
            return None
        readers = [op for op in program.body.ops if value in op.operands]
        if info.name not in program.outputs or not readers:
            return None
        output = program.output_value(info.name)
        choice = made.get(readers[0])
        writer = next((op for op in program.body.ops if output in op.results), None)
        once = program.body.outputs.count(output) == 1
        if choice is None or writer is None or not once:
            return None
        if any(made.get(op) is not choice for op in (*readers, writer)):
            return None
        index = readers[0].operands.index(value)
        end = End(choice, tuple(lays[0][index] for lays in self.op_layouts(choice, readers[0])))
        allowed = all(
            layout is not None and self.rules.stored(info, value.type, layout)
            for layout in end.layouts
        )
        return end if allowed else None

    def cluster_choices(self, region: Region, trips: int) -> dict[Op, Choice]:
        """A choice per cluster; ops that may follow their operand's choice are left out: those
        that are its only reader, and casts of parameters, which are cast where they are stored."""
        uses = Counter(v for op in region.ops for v in op.operands)
        uses.update(region.outputs)
        inputs = set(region.args) if region is self.problem.program.body else set()
        made: dict[Op, Choice] = {}
        for cluster in clusters(region, self.spare.ops):
            first = cluster.ops[0]
            alone = len(cluster.ops) == 1
            if alone and first.kind in FOLLOWERS:
                source = first.operands[0]
                if (uses[source] == 1 or source in inputs) and first not in self.spare.ops:
                    continue
            made.update(dict.fromkeys(cluster.ops, self.cluster_choice(cluster, trips)))
        return made

    def cluster_choice(self, cluster: Cluster, trips: int) -> Choice:
        first = cluster.ops[0]
        found = strategies(first, self.mesh, self.uncut)
        found = offered(first, found, self.cost, self.rules.rings(first))
        if len(cluster.ops) > 1 or first.kind == "einsum":
            # Only single ops pass partial sums on, and products read whole operands.
            found = [s for s in found if all(c is None or isinstance(c, str) for c in s.axes)]
        found = [s for s in found if all(self.rules.strategy(op, s) for op in cluster.ops)]
        prices = self.computes.prices(cluster, found)
        seconds = [s * trips for s in prices.least]
        options: list[Strategy | None] = [*found]
        if found and first in self.spare.ops:
            options.append(None)
            seconds.append(0.0)
        label = f"{first.kind} at {first.loc}" if first.loc else first.kind
        each = dict.fromkeys(cluster.ops, options)
        dims = tuple(
            dict.fromkeys(d for v in (*first.results, *first.operands) for d in v.type.dims)
        )
        choice = self.add(Choice(label, cluster.region, dims, options, seconds, each))
        if prices.switches:
            self.varying.append((choice, prices, trips))
        return choice

    def settle_prices(self) -> None:
        """For each choice whose compute depends on what else is off: a choice of what that adds,
        which agrees with it and with a choice of the state of all that decides it."""
        extra: dict[Choice, list[Choice]] = {}
        known: dict[tuple[Region, tuple[Switch, ...]], Choice] = {}
        for choice, prices, trips in self.varying:
            more = prices.more * trips
            if choice.can_be_off:
                more = np.vstack([more, np.zeros(more.shape[1])])
            rows, row = np.unique(more, axis=0, return_inverse=True)
            cases = list(itertools.product(range(len(rows)), range(more.shape[1])))
            added = self.cases(f"traffic of {choice.name}", choice.region, len(cases))
            added.seconds = [float(rows[r, v]) for r, v in cases]
            self.agree(choice, added, row.ravel(), [r for r, _ in cases])
            extra[choice] = [added]
            key = (choice.region, prices.switches)
            if key not in known:
                known[key] = self.state(*key)
                extra[choice].append(known[key])
            self.agree(known[key], added, prices.variants, [v for _, v in cases])
        self.problem.choices = [c for o in self.problem.choices for c in (o, *extra.get(o, ()))]

    def state(self, region: Region, switches: tuple[Switch, ...]) -> Choice:
        """The choice of what is on of some switches; it agrees with the choices that are."""
        on = list(states(len(switches)))
        found = self.cases("what is kept", region, len(on))
        _, outputs = self.problem.boundaries[region]
        for i, switch in enumerate(switches):
            if isinstance(switch, Op):
                choice = self.problem.choice_of[switch]
            else:
                choice = outputs[switch].choice
            self.agree(choice, found, [o is not None for o in choice.options], [s[i] for s in on])
        return found

    def cases(self, name: str, region: Region, count: int) -> Choice:
        return Choice(name, region, (), [Case(i) for i in range(count)], [0.0] * count)

    def agree(self, a: Choice, b: Choice, a_keys: Iterable[int], b_keys: Iterable[int]) -> None:
        keys = (np.array(list(k), dtype=np.intp) for k in (a_keys, b_keys))
        self.problem.agreements.append(Agreement(a, b, *keys))

    def follow(self, op: Op, sources: tuple[End, ...], trips: int) -> bool:
        """Lets an op that only relabels or narrows its operand take whatever layout that has."""
        source = sources[0]
        widens = op.result.type.itemsize > op.operands[0].type.itemsize
        if widens or len(sources) > 1:
            return False
        following = unary_strategies(op, source.layouts)
        if not all(s is not None and self.rules.strategy(op, s) for s in following):
            return False
        made = [s for s in following if s is not None]
        choice = source.choice
        choice.strategies[op] = [*made]
        for i, s in enumerate(made):
            parts = self.cost.op_seconds(op, lambda dim, s=s: s.parts(dim, self.mesh))
            choice.seconds[i] += parts * trips
        return True

    def op_layouts(
        self, choice: Choice, op: Op
    ) -> list[tuple[tuple[Layout | None, ...], tuple[Layout | None, ...]]]:
        space = OPS[op.kind].space(op)
        off = (None,) * len(op.operands), (None,) * len(op.results)
        return [laid(op, s, space) if s is not None else off for s in choice.strategies[op]]

    def region(
        self,
        region: Region,
        trips: int,
        args: list[End],
        outputs: list[End],
        made: dict[Op, Choice],
        carries: int | None = None,
    ) -> None:
        self.problem.boundaries[region] = (args, outputs)
        saved = saved_stacks(region) if self.cost.offload else frozenset()
        sources: dict[Value, tuple[End, ...]] = {}
        sources.update((v, (end,)) for v, end in zip(region.args, args, strict=True))
        sinks: dict[Value, list[End]] = defaultdict(list)
        for op in region.ops:
            if op.kind == "repeat":
                self.repeat(op, trips, sources, sinks, saved)
                continue
            if op.kind == "either":
                sources[op.result] = tuple(end for v in op.operands for end in sources[v])
                continue
            if op in made:
                choice = made[op]
            elif self.follow(op, sources[op.operands[0]], trips):
                choice = sources[op.operands[0]][0].choice
            else:
                choice = self.cluster_choice(Cluster((op,), region), trips)
            per_option = self.op_layouts(choice, op)
            for i, v in enumerate(op.operands):
                sinks[v].append(End(choice, tuple(lays[0][i] for lays in per_option)))
            for i, v in enumerate(op.results):
                sources[v] = (End(choice, tuple(lays[1][i] for lays in per_option)),)
        for v, end in zip(region.outputs, outputs, strict=True):
            sinks[v].append(end)
        self.problem.sources.update(sources)
        hideable = set() if carries is None else hideable_values(region, carries)
        for v, ends in sinks.items():
            kept = merge_ends(sources[v], ends)
            if kept:
                flow = Flow(v, region, sources[v], kept, trips, v in hideable)
                self.problem.flows.append(flow)

    def repeat(
        self,
        op: Op,
        trips: int,
        sources: dict[Value, tuple[End, ...]],
        sinks: dict[Value, list[End]],
        saved: frozenset[Value],
    ) -> None:
        region, carries = op.regions[0], op.attrs["carries"]
        self.problem.slices[region] = len(region.args) - carries
        args, outputs = [], []
        for i, (v, arg) in enumerate(zip(op.operands, region.args, strict=True)):
            # An accumulator may be carried as partial sums, and reduced after the last step.
            name, sums = arg.name or f"argument {i}", i < carries and accumulates(region, arg)
            off = arg in self.spare.args
            end = self.boundary(name, arg.type, region, sums, off, v in saved)
            args.append(end)
            sinks[v].append(end)
        spare = self.spare.outputs[region]
        for i, (v, out) in enumerate(zip(op.results, region.outputs, strict=True)):
            if i < carries:
                end = args[i]
            else:
                name = out.name or f"output {i}"
                end = self.boundary(name, out.type, region, True, i in spare, v in saved)
            outputs.append(end)
            sources[v] = (end,)
        inner = trips * op.attrs["dim"].size
        self.region(region, inner, args, outputs, self.cluster_choices(region, inner), carries)


def unary_strategies(op: Op, layouts: Iterable[Layout | None]) -> list[Strategy | None]:
    """The strategies of a one-operand op that take its operand as each of ``layouts``; None where
    there is none."""
    space = OPS[op.kind].space(op)
    follows = dict(zip(op.operands[0].type.names, space.operands[0], strict=True))
    passes = OPS[op.kind].linear(op)

    def taking(layout: Layout) -> Strategy | None:
        axes: list[str | Through | None] = []
        for place in layout.axes:
            if isinstance(place, Partial):
                if place != SUM or not passes:
                    return None
                axes.append(Through(passes[0]))
            else:
                axes.append(place and follows[place])
        return Strategy(tuple(axes))

    return [layout and taking(layout) for layout in layouts]


def merge_ends(sources: tuple[End, ...], ends: list[End]) -> list[End]:
    """Sinks that can ask for different things: equal ones once, and none that always gets what
    the source's own choice makes."""
    kept: dict[tuple[Choice, tuple[Layout | None, ...]], End] = {}
    for end in ends:
        first, *others = sources
        if not others and end.choice is first.choice and end.layouts == first.layouts:
            continue
        kept.setdefault((end.choice, end.layouts), end)
    return list(kept.values())


def saved_stacks(region: Region) -> frozenset[Value]:
    """Stacked results of loops that only later loops read, slice by slice."""
    stacks: set[Value] = set()
    for op in region.ops:
        first, last = 0, 0
        if op.kind == "repeat":
            first = op.attrs["carries"]
            last = first + op.attrs["stacked"]
            stacks.update(op.results[first:])
        stacks.difference_update(v for i, v in enumerate(op.operands) if not first <= i < last)
    return frozenset(stacks.difference(region.outputs))


def hideable_values(region: Region, carries: int) -> set[Value]:
    """Values of a repeat's body whose transfers can hide behind compute: those that do not
    depend on what the body carries (weights, fetched ahead), and those on which the next carry
    does not depend (gradients, sent behind). None in a body with loops of its own, which steps
    wait for."""
    if any(op.regions for op in region.ops):
        return set()
    after: set[Value] = set(region.args[:carries])
    for op in region.ops:
        if any(v in after for v in op.operands):
            after.update(op.results)
    before: set[Value] = set(region.outputs[:carries])
    for op in reversed(region.ops):
        if any(r in before for r in op.results):
            before.update(op.operands)
    everything = set(itertools.chain(region.args, *(op.results for op in region.ops)))
    return everything - (after & before)
