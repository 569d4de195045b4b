"""Which options and moves are left, once it is proved what the rest would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from neocc.passes.layout.bound import Relaxation, Use, Way
from neocc.passes.layout.objective import MICRO, TIE
from neocc.passes.layout.problem import Choice, Flow, Problem

BLOCK = 1 << 21  # table entries compared at a time


@dataclass(frozen=True, eq=False)
class Kept:
    """``options``: indices of each choice's options that are left. ``moves``: per flow and sink,
    indices (in the flow's graph) of moves that are left."""

    options: dict[Choice, np.ndarray]
    moves: dict[Flow, list[np.ndarray]]

    @property
    def option_count(self) -> int:
        return sum(map(len, self.options.values()))

    @property
    def columns(self) -> int:
        """Columns of the program: options, moves of each sink, and moves that sinks share."""
        total = self.option_count
        for by_sink in self.moves.values():
            total += sum(map(len, by_sink))
            if len(by_sink) > 1:
                total += len(np.unique(np.concatenate(by_sink)))
        return total


def everything(problem: Problem, only: Mapping[Choice, np.ndarray] | None = None) -> Kept:
    """All options, but for those that have ``only`` some, and all moves on a way from what a
    source may make to what a sink may want."""
    options = {c: np.arange(len(c.options)) for c in problem.choices} | dict(only or {})
    moves = {}
    for flow in problem.flows:
        graph = problem.reshards_of(flow)
        near = graph.reach(np.concatenate([graph.numbers(s.layouts) for s in flow.sources]))
        useful = graph.lead(np.concatenate([graph.numbers(s.layouts) for s in flow.sinks]))
        found = np.flatnonzero(near[graph.source] & useful[graph.target])
        moves[flow] = [found] * len(flow.sinks)
    return Kept(options, moves)


def keep(relaxation: Relaxation, slack: float, margin: float) -> Kept:
    """What is left when everything goes that adds more than ``slack`` to the bound. ``margin``:
    what rounding may add, all in microseconds."""
    problem = relaxation.problem
    options = {c: np.flatnonzero(relaxation.slack(c) <= slack) for c in problem.choices}
    options.update((c, np.intersect1d(options[c], i)) for c, i in relaxation.only.items())
    moves = {flow: [np.zeros(0, np.intp)] * len(flow.sinks) for flow in problem.flows}
    for use, starts, ends, adds in pairs(relaxation):
        flow = use.flow
        fine = (adds <= slack) & (starts >= 0) & (ends >= 0)
        starts, ends, spare = starts[fine], ends[fine], slack - adds[fine]
        if len(flow.sinks) == 1 and flow not in relaxation.limited:
            # Alone on its way, it takes a cheapest one. Where that may hide, what moves count
            # for against ties depends on how much stands over: the cheapest differ by ties.
            hides = problem.hidden_share(flow).any()
            ties = TIE * MICRO * 2 * len(problem.mesh) if hides else 0.0
            spare = np.minimum(spare, ties)
        spare = spare / relaxation.shares[flow][use.sink] + margin
        found = on_the_way(relaxation.ways[flow], starts, ends, spare)
        moves[flow][use.sink] = np.flatnonzero(found)
    return Kept(options, moves)


def union(a: Kept, b: Kept) -> Kept:
    """What either keeps."""
    return Kept(
        {c: np.union1d(left, b.options[c]) for c, left in a.options.items()},
        {
            flow: [np.union1d(x, y) for x, y in zip(left, b.moves[flow], strict=True)]
            for flow, left in a.moves.items()
        },
    )


def pairs(relaxation: Relaxation) -> Iterator[tuple[Use, np.ndarray, np.ndarray, np.ndarray]]:
    """Per use: every start and end that an option, or a pair, means, and what it adds."""
    slack = relaxation.messages.slack
    for f in relaxation.folded:
        if isinstance(f.of, Use):
            yield f.of, f.of.starts[f.x], f.of.ends[f.y], slack[f.node]
    for joined in relaxation.joined:
        edge = joined.edge
        adds = np.maximum(edge.pairs, edge.a_fold(slack[edge.a])[:, None])
        adds = np.maximum(adds, edge.b_fold(slack[edge.b])[None, :])
        for term, rows, columns in joined.terms:
            if isinstance(use := term.of, Use):
                if term.turned:
                    starts, ends = use.starts[columns][None, :], use.ends[rows][:, None]
                else:
                    starts, ends = use.starts[rows][:, None], use.ends[columns][None, :]
                starts, ends = np.broadcast_arrays(starts, ends)
                yield use, starts.ravel(), ends.ravel(), adds.ravel()


def on_the_way(way: Way, starts: np.ndarray, ends: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Moves on a path from a start to its end that costs at most ``spare`` over the cheapest."""
    graph = way.graph
    found = np.zeros(len(graph.moves), bool)
    if not len(graph.moves):
        return found
    # Of equal pairs, the one with the most to spare.
    keys = starts * len(graph.index) + ends
    order = np.lexsort((-spare, keys))
    first = order[np.r_[True, np.diff(keys[order]) > 0]] if len(order) else order
    for some in np.array_split(first, max(1, len(first) * len(graph.moves) // BLOCK)):
        s, e = starts[some], ends[some]
        through = way.far[s][:, graph.source] + way.weights + way.far[:, e][graph.target].T
        found |= (through <= (way.far[s, e] + spare[some])[:, None]).any(axis=0)
    return found
