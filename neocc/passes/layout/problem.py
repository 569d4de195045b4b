"""The layout problem of a program: choices (one option each) and flows between them.

A choice is a cluster's strategy, or the layout of a region's argument or output. A flow is one
value: from the layout that its source's option makes, over single-axis moves, to the layout that
each sink's option wants. A move is paid for once however many sinks use it.

What may be left out (``passes.remat``) has the option None: to be off. It then neither wants nor
makes anything. The value of an ``either`` has two sources: what is kept and what is recomputed.
Compute that depends on what else is off (``compute``) is a choice of its own, which must agree with
those that decide it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from neocc.cost.model import CostModel
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Input, Op, Program, Region, Value
from neocc.ir.types import Dim, TensorType
from neocc.passes.layout.algebra import (
    Assignment,
    Boundary,
    Move,
    Strategy,
    moves,
)
from neocc.passes.layout.reshards import Reshards, reshards
from neocc.passes.remat import Droppable, resolve


@dataclass(frozen=True)
class Rules:
    """What a user's layout or an expert's plan allows; by default everything.

    strategy: may this op take this strategy? stored: may this input be stored like this?
    tied: a state is stored as the one cluster that reads and replaces it cuts it. rings: is every
    legal ring of this op an option (``layout.rings``), whether or not it may gain?
    """

    strategy: Callable[[Op, Strategy], bool] = lambda op, strategy: True
    stored: Callable[[Input, TensorType, Layout], bool] = lambda info, type, layout: True
    tied: bool = True
    rings: Callable[[Op], bool] = lambda op: False


@dataclass(frozen=True)
class Case:
    """An option that decides nothing by itself: it says in which case what others decide is."""

    number: int
    axes: tuple[str, ...] = ()  # it cuts nothing


Option = Strategy | Layout | Case | None


@dataclass(eq=False)
class Choice:
    """One option of several: a cluster's strategies, or a boundary's layouts; None is to be off.

    ``seconds[i]``: option i's compute time in one training step. ``dims``: what options may cut.
    ``strategies``: what each op that hangs on this choice does under each option.
    """

    name: str
    region: Region
    dims: tuple[Dim, ...]
    options: Sequence[Option]
    seconds: list[float]
    strategies: dict[Op, list[Strategy | None]] = field(default_factory=dict)

    @cached_property
    def can_be_off(self) -> bool:
        return any(o is None for o in self.options)

    @cached_property
    def away(self) -> np.ndarray:
        """The options that hold nothing in a device's memory: to be off, or on the host."""
        return np.flatnonzero([o is None or getattr(o, "host", False) for o in self.options])


@dataclass(frozen=True, eq=False)
class End:
    """Where a flow starts or ends: a choice, and the layout that each of its options means, None
    where it is off."""

    choice: Choice
    layouts: tuple[Layout | None, ...]

    @cached_property
    def distinct(self) -> frozenset[Layout]:
        """The layouts, each once."""
        return frozenset(layout for layout in self.layouts if layout is not None)


