"""Solve the layout problem exactly: a mixed-integer linear program, by HiGHS.

Columns: one 0/1 column per option of each choice; one continuous column per move of each flow
and sink, and per move of a flow with several sinks one more that pays for it (0/1 where the
optimum would mix trees); per region the communication that compute does not hide. Rows: one
option per choice; each sink's unit of flow is conserved at every layout; a shared move is at
least each sink's use of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Layout
from neocc.ir.program import Region
from neocc.passes.layout.algebra import Assignment, Move, Strategy
from neocc.passes.layout.problem import Choice, End, Flow, Problem

TIE = 5e-8  # seconds that a cut counts for, so that of equal plans the one that reads well wins

THREADS = 2  # HiGHS keeps a process to the number of its first solve and refuses another


class Infeasible(NeoccError):
    """No assignment keeps the rules and the memory limits; the CLI exits with 1."""


@dataclass(frozen=True)
class Limit:
    """A memory row: bytes that options hold, and that targets of moves hold, at one point."""

    name: str
    limit: float
    options: dict[Choice, list[float]]
    moves: dict[Flow, dict[Layout, float]]


@dataclass(frozen=True)
class Solution:
    """objective: seconds of the step (and what ties count for); bound: proved lower bound of the
    objective of any assignment that keeps the limits; seconds: time the solver took."""

    assignment: Assignment
    picked: dict[Choice, int]
    objective: float
    bound: float
    seconds: float
    columns: np.ndarray
    rows: int
    nodes: int

    @property
    def gap(self) -> float:
        """(objective - bound) / objective: 0 is a proof of optimality."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.bound) / self.objective)


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

    def row(self, low: float, high: float, terms: Iterable[tuple[int, float]]) -> None:
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

    def highs(self, time_limit: float) -> highspy.Highs:
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
        lp.integrality_ = [kinds[i] for i in self.integer]
        solver = Quiet()
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", 1e-3)
        for search in ("rins", "rens", "root_reduced_cost"):
            # Sub-MIPs take far longer than the tree that they are to spare.
            solver.setOptionValue(f"mip_heuristic_run_{search}", False)
        solver.setOptionValue("mip_allow_restart", False)
        solver.setOptionValue("time_limit", time_limit)
        solver.setOptionValue("threads", THREADS)
        solver.passModel(lp)
        return solver


MICRO = 1e6  # the program is in microseconds: columns near 1 suit the solver


def ugliness(problem: Problem, choice: Choice, option: Strategy | Layout) -> float:
    """Cuts of an option: a dim that less of the program has counts more (``head_dim`` after
    ``heads`` after ``embd``), and so do several dims rather than one."""
    cuts = [p for p in option.axes if p is not None]
    common = [d.name for d in sorted(choice.dims, key=lambda d: -problem.frequency[d.name])]
    ranks = sum(common.index(p) for p in cuts if isinstance(p, str) and p in common)
    return len(cuts) + 0.5 * ranks + 0.25 * max(0, len(set(cuts)) - 1)


@dataclass(eq=False)
class Arcs:
    """The moves a flow may use, and the columns that pay for them."""

    moves: list[Move]
    pays: list[int]


def flow_moves(problem: Problem, flow: Flow) -> list[Move]:
    """Moves that lie on some path from a layout the source makes to one a sink wants."""
    type = flow.value.type
    out: dict[Layout, list[Move]] = {}
    stack = list(dict.fromkeys(flow.source.layouts))
    while stack:
        layout = stack.pop()
        if layout in out:
            continue
        out[layout] = problem.moves_from(layout, type)
        stack.extend(m.target for m in out[layout] if m.target not in out)
    into: dict[Layout, list[Layout]] = defaultdict(list)
    for found in out.values():
        for m in found:
            into[m.target].append(m.source)
    useful: set[Layout] = set()
    stack = [lay for end in flow.sinks for lay in end.layouts]
    while stack:
        layout = stack.pop()
        if layout in useful:
            continue
        useful.add(layout)
        stack.extend(into[layout])
    return [m for found in out.values() for m in found if m.target in useful]


@dataclass(eq=False)
class Formulation:
    """The program of a problem: where each choice's columns begin, each flow's moves, and the
    column that holds the fullest point's share of its limit."""

    model: Model
    first: dict[Choice, int]
    arcs: dict[Flow, Arcs]
    fullest: int

    def split(self, columns: Sequence[float] | np.ndarray) -> set[Flow]:
        """Flows whose moves are used in part: mixtures of trees, which are none themselves."""
        parts = {flow: np.array(columns)[a.pays] for flow, a in self.arcs.items()}
        return {f for f, x in parts.items() if np.any((x > 1e-6) & (x < 1 - 1e-6))}


