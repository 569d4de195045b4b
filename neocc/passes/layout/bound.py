"""A lower bound of every assignment, and of every one that takes a given option or move.

The layout problem is relaxed to one over pairs of choices: of a flow with K sinks, each sink
pays a K-th of the cheapest path from what the source makes to what it wants (the dearest of them,
and so the tree of all, costs at least their mean). Of what compute may hide, a given share of what
stands over is counted, and of memory rows a given price (Lagrange). That problem is bounded by
messages between choices: sequential tree-reweighted message passing (V. Kolmogorov, "Convergent
tree-reweighted message passing for energy minimization", PAMI 28, 2006). Everything is in
microseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from neocc.ir.program import Region
from neocc.passes.layout.objective import MICRO, TIE, Limit, ugliness
from neocc.passes.layout.problem import Choice, End, Flow, Problem
from neocc.passes.layout.reshards import Reshards

SWEEPS = 60
STILL = 1e-8  # a share of the bound: when a sweep gains less, the messages have settled


@dataclass(frozen=True, eq=False)
class Use:
    """What one sink of a flow needs, over the rows and columns of a table of costs:
    ``starts[i]`` the layout that row i makes, ``ends[j]`` the one that column j wants, -1 for
    none."""

    flow: Flow
    sink: int
    starts: np.ndarray
    ends: np.ndarray


@dataclass(eq=False)
class Term:
    """Costs between two nodes: ``table[a_keys[x], b_keys[y]]`` for option x of a and y of b."""

    a: int
    b: int
    a_keys: np.ndarray
    b_keys: np.ndarray
    table: np.ndarray
    use: Use | None = None
    turned: bool = False  # the use's starts are b's

    def turn(self) -> Term:
        turned = not self.turned
        return Term(self.b, self.a, self.b_keys, self.a_keys, self.table.T, self.use, turned)


@dataclass(eq=False)
class Edge:
    """All terms between nodes a and b. Options that no term tells apart share a row (column);
    ``terms`` has each with what it calls every row and every column.

    ``to_a``, ``to_b``: messages, per row and column; ``from_a``, ``from_b``: what the node had
    left for this edge when it last sent one.
    """

    a: int
    b: int
    a_rows: np.ndarray
    b_rows: np.ndarray
    table: np.ndarray
    terms: list[tuple[Term, np.ndarray, np.ndarray]]
    to_a: np.ndarray = field(init=False)
    to_b: np.ndarray = field(init=False)
    from_a: np.ndarray = field(init=False)
    from_b: np.ndarray = field(init=False)
    pairs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.table.shape
        self.to_a, self.to_b = np.zeros(rows), np.zeros(columns)
        self.from_a, self.from_b = np.zeros(rows), np.zeros(columns)
        self.pairs = np.zeros_like(self.table)
        self.a_fold, self.b_fold = Fold.of(self.a_rows), Fold.of(self.b_rows)

    @staticmethod
    def of(terms: list[Term]) -> Edge:
        rows, a_rows = np.unique(np.stack([t.a_keys for t in terms]), axis=1, return_inverse=True)
        columns, b_rows = np.unique(
            np.stack([t.b_keys for t in terms]), axis=1, return_inverse=True
        )
        named = list(zip(terms, rows, columns, strict=True))
        table = np.sum([t.table[np.ix_(x, y)] for t, x, y in named], axis=0)
        return Edge(terms[0].a, terms[0].b, a_rows.ravel(), b_rows.ravel(), table, named)

    def message(self, node: int) -> np.ndarray:
        """What this edge tells each option of one of its nodes."""
        return self.to_a[self.a_rows] if node == self.a else self.to_b[self.b_rows]

    def send(self, node: int, share: np.ndarray) -> float:
        """Tells the other node what ``share`` of each option's cost, with this edge, leaves it
        at the least; returns that least over all its options, which the message leaves out."""
        if node == self.a:
            self.from_a = self.a_fold(share) - self.to_a
            found = (self.from_a[:, None] + self.table).min(axis=0)
            least = found.min()
            self.to_b = found - least
        else:
            self.from_b = self.b_fold(share) - self.to_b
            found = (self.from_b[None, :] + self.table).min(axis=1)
            least = found.min()
            self.to_a = found - least
        return float(least)

    def compare(self, node: int, slack: np.ndarray) -> None:
        """Sets ``pairs``: how much every pair of options adds to the bound, from ``slack``, what
        each option of the node that is about to send adds, and what the other sent it."""
        if node == self.a:
            left = self.from_b[None, :] + self.table
            self.pairs = self.a_fold(slack)[:, None] + left - left.min(axis=1, keepdims=True)
        else:
            left = self.from_a[:, None] + self.table
            self.pairs = self.b_fold(slack)[None, :] + left - left.min(axis=0, keepdims=True)


@dataclass(frozen=True, eq=False)
class Fold:
    """The least of each row's options."""

    order: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(rows: np.ndarray) -> Fold:
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        return Fold(order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(values[self.order], self.starts)


@dataclass(frozen=True, eq=False)
class Way:
    """A flow's moves: their graph, what each costs in the relaxation (not shared by sinks), and
    the cheapest sums of that between layouts."""

    graph: Reshards
    weights: np.ndarray
    far: np.ndarray


class Relaxation:
    """The relaxed problem and its messages.

    ``exposed``: per region the share of its hideable communication, less its compute, that is
    counted as standing over (0 to 1). ``prices``: for each limit, the microseconds that the
    whole of it costs. ``shares``: of each flow's cost, what each sink pays (in sum, all of it).
    """

    def __init__(
        self,
        problem: Problem,
        exposed: Mapping[Region, float] | None = None,
        limits: Sequence[Limit] = (),
        prices: Sequence[float] = (),
    ):
        self.problem = problem
        self.exposed = exposed or {}
        self.limits = limits
        self.priced = [(lim, p) for lim, p in zip(limits, prices, strict=True) if p > 0]
        self.number = {c: i for i, c in enumerate(problem.choices)}
        self.known: dict[object, Way] = {}
        self.ways = {flow: self.way(flow) for flow in problem.flows}
        self.shares = {f: np.full(len(f.sinks), 1.0 / len(f.sinks)) for f in problem.flows}
        self.own = [self.own_costs(c) for c in problem.choices]
        self.edges: list[Edge] = []
        self.assemble()

    def assemble(self) -> None:
        """Nodes, edges and their costs, from the shares; messages stay as they are."""
        known = self.edges
        self.costs = list(self.own)
        self.places = [float(i) for i in range(len(self.costs))]  # in the order of messages
        self.folded: list[tuple[int, np.ndarray, np.ndarray, Use]] = []
        self.edges = self.make_edges([t for flow in self.problem.flows for t in self.terms(flow)])
        for old, new in zip(known, self.edges, strict=False):
            new.to_a, new.to_b = old.to_a, old.to_b
        self.before: list[list[Edge]] = [[] for _ in self.costs]
        self.after: list[list[Edge]] = [[] for _ in self.costs]
        for e in self.edges:
            first, second = sorted((e.a, e.b), key=self.places.__getitem__)
            self.after[first].append(e)
            self.before[second].append(e)
        self.order = sorted(range(len(self.costs)), key=self.places.__getitem__)
        self.slack = [np.zeros(len(c)) for c in self.costs]
        self.bound = -np.inf

    def own_costs(self, choice: Choice) -> np.ndarray:
        seconds = np.array(choice.seconds) * (1 - self.exposed.get(choice.region, 0.0))
        ties = np.array([ugliness(self.problem, choice, o) for o in choice.options]) * TIE
        found = (seconds + ties) * MICRO
        for limit, price in self.priced:
            if choice in limit.options:
                found += np.array(limit.options[choice]) * price / max(limit.limit, 1.0)
        return found

    def way(self, flow: Flow) -> Way:
        problem = self.problem
        graph = problem.reshards_of(flow)
        share = 1.0
        if flow.hideable:
            share -= problem.cost.overlap * (1 - self.exposed.get(flow.region, 0.0))
        held = [
            (lim.moves[flow], p / max(lim.limit, 1.0))
            for lim, p in self.priced
            if flow in lim.moves
        ]
        key = flow if held else (id(graph), share * flow.trips)
        if key not in self.known:
            weights = (graph.seconds * flow.trips * share + TIE) * MICRO
            for by_layout, price in held:
                weights = weights + price * np.array(
                    [by_layout.get(m.target, 0.0) for m in graph.moves]
                )
            self.known[key] = Way(graph, weights, graph.distances(weights))
        return self.known[key]

    def terms(self, flow: Flow) -> list[Term]:
        """The costs of a flow between pairs of nodes."""
        way = self.ways[flow]
        sources = [(self.number[s.choice], way.graph.numbers(s.layouts)) for s in flow.sources]
        found: list[Term] = []
        for k, end in enumerate(flow.sinks):
            sink, wanted = self.number[end.choice], way.graph.numbers(end.layouts)
            if len(sources) == 1:
                source, made = sources[0]
            else:
                # A node of its own says which source this sink takes, and in which layout.
                source = len(self.costs)
                made, tied = self.pick_source(source, sources)
                found += tied
                self.costs.append(np.zeros(len(made)))
                self.places.append(self.places[sink] - 0.5)
            starts, start_keys = np.unique(made, return_inverse=True)
            ends, end_keys = np.unique(wanted, return_inverse=True)
            use = Use(flow, k, starts, ends)
            table = self.table(use)
            found.append(Term(source, sink, start_keys, end_keys, table, use))
        return found

    def table(self, use: Use) -> np.ndarray:
        """A sink that wants nothing pays nothing; no source, or no path, cannot serve it."""
        far = self.ways[use.flow].far[np.ix_(use.starts, use.ends)]
        found = far * self.shares[use.flow][use.sink]
        found[use.starts == -1, :] = np.inf
        found[:, use.ends == -1] = 0.0
        return found

    def pick_source(
        self, node: int, sources: list[tuple[int, np.ndarray]]
    ) -> tuple[np.ndarray, list[Term]]:
        """The options of a node that stands for one sink's source (the last is none), and their
        ties to what the sources make."""
        options = [
            (j, lay) for j, (_, made) in enumerate(sources) for lay in np.unique(made) if lay >= 0
        ]
        layouts = np.array([*(lay for _, lay in options), -1])
        of = np.array([*(j for j, _ in options), -1])
        tied = []
        for j, (source, made) in enumerate(sources):
            rows, keys = np.unique(made, return_inverse=True)
            clash = (of == j)[None, :] & (rows[:, None] != layouts[None, :])
            table = np.where(clash, np.inf, 0.0)
            tied.append(Term(source, node, keys, np.arange(len(of)), table))
        return layouts, tied

    def make_edges(self, terms: list[Term]) -> list[Edge]:
        """Terms of one node go into its costs, those of one pair of nodes into one edge."""
        never = self.forbidden(terms)
        pairs: dict[tuple[int, int], list[Term]] = defaultdict(list)
        for t in terms:
            t.table = np.minimum(t.table, never)
            if t.a != t.b and min(t.table.shape) > 1:
                pairs[min(t.a, t.b), max(t.a, t.b)].append(t if t.a < t.b else t.turn())
                continue
            node = t.b if t.table.shape[0] == 1 else t.a
            options = np.zeros(len(self.costs[node]), np.intp)
            x = options if t.table.shape[0] == 1 else t.a_keys
            y = options if t.table.shape[1] == 1 else t.b_keys
            self.costs[node] = self.costs[node] + t.table[x, y]
            if t.use is not None:
                self.folded.append((node, x, y, t.use))
        return [Edge.of(found) for found in pairs.values()]

    def forbidden(self, terms: list[Term]) -> float:
        """What stands for infinity: far above the cost of the choices' cheapest options, and not
        so far that a sum with it loses what matters."""
        total = sum(float(c.min()) for c in self.costs)
        for t in terms:
            seen = t.table[np.isfinite(t.table)]
            total += float(np.median(seen)) if len(seen) else 0.0
        return 100.0 * total + 1.0

    def sweep(self, backward: bool, last: bool = False) -> float:
        """Messages along the order of the nodes, or against it; returns the bound. ``last``:
        notes what each option, and each pair, adds to it."""
        total = 0.0
        nodes = reversed(self.order) if backward else self.order
        into, out = (self.after, self.before) if backward else (self.before, self.after)
        for i in nodes:
            cost = self.costs[i].copy()
            for e in into[i]:
                cost += e.message(i)
            for e in out[i]:
                cost += e.message(i)
            trees = max(len(into[i]), len(out[i]), 1)
            least = float(cost.min())
            if last:
                self.slack[i] = cost - least
                for e in out[i]:
                    e.compare(i, self.slack[i])
            share = cost / trees
            for e in out[i]:
                total += e.send(i, share)
            total += (trees - len(out[i])) * least / trees
        return total

    def pass_messages(self, sweeps: int = SWEEPS) -> float:
        """Passes messages until the bound hardly rises; returns it, and sets ``slack``: how much
        more than ``bound`` everything costs that takes an option of a choice."""
        before = -np.inf
        for _ in range(sweeps):
            self.sweep(backward=False)
            found = self.sweep(backward=True)
            if found - before <= STILL * abs(found):
                break
            before = found
        self.bound = self.sweep(backward=False)
        self.sweep(backward=True, last=True)
        return self.bound

    def settle(self, rounds: int = 2) -> float:
        """Passes messages; then lets each sink pay for its flow as far as its own way is long
        where every choice takes its cheapest option, and passes messages again, as long as that
        raises the bound. Returns it."""
        self.pass_messages()
        for step in range(rounds):
            best = self.bound, self.shares, [(e.to_a, e.to_b) for e in self.edges]
            cheapest = [int(np.argmin(s)) for s in self.slack]
            self.shares = self.by_length(cheapest, 1.0 / (step + 1))
            self.assemble()
            if self.pass_messages() > best[0] * (1 + STILL):
                continue
            _, self.shares, messages = best
            self.assemble()
            for e, (to_a, to_b) in zip(self.edges, messages, strict=True):
                e.to_a, e.to_b = to_a, to_b
            self.pass_messages()
            break
        return self.bound

    def by_length(self, picked: Sequence[int], step: float) -> dict[Flow, np.ndarray]:
        """Shares that go a ``step`` (0 to 1) from today's to what each sink's own way takes of
        the sum of all, where every choice takes the option ``picked``."""
        found = dict(self.shares)
        for flow, way in self.ways.items():
            if len(flow.sinks) == 1:
                continue

            def at(end: End, way: Way = way) -> np.ndarray:
                return way.graph.numbers([end.layouts[picked[self.number[end.choice]]]])

            starts = np.concatenate([at(source) for source in flow.sources])
            ends = np.concatenate([at(sink) for sink in flow.sinks])
            far = way.far[np.ix_(starts[starts >= 0], ends)].min(axis=0, initial=np.inf)
            far[(ends < 0) | np.isinf(far)] = 0.0
            if far.sum() > 0:
                # None pays nothing at all, so that what it cannot reach stays out of reach.
                shares = 0.999999 * far / far.sum() + 0.000001 / len(far)
                found[flow] = (1 - step) * self.shares[flow] + step * shares
        return found