@dataclass(eq=False)
class Flow:
    """A value on its way, from whichever of its sources is on; ``trips``: how often a step runs
    it; ``hideable``: its transfers can run behind the region's compute."""

    value: Value
    region: Region
    sources: tuple[End, ...]
    sinks: list[End]
    trips: int
    hideable: bool


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two choices whose picked options must have the same key (``a_keys[i]`` of option i of a)."""

    a: Choice
    b: Choice
    a_keys: np.ndarray
    b_keys: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.a_keys) == len(self.a.options) and len(self.b_keys) == len(self.b.options)


@dataclass(eq=False)
class Problem:
    """Everything the solver needs, and how to read its answer."""

    program: Program
    mesh: Mesh
    cost: CostModel
    choices: list[Choice] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    boundaries: dict[Region, tuple[list[End], list[End]]] = field(default_factory=dict)
    sources: dict[Value, tuple[End, ...]] = field(default_factory=dict)
    slices: dict[Region, int] = field(default_factory=dict)  # non-carried arguments of a body
    graphs: dict[tuple[object, ...], dict[Layout, list[Move]]] = field(default_factory=dict)
    offloaded: set[tuple[Dim, ...]] = field(default_factory=set)  # of what may go to the host

    @cached_property
    def choice_of(self) -> dict[Op, Choice]:
        """The choice that each op, repeats aside, hangs on."""
        return {op: choice for choice in self.choices for op in choice.strategies}

    @cached_property
    def frequency(self) -> Counter[str]:
        """How many values have each dim."""
        return Counter(n for v in self.program.values() for n in v.type.names)

    @cached_property
    def uncut(self) -> frozenset[str]:
        """Dims of repeats, which no axis cuts."""
        return frozenset(op.attrs["dim"].name for op in self.program.body.walk() if op.regions)

    @cached_property
    def reshards(self) -> dict[tuple[object, ...], Reshards]:
        """The moves of every type that flows, by its dims and the size of an item."""
        flows: dict[tuple[object, ...], list[Flow]] = defaultdict(list)
        for flow in self.flows:
            flows[(*flow.value.type.dims, flow.value.type.itemsize)].append(flow)
        found = {}
        for key, alike in flows.items():
            type = alike[0].value.type
            ends = [end for flow in alike for end in (*flow.sources, *flow.sinks)]
            found[key] = reshards(
                (lay for end in ends for lay in end.layouts if lay is not None),
                lambda layout, type=type: self.moves_from(layout, type),
                lambda move, type=type: self.wire_seconds(move, type),
                lambda move, type=type: self.copy_seconds(move, type),
            )
        return found

    def reshards_of(self, flow: Flow) -> Reshards:
        return self.reshards[(*flow.value.type.dims, flow.value.type.itemsize)]

    def moves_from(self, layout: Layout, type: TensorType) -> list[Move]:
        graph = self.graphs.setdefault((*type.dims,), {})
        if layout not in graph:
            found = moves(layout, type, self.mesh)
            offloaded = type.dims in self.offloaded
            graph[layout] = [
                m
                for m in found
                if not m.target.dims & self.uncut and (m.axis is not None or offloaded)
            ]
        return graph[layout]

    def hidden_share(self, flow: Flow) -> np.ndarray:
        """Of each of a flow's moves, the share that can run behind compute."""
        graph = self.reshards_of(flow)
        return self.cost.overlap * (graph.host | flow.hideable) * graph.wires

    def seconds(self, flow: Flow, move: Move) -> float:
        """Time of one move of one flow in a whole step."""
        return self.move_seconds(move, flow.value.type) * flow.trips

    def move_seconds(self, move: Move, type: TensorType) -> float:
        return self.wire_seconds(move, type) + self.copy_seconds(move, type)

    def wire_seconds(self, move: Move, type: TensorType) -> float:
        return self.cost.way(move.kind, move.axis, type, (move.source, move.target)).wires

    def copy_seconds(self, move: Move, type: TensorType) -> float:
        """What of a move is work of the device itself, and hides behind nothing."""
        ends = (move.source, move.target)
        way = self.cost.way(move.kind, move.axis, type, ends)
        copied = self.cost.copy_seconds(move.kind, (move.dim, move.to), type, ends)
        return copied + way.seconds - way.wires

    def assignment(
        self, picked: dict[Choice, int], used: dict[Value, frozenset[tuple[Layout, Layout]]]
    ) -> Assignment:
        """The solver's answer as an assignment: ``picked`` option per choice, ``used`` moves."""
        chosen: dict[Op, Strategy] = {}
        for choice, i in picked.items():
            for op, made in choice.strategies.items():
                strategy = made[i]
                if strategy is not None:
                    chosen[op] = strategy

        def lie(ends: list[End]) -> tuple[Layout, ...]:
            found = (end.layouts[picked[end.choice]] for end in ends)
            return tuple(layout for layout in found if layout is not None)

        boundaries = {
            region: Boundary(lie(args), lie(outputs))
            for region, (args, outputs) in self.boundaries.items()
        }
        return Assignment(chosen, boundaries, dict(used))

    def dropped(self, picked: Mapping[Choice, int]) -> Droppable:
        """What is off."""

        def off(end: End) -> bool:
            return end.layouts[picked[end.choice]] is None

        ops = {
            op
            for choice, i in picked.items()
            for op, made in choice.strategies.items()
            if made[i] is None
        }
        args: set[Value] = set()
        outputs: dict[Region, frozenset[int]] = {}
        for region, (ends, out) in self.boundaries.items():
            args.update(v for v, end in zip(region.args, ends, strict=True) if off(end))
            outputs[region] = frozenset(i for i, end in enumerate(out) if off(end))
        return Droppable(frozenset(ops), frozenset(args), outputs)

    def recomputes(self, picked: Mapping[Choice, int], op: Op) -> bool:
        """Whether an ``either`` gets its value from ops that compute it again."""
        again = self.sources[op.operands[1]]
        return any(end.layouts[picked[end.choice]] is not None for end in again)

    def resolve(
        self, picked: Mapping[Choice, int], assignment: Assignment
    ) -> tuple[Program, Assignment]:
        """The program without what is off and without ``either``, and its assignment."""
        made = resolve(self.program, self.dropped(picked), lambda op: self.recomputes(picked, op))
        moves: dict[Value, frozenset[tuple[Layout, Layout]]] = {}
        for v, used in (assignment.moves or {}).items():
            new = made.values.get(v, v)
            moves[new] = moves.get(new, frozenset()) | used
        algorithms = assignment.algorithms
        if algorithms is not None:
            algorithms = {made.values.get(v, v): named for v, named in algorithms.items()}
        return made.program, Assignment(
            {made.ops[op]: s for op, s in assignment.strategies.items()},
            {made.regions[r]: b for r, b in assignment.boundaries.items()},
            moves,
            algorithms,
        )