def formulate(
    problem: Problem,
    limits: Sequence[Limit],
    memory_price: float | None,
    whole: Collection[Flow] = (),
) -> Formulation:
    """``whole``: flows whose moves have 0/1 columns."""
    model = Model()
    first: dict[Choice, int] = {}
    for choice in problem.choices:
        first[choice] = len(model.cost)
        for option, seconds in zip(choice.options, choice.seconds, strict=True):
            tie = ugliness(problem, choice, option) * TIE
            model.column((seconds + tie) * MICRO, integer=True, upper=1.0)
        n = len(choice.options)
        model.row(1.0, 1.0, ((first[choice] + i, 1.0) for i in range(n)))
    hidden: dict[Region, list[tuple[int, float]]] = defaultdict(list)
    arcs = {
        flow: add_flow(model, problem, flow, first, hidden, flow in whole) for flow in problem.flows
    }
    for region, terms in hidden.items():
        # What does not fit behind the region's compute is exposed: a column >= comm - compute.
        exposed = model.column(1.0)
        row = [(exposed, 1.0), *((c, -cost) for c, cost in terms)]
        for choice in problem.choices:
            if choice.region is region:
                base = first[choice]
                row.extend((base + i, s * MICRO) for i, s in enumerate(choice.seconds))
        model.row(0.0, highspy.kHighsInf, row)
    hard = memory_price is None
    fullest = model.column((memory_price or 0.0) * MICRO, upper=1.0 if hard else highspy.kHighsInf)
    for limit in limits:
        scale = 1.0 / max(limit.limit, 1.0)
        terms = [
            (first[c] + i, b * scale)
            for c, held in limit.options.items()
            for i, b in enumerate(held)
        ]
        for flow, held in limit.moves.items():
            pairs = zip(arcs[flow].moves, arcs[flow].pays, strict=True)
            terms.extend((col, held.get(m.target, 0.0) * scale) for m, col in pairs)
        model.row(-highspy.kHighsInf, 0.0, [*terms, (fullest, -1.0)])
    return Formulation(model, first, arcs, fullest)


def solve(
    problem: Problem,
    limits: Sequence[Limit] = (),
    memory_price: float | None = None,
    start: Solution | None = None,
    time_limit: float = 60.0,
) -> Solution:
    """The assignment with the least predicted step time, with the solver's bound.

    The limits are hard, or, with ``memory_price``, the fullest point's share of its limit costs
    that many seconds. ``start``: a solution of the same problem that keeps the limits.
    ``time_limit`` in seconds: when it ends, the best assignment so far is returned, with its gap.

    Raises:
        Infeasible: no assignment satisfies the limits.
        NeoccError: none was found in time.
    """
    whole: set[Flow] = set()
    columns = np.zeros(0)
    seconds = 0.0
    while True:
        formulation = formulate(problem, limits, memory_price, whole)
        model, first = formulation.model, formulation.first
        solver = model.highs(max(time_limit - seconds, time_limit / 10))
        if whole:
            chosen = np.flatnonzero(columns[: sum(len(c.options) for c in problem.choices)] > 0.5)
            solver.setSolution(len(chosen), chosen.astype(np.int32), np.ones(len(chosen)))
        elif start is not None:
            warm = highspy.HighsSolution()
            warm.col_value = list(start.columns)
            solver.setSolution(warm)
        solver.run()
        seconds += solver.getRunTime()
        status = solver.getModelStatus()
        info = solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            raise Infeasible("no layout fits the memory of a device")
        columns = np.array(solver.getSolution().col_value)
        if not len(columns) or info.primal_solution_status != 2:
            raise NeoccError(
                f"the solver found no layout within {time_limit:.0f} s "
                f"(status: {solver.modelStatusToString(status)}); raise the time limit"
            )
        # Whole choices nearly always have whole trees; a flow with none gets 0/1 columns.
        split = formulation.split(columns) - whole
        if not split:
            break
        whole |= split
    picked = {
        c: int(np.argmax(columns[first[c] : first[c] + len(c.options)])) for c in problem.choices
    }
    used = {
        flow.value: frozenset(
            (m.source, m.target)
            for m, col in zip(a.moves, a.pays, strict=True)
            if columns[col] > 1e-6
        )
        for flow, a in formulation.arcs.items()
    }
    price = memory_price or 0.0
    return Solution(
        problem.assignment(picked, used),
        picked,
        info.objective_function_value / MICRO - price * columns[formulation.fullest],
        # The fullest point's share is at most 1 where the limits hold: Lagrange's bound.
        info.mip_dual_bound / MICRO - price,
        seconds,
        columns,
        len(model.low),
        max(0, info.mip_node_count),
    )


def add_flow(
    model: Model,
    problem: Problem,
    flow: Flow,
    first: dict[Choice, int],
    hidden: dict[Region, list[tuple[int, float]]],
    whole: bool,
) -> Arcs:
    found = flow_moves(problem, flow)
    costs = [problem.seconds(flow, m) * MICRO for m in found]
    most = 1.0 if whole else highspy.kHighsInf
    if flow.hideable:
        share = problem.cost.overlap
        pays = [model.column((1 - share) * c + TIE * MICRO, whole, most) for c in costs]
        hidden[flow.region].extend((p, c * share) for p, c in zip(pays, costs, strict=True))
    else:
        pays = [model.column(c + TIE * MICRO, whole, most) for c in costs]
    shared = len(flow.sinks) > 1
    for sink in flow.sinks:
        cols = [model.column(0.0) for _ in found] if shared else pays
        balance: dict[Layout, list[tuple[int, float]]] = defaultdict(list)
        for m, col in zip(found, cols, strict=True):
            balance[m.source].append((col, -1.0))
            balance[m.target].append((col, 1.0))
        add_end(balance, flow.source, first, 1.0)
        add_end(balance, sink, first, -1.0)
        for terms in balance.values():
            model.row(0.0, 0.0, terms)
        if shared:
            for col, pay in zip(cols, pays, strict=True):
                model.row(0.0, highspy.kHighsInf, ((pay, 1.0), (col, -1.0)))
    return Arcs(found, pays)


def add_end(
    balance: dict[Layout, list[tuple[int, float]]], end: End, first: dict[Choice, int], sign: float
) -> None:
    base = first[end.choice]
    for i, layout in enumerate(end.layouts):
        balance[layout].append((base + i, sign))
