"""An exact search over a layout problem with no linear program in it: the solver's oracle.

Every combination of the choices' options, with exact Steiner trees (Dreyfus and Wagner 1971) for
the flows. A branch is left only where what it has already decided costs too much: a region costs
``serial + (1 - share) * hideable + max(compute, share * hideable)``, which no decision lowers.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

from neocc.cost.hardware import Chip, chip
from neocc.cost.model import CostModel
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Program, Region
from neocc.passes.layout.algebra import Move
from neocc.passes.layout.build import build
from neocc.passes.layout.objective import TIE, ugliness
from neocc.passes.layout.problem import Agreement, Choice, End, Flow, Problem, Rules
from neocc.passes.layout.solve import Solution


@cache
def slow_chip() -> Chip:
    """A chip so slow that small tensors take seconds: then costs are far above the solver's
    absolute tolerances, and compute, memory and wires all matter."""
    base = chip("v5p")
    assert base.torus is not None
    link = replace(base.torus.link, bandwidth=400.0, latency=1e-3)
    return replace(
        base,
        peak_flops=dict.fromkeys(("bf16", "f16", "f32", "f64", "i32", "u32"), 4e3),
        matmul_tile=(1, 1, 1),
        hbm_bandwidth=900.0,
        kernel_overhead=0.0,
        stream=None,
        collective_overhead=5e-3,
        torus=replace(base.torus, link=link),
        network=link,
    )


def problem_of(program: Program, mesh: Mesh, rules: Rules | None = None) -> Problem:
    return build(program, mesh, CostModel.of(slow_chip(), mesh), rules)


def reached(problem: Problem, flow: Flow, made: frozenset[Layout]) -> dict[Layout, list[Move]]:
    """Moves out of every layout that moves lead to."""
    out: dict[Layout, list[Move]] = {}
    stack = list(made)
    while stack:
        layout = stack.pop()
        if layout not in out:
            out[layout] = problem.moves_from(layout, flow.value.type)
            stack.extend(m.target for m in out[layout])
    return out


Spent = dict[Region, tuple[float, float, float]]  # compute, not hideable, hideable seconds
Cost = tuple[float, int]  # seconds of a tree's moves with their ties, and how many it has


def agrees(agreement: Agreement, picked: dict[Choice, int]) -> bool:
    return agreement.a_keys[picked[agreement.a]] == agreement.b_keys[picked[agreement.b]]


ROOT = Layout(())


def steiner(
    problem: Problem, flow: Flow, made: frozenset[Layout], wanted: frozenset[Layout]
) -> Cost:
    """The cheapest moves that reach all of ``wanted``, each from one of those ``made``.

    ``tree[some][v]``: the cheapest tree that hangs on v and reaches ``some`` of them; those made
    hang on the root.
    """
    ends = sorted(wanted - made, key=str)
    out = reached(problem, flow, made)
    arcs = [
        (v, m.target, problem.seconds(flow, m) + TIE) for v, found in out.items() for m in found
    ]
    out[ROOT] = []
    tree: dict[frozenset[Layout], dict[Layout, Cost]] = {}
    for count in range(1, len(ends) + 1):
        for some in map(frozenset, itertools.combinations(ends, count)):
            cost: dict[Layout, Cost] = dict.fromkeys(out, (math.inf, 0))
            if count == 1:
                cost.update((v, (0.0, 0)) for v in some)
            for size in range(1, count // 2 + 1):
                for part in map(frozenset, itertools.combinations(sorted(some, key=str), size)):
                    for v in out:
                        (a, n), (b, m) = tree[part][v], tree[some - part][v]
                        cost[v] = min(cost[v], (a + b, n + m))
            changed = True
            while changed:
                changed = False
                for v, target, seconds in arcs:
                    far, n = cost[target]
                    if far + seconds < cost[v][0]:
                        cost[v], changed = (far + seconds, n + 1), True
                cost[ROOT] = min([cost[ROOT], *(cost[v] for v in made)])
            tree[some] = cost
    return tree[frozenset(ends)][ROOT] if ends else (0.0, 0)


@dataclass(eq=False)
class Search:
    """``best``: the least objective found. After ``visits`` decisions the search ends undecided,
    having found nothing better in that part of the tree, the most promising one."""

    problem: Problem
    visits: float = math.inf
    best: float = math.inf
    picked: dict[Choice, int] = field(default_factory=dict)
    visited: int = 0
    trees: dict[object, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = self.ordered()
        at = {c: i for i, c in enumerate(self.order)}
        self.closing: dict[int, list[Flow]] = defaultdict(list)
        for flow in self.problem.flows:
            ends = [*flow.sources, *flow.sinks]
            self.closing[max(at[e.choice] for e in ends)].append(flow)
        self.agreeing: dict[int, list[Agreement]] = defaultdict(list)
        for agreement in self.problem.agreements:
            self.agreeing[max(at[agreement.a], at[agreement.b])].append(agreement)

    def ordered(self) -> list[Choice]:
        """Neighbours close to each other, so that flows are decided early."""
        near: dict[Choice, set[Choice]] = defaultdict(set)
        for flow in self.problem.flows:
            ends = {e.choice for e in (*flow.sources, *flow.sinks)}
            for c in ends:
                near[c] |= ends - {c}
        for agreement in self.problem.agreements:
            near[agreement.a].add(agreement.b)
            near[agreement.b].add(agreement.a)
        left, order = list(self.problem.choices), []
        while left:
            done = set(order)
            nxt = max(left, key=lambda c: (len(near[c] & done), -len(near[c] - done)))
            order.append(nxt)
            left.remove(nxt)
        return order

    def tree(self, flow: Flow, picked: dict[Choice, int]) -> Cost:
        def lie(ends: Iterable[End]) -> frozenset[Layout]:
            found = (e.layouts[picked[e.choice]] for e in ends)
            return frozenset(layout for layout in found if layout is not None)

        made, wanted = lie(flow.sources), lie(flow.sinks)
        key = (flow, made, wanted)
        if key not in self.trees:
            self.trees[key] = steiner(self.problem, flow, made, wanted)
        return self.trees[key]

    def objective(self, spent: Spent) -> float:
        share = self.problem.cost.overlap
        return sum(
            serial + (1 - share) * hideable + max(compute, share * hideable)
            for compute, serial, hideable in spent.values()
        )

    def price(self, picked: dict[Choice, int]) -> float:
        """The objective of one decision for everything."""
        spent = dict.fromkeys(self.problem.boundaries, (0.0, 0.0, 0.0))
        for choice in self.order:
            spent = self.with_choice(spent, choice, picked[choice])
        for flow in self.problem.flows:
            spent = self.with_flow(spent, flow, picked)
        return self.objective(spent)

    def with_choice(self, spent: Spent, choice: Choice, i: int) -> Spent:
        compute, serial, hideable = spent[choice.region]
        tie = ugliness(self.problem, choice, choice.options[i]) * TIE
        return {**spent, choice.region: (compute + choice.seconds[i], serial + tie, hideable)}

    def with_least(self, spent: Spent, choice: Choice, sign: int) -> Spent:
        """Counts, or no longer counts, what the choice costs at the least."""
        compute, serial, hideable = spent[choice.region]
        return {**spent, choice.region: (compute + sign * min(choice.seconds), serial, hideable)}

    def with_flow(self, spent: Spent, flow: Flow, picked: dict[Choice, int]) -> Spent:
        compute, serial, hideable = spent[flow.region]
        cost, moves = self.tree(flow, picked)
        if flow.hideable:
            ties = TIE * moves
            serial, hideable = serial + ties, hideable + cost - ties
        else:
            serial += cost
        return {**spent, flow.region: (compute, serial, hideable)}

    def run(self, below: float = math.inf) -> float:
        """The least objective, if it is less than ``below``; else ``below``."""
        self.best = below
        start: Spent = dict.fromkeys(self.problem.boundaries, (0.0, 0.0, 0.0))
        for choice in self.order:
            start = self.with_least(start, choice, 1)
        self.descend(0, start, {})
        return self.best

    def descend(self, depth: int, spent: Spent, picked: dict[Choice, int]) -> None:
        self.visited += 1
        if self.visited > self.visits:
            return
        if depth == len(self.order):
            self.best, self.picked = self.objective(spent), dict(picked)
            return
        choice = self.order[depth]
        spent = self.with_least(spent, choice, -1)
        children = []
        for i in range(len(choice.options)):
            picked[choice] = i
            if not all(agrees(a, picked) for a in self.agreeing[depth]):
                continue
            after = self.with_choice(spent, choice, i)
            for flow in self.closing[depth]:
                after = self.with_flow(after, flow, picked)
            children.append((self.objective(after), i, after))
        children.sort(key=lambda child: child[:2])
        for bound, i, after in children:
            if bound >= self.best:
                break
            picked[choice] = i
            self.descend(depth + 1, after, picked)
        del picked[choice]


def ties(problem: Problem, solution: Solution) -> float:
    """Seconds of the objective that only order equal plans."""
    moves = solution.assignment.moves or {}
    cuts = (ugliness(problem, c, c.options[i]) for c, i in solution.picked.items())
    return TIE * (sum(cuts) + sum(map(len, moves.values())))
