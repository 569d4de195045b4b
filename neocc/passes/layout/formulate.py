"""The layout problem as a mixed-integer linear program.

Columns: one 0/1 column per option of each choice; one continuous column per move of each flow
and sink, and per move of a flow with several sinks one more that pays for it (0/1 where the
optimum would mix trees); where a flow's ends may be off, what each sink takes from its sources;
per region the communication that compute does not hide. Rows: one option per choice; choices that
must agree take as much of each key; each sink's unit of flow is conserved at every layout; a shared
move is at least each sink's use of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from neocc.ir.mesh import Layout
from neocc.ir.program import Region
from neocc.passes.layout.algebra import Move
from neocc.passes.layout.objective import MICRO, TIE, Limit, ugliness
from neocc.passes.layout.problem import Choice, End, Flow, Problem
from neocc.passes.layout.prune import Kept

THREADS = 2  # HiGHS keeps a process to the number of its first solve and refuses another


class Quiet(highspy.Highs):
    """HiGHS that prints nothing: its constructor prints a banner when it turns callbacks on."""

    def enableCallbacks(self) -> None:
        self.silent()
        super().enableCallbacks()


class Model:
    """Columns and rows of the program under construction."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integer: list[bool] = []
        self.upper: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.starts: list[int] = [0]
        self.index: list[int] = []
        self.value: list[float] = []

    def column(self, cost: float, integer: bool = False, upper: float = highspy.kHighsInf) -> int:
        self.cost.append(cost)
        self.integer.append(integer)
        self.upper.append(upper)
        return len(self.cost) - 1

    def row(self, low: float, high: float, terms: Iterable[tuple[int, float]]) -> int:
        merged: dict[int, float] = defaultdict(float)
        for i, v in terms:
            merged[i] += v
        for i, v in merged.items():
            if v:
                self.index.append(i)
                self.value.append(v)
        self.low.append(low)
        self.high.append(high)
        self.starts.append(len(self.index))
        return len(self.low) - 1

    def highs(self, time_limit: float, relaxed: bool = False) -> highspy.Highs:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.cost), len(self.low)
        lp.col_cost_ = np.array(self.cost)
        lp.col_lower_ = np.zeros(len(self.cost))
        lp.col_upper_ = np.array(self.upper)
        lp.row_lower_, lp.row_upper_ = np.array(self.low), np.array(self.high)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.array(self.starts, dtype=np.int32)
        lp.a_matrix_.index_ = np.array(self.index, dtype=np.int32)
        lp.a_matrix_.value_ = np.array(self.value)
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        if not relaxed:
            lp.integrality_ = [kinds[i] for i in self.integer]
        solver = Quiet()
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", 1e-3)
        for kind in ("mip", "primal"):
            # An option taken to 1 - 1e-6 would be cheaper by as much of all that there is.
            solver.setOptionValue(f"{kind}_feasibility_tolerance", 1e-9)
        for search in ("rins", "rens", "root_reduced_cost"):
            # Sub-MIPs take far longer than the tree that they are to spare.
            solver.setOptionValue(f"mip_heuristic_run_{search}", False)
        solver.setOptionValue("mip_allow_restart", False)
        solver.setOptionValue("time_limit", time_limit)
        solver.setOptionValue("threads", THREADS)
        solver.passModel(lp)
        return solver

    def reached(self, solver: highspy.Highs) -> bool:
        """Whether the columns that a solver returns, if any, cost what it says."""
        columns = np.array(solver.getSolution().col_value)
        said = solver.getInfo().objective_function_value
        return not len(columns) or math.isclose(
            self.cost_of(columns), said, rel_tol=1e-7, abs_tol=1e-3
        )

    def cost_of(self, columns: np.ndarray) -> float:
        return float(np.array(self.cost) @ columns)


@dataclass(eq=False)
class Arcs:
    """The moves a flow may use, and the columns that pay for them."""

    moves: list[Move]
    pays: list[int]


@dataclass(eq=False)
class Formulation:
    """The program of what is left of a problem: where the columns of each choice's options begin,
    each flow's moves, the column that holds the fullest point's share of its limit, and the rows
    of what regions do not hide and of limits."""

    model: Model
    kept: Kept
    first: dict[Choice, int]
    arcs: dict[Flow, Arcs]
    fullest: int
    exposed: dict[Region, int]
    limits: list[int]

    def split(self, columns: Sequence[float] | np.ndarray) -> set[Flow]:
        """Flows whose moves are used in part: mixtures of trees, which are none themselves."""
        parts = {flow: np.array(columns)[a.pays] for flow, a in self.arcs.items()}
        return {f for f, x in parts.items() if np.any((x > 1e-6) & (x < 1 - 1e-6))}

    def picked(self, columns: np.ndarray) -> dict[Choice, int]:
        """The option of each choice that a solution takes."""
        found = {}
        for choice, left in self.kept.options.items():
            base = self.first[choice]
            found[choice] = int(left[np.argmax(columns[base : base + len(left)])])
        return found

    def columns_of(self, picked: Mapping[Choice, int]) -> np.ndarray:
        """The columns of the options that are picked, those that are left."""
        found = []
        for choice, left in self.kept.options.items():
            found.extend(self.first[choice] + np.flatnonzero(left == picked[choice]))
        return np.array(found, dtype=np.int32)


def formulate(
    problem: Problem,
    limits: Sequence[Limit],
    memory_price: float | None,
    kept: Kept,
    whole: Collection[Flow] = (),
    elastic: float | None = None,
) -> Formulation:
    """``memory_price``: what the fullest point's share of its limit costs; None: no more than the
    whole of it. ``kept``: the options and moves that have columns. ``whole``: flows whose moves
    have 0/1 columns. ``elastic``: what more than the whole of a limit may be had for. Prices are
    in microseconds."""
    model = Model()
    first: dict[Choice, int] = {}
    for choice in problem.choices:
        first[choice] = len(model.cost)
        for i in kept.options[choice]:
            tie = ugliness(problem, choice, choice.options[i]) * TIE
            model.column((choice.seconds[i] + tie) * MICRO, integer=True, upper=1.0)
        model.row(1.0, 1.0, ((c, 1.0) for c in range(first[choice], len(model.cost))))
    hidden: dict[Region, list[tuple[int, float]]] = defaultdict(list)
    ends = Ends(kept, first)
    for agreement in problem.agreements:
        keys: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for col, i in ends.columns(agreement.a):
            keys[int(agreement.a_keys[i])].append((col, 1.0))
        for col, i in ends.columns(agreement.b):
            keys[int(agreement.b_keys[i])].append((col, -1.0))
        for terms in keys.values():
            model.row(0.0, 0.0, terms)
    arcs = {
        flow: add_flow(model, problem, flow, ends, hidden, flow in whole) for flow in problem.flows
    }
    exposed_rows: dict[Region, int] = {}
    limit_rows: list[int] = []
    for region, terms in hidden.items():
        # What does not fit behind the region's compute is exposed: a column >= comm - compute.
        exposed = model.column(1.0)
        row = [(exposed, 1.0), *((c, -cost) for c, cost in terms)]
        for choice in problem.choices:
            if choice.region is region:
                row.extend((c, choice.seconds[i] * MICRO) for c, i in ends.columns(choice))
        exposed_rows[region] = model.row(0.0, highspy.kHighsInf, row)
    hard = memory_price is None
    fullest = model.column(memory_price or 0.0, upper=1.0 if hard else highspy.kHighsInf)
    filled = [(fullest, -1.0)]
    if elastic is not None:
        filled.append((model.column(elastic), -1.0))
    for limit in limits:
        scale = 1.0 / max(limit.limit, 1.0)
        terms = [
            (col, held[i] * scale)
            for c, held in limit.options.items()
            for col, i in ends.columns(c)
        ]
        for flow, held in limit.moves.items():
            pairs = zip(arcs[flow].moves, arcs[flow].pays, strict=True)
            terms.extend((col, held.get(m.target, 0.0) * scale) for m, col in pairs)
        limit_rows.append(model.row(-highspy.kHighsInf, 0.0, [*terms, *filled]))
    return Formulation(model, kept, first, arcs, fullest, exposed_rows, limit_rows)


@dataclass(frozen=True)
class Ends:
    """Columns of the options that are left, and the layouts that they mean."""

    kept: Kept
    first: dict[Choice, int]

    def columns(self, choice: Choice) -> Iterable[tuple[int, int]]:
        """Column and number of each option."""
        return enumerate(self.kept.options[choice].tolist(), self.first[choice])

    def layouts(self, end: End) -> dict[Layout | None, list[int]]:
        """The columns that mean each layout, None where the end is off."""
        found: dict[Layout | None, list[int]] = defaultdict(list)
        for col, i in self.columns(end.choice):
            found[end.layouts[i]].append(col)
        return found


Balance = dict[Layout, list[tuple[int, float]]]


def add_flow(
    model: Model,
    problem: Problem,
    flow: Flow,
    ends: Ends,
    hidden: dict[Region, list[tuple[int, float]]],
    whole: bool,
) -> Arcs:
    graph = problem.reshards_of(flow)
    by_sink = ends.kept.moves[flow]
    every = np.unique(np.concatenate(by_sink))
    found = [graph.moves[i] for i in every]
    costs = graph.seconds[every] * flow.trips * MICRO
    most = 1.0 if whole else highspy.kHighsInf
    hides = costs * problem.hidden_share(flow)[every]
    pays = [model.column(c + TIE * MICRO, whole, most) for c in (costs - hides).tolist()]
    hidden[flow.region].extend((p, c) for p, c in zip(pays, hides.tolist(), strict=True) if c)
    sources = [ends.layouts(source) for source in flow.sources]
    shared = len(flow.sinks) > 1
    for sink, used in zip(flow.sinks, by_sink, strict=True):
        balance: Balance = defaultdict(list)
        wants = ends.layouts(sink)
        paid = [pays[i] for i in np.searchsorted(every, used)]
        cols = [model.column(0.0) for _ in used] if shared else paid
        for i, col in zip(used, cols, strict=True):
            balance[graph.moves[i].source].append((col, -1.0))
            balance[graph.moves[i].target].append((col, 1.0))
        for layout, options in wants.items():
            if layout is not None:
                balance[layout].extend((col, -1.0) for col in options)
        # Where an end may be off, a sink takes what it wants, and no more of a layout than is made.
        fixed = len(sources) == 1 and None not in wants
        for made in sources:
            for layout, options in made.items():
                if layout is not None and fixed:
                    balance[layout].extend((col, 1.0) for col in options)
                elif layout is not None:
                    taken = model.column(0.0)
                    balance[layout].append((taken, 1.0))
                    row = [*((col, 1.0) for col in options), (taken, -1.0)]
                    model.row(0.0, highspy.kHighsInf, row)
        for terms in balance.values():
            model.row(0.0, 0.0, terms)
        if shared:
            for col, pay in zip(cols, paid, strict=True):
                model.row(0.0, highspy.kHighsInf, ((pay, 1.0), (col, -1.0)))
    return Arcs(found, pays)
