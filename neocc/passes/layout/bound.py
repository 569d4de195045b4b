"""A lower bound of every assignment, and of every one that takes a given option or move.

The layout problem is relaxed to one over pairs of choices (``messages``). Of a flow, each sink
pays a share of the cheapest path from what a source makes to what it wants: a tree that holds such
a path for every sink costs at least the sum. Of what compute may hide, a given share of what stands
over is counted, and of memory rows a given price (Lagrange). Everything is in microseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from neocc.ir.program import Region
from neocc.passes.layout.messages import STILL, Edge, Messages
from neocc.passes.layout.objective import MICRO, TIE, Limit, ugliness
from neocc.passes.layout.problem import Agreement, Choice, End, Flow, Problem
from neocc.passes.layout.reshards import Reshards

ROUNDS = 2  # of sharing flows' costs out


@dataclass(frozen=True, eq=False)
class Use:
    """What one sink of a flow needs: ``starts[i]`` is the layout that row i of a table of costs
    makes, ``ends[j]`` the one that its column j wants, -1 for none."""

    flow: Flow
    sink: int
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, eq=False)
class Tie:
    """Two nodes that must agree: a node that stands for one sink's source with a source of the
    flow; or choices."""

    clash: np.ndarray


@dataclass(frozen=True, eq=False)
class Term:
    """What a use or a tie costs, over ``a_keys[x]`` and ``b_keys[y]`` for option x of node a and
    y of b. ``turned``: the use's starts are b's."""

    a: int
    b: int
    a_keys: np.ndarray
    b_keys: np.ndarray
    of: Use | Tie
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.a_keys.max()) + 1, int(self.b_keys.max()) + 1

    def forward(self) -> Term:
        """The same with a before b."""
        if self.a <= self.b:
            return self
        return Term(self.b, self.a, self.b_keys, self.a_keys, self.of, not self.turned)


@dataclass(frozen=True, eq=False)
class Joined:
    """Terms of one edge; each with what it calls every row and every column."""

    edge: Edge
    terms: list[tuple[Term, np.ndarray, np.ndarray]]

    @staticmethod
    def of(terms: list[Term]) -> Joined:
        if len(terms) == 1:
            (term,) = terms
            rows, columns = (np.arange(n)[None] for n in term.shape)
            a_rows, b_rows = term.a_keys, term.b_keys
        else:
            a_keys, b_keys = np.stack([t.a_keys for t in terms]), [t.b_keys for t in terms]
            rows, a_rows = np.unique(a_keys, axis=1, return_inverse=True)
            columns, b_rows = np.unique(np.stack(b_keys), axis=1, return_inverse=True)
        table = np.zeros((rows.shape[1], columns.shape[1]))
        edge = Edge(terms[0].a, terms[0].b, a_rows.ravel(), b_rows.ravel(), table)
        return Joined(edge, list(zip(terms, rows, columns, strict=True)))


@dataclass(frozen=True, eq=False)
class Folded:
    """A term that one node alone decides: the row and column of each of its options."""

    node: int
    x: np.ndarray
    y: np.ndarray
    of: Use | Tie

    @staticmethod
    def within(term: Term) -> Folded:
        """Raises AssertionError if two nodes have a say."""
        rows, columns = term.shape
        assert term.a == term.b or 1 in (rows, columns)
        node, x, y = term.a, term.a_keys, term.b_keys
        if term.a != term.b and rows == 1:
            node, x = term.b, np.zeros_like(term.b_keys)
        elif term.a != term.b:
            y = np.zeros_like(term.a_keys)
        return Folded(node, *((y, x) if term.turned else (x, y)), term.of)


@dataclass(frozen=True, eq=False)
class Way:
    """A flow's moves: their graph, what each costs in the relaxation (all sinks' shares), and
    the cheapest sums of that between layouts."""

    graph: Reshards
    weights: np.ndarray
    far: np.ndarray


@dataclass(frozen=True, eq=False)
class Prices:
    """What a relaxation counts. exposed: per region the share of its hideable communication,
    less its compute, that stands over (0 to 1, 0 where none is named). limits: the microseconds
    that the whole of each limit costs."""

    exposed: Mapping[Region, float] = field(default_factory=dict)
    limits: Sequence[float] = ()


class Relaxation:
    """The relaxed problem. ``shares``: of each flow's cost, what each sink pays, in sum all.
    ``only``: the options that choices are left, where not all."""

    def __init__(
        self, problem: Problem, limits: Sequence[Limit] = (), prices: Prices | None = None
    ):
        self.problem = problem
        self.limits = limits
        self.limited = {flow for limit in limits for flow in limit.moves}
        self.only: Mapping[Choice, np.ndarray] = {}
        self.number = {c: i for i, c in enumerate(problem.choices)}
        self.sizes = [len(c.options) for c in problem.choices]
        self.places = [float(i) for i in range(len(self.sizes))]
        self.ties = [
            np.array([ugliness(problem, c, o) for o in c.options]) * TIE for c in problem.choices
        ]
        self.graphs = {flow: problem.reshards_of(flow) for flow in problem.flows}
        self.known: dict[object, Way] = {}
        self.joined: list[Joined] = []
        self.folded: list[Folded] = []
        terms = [t for flow in problem.flows for t in self.terms(flow)]
        terms += [self.agreement(a) for a in problem.agreements]
        self.place([t.forward() for t in terms])
        edges = [joined.edge for joined in self.joined]
        self.messages = Messages([np.zeros(n) for n in self.sizes], edges, self.places)
        self.prices = prices or Prices({}, [0.0] * len(limits))
        self.price(self.prices)

    @property
    def bound(self) -> float:
        """No assignment costs less, prices counted."""
        return self.messages.bound

    def slack(self, choice: Choice) -> np.ndarray:
        """How much more than the bound everything costs that takes an option of a choice."""
        return self.messages.slack[self.number[choice]]

    def terms(self, flow: Flow) -> Iterable[Term]:
        """The costs of a flow between pairs of nodes."""
        graph = self.graphs[flow]
        sources = [(self.number[s.choice], graph.numbers(s.layouts)) for s in flow.sources]
        for k, end in enumerate(flow.sinks):
            sink, wanted = self.number[end.choice], graph.numbers(end.layouts)
            if len(sources) == 1:
                source, made = sources[0]
            else:
                # A node of its own says which source this sink takes, and in which layout.
                source = len(self.sizes)
                made, tied = pick_source(source, sources)
                yield from tied
                self.sizes.append(len(made))
                self.places.append(self.places[sink] - 0.5)
            starts, start_keys = np.unique(made, return_inverse=True)
            ends, end_keys = np.unique(wanted, return_inverse=True)
            yield Term(source, sink, start_keys, end_keys, Use(flow, k, starts, ends))

    def agreement(self, agreement: Agreement) -> Term:
        """Options of different keys are never picked together."""
        a_names, a_keys = np.unique(agreement.a_keys, return_inverse=True)
        b_names, b_keys = np.unique(agreement.b_keys, return_inverse=True)
        a, b = self.number[agreement.a], self.number[agreement.b]
        return Term(a, b, a_keys, b_keys, Tie(a_names[:, None] != b_names[None, :]))

    def place(self, terms: list[Term]) -> None:
        """Terms of one node go into its costs, those of one pair of nodes into one edge."""
        pairs: dict[tuple[int, int], list[Term]] = defaultdict(list)
        for t in terms:
            if t.a == t.b or min(t.shape) == 1:
                self.folded.append(Folded.within(t))
            else:
                pairs[t.a, t.b].append(t)
        self.joined = [Joined.of(found) for found in pairs.values()]

    def price(self, prices: Prices, only: Mapping[Choice, np.ndarray] | None = None) -> None:
        """Sets all costs to what they are under ``prices``; and the options that are left, if
        they are to change. Messages and shares begin anew: those of other prices end in worse
        bounds."""
        self.prices = prices
        self.only = self.only if only is None else only
        self.known = {}
        self.shares = {f: np.full(len(f.sinks), 1.0 / len(f.sinks)) for f in self.problem.flows}
        self.messages.clear()
        self.ways = {flow: self.way(flow) for flow in self.problem.flows}
        self.fill()

    def fill(self) -> None:
        """Sets all costs, from the prices and the shares of flows."""
        costs = [self.own_costs(c) for c in self.problem.choices]
        costs += [np.zeros(n) for n in self.sizes[len(costs) :]]
        self.never = self.forbidden(costs)
        for choice, left in self.only.items():
            gone = np.delete(np.arange(len(choice.options)), left)
            costs[self.number[choice]][gone] = self.never
        for f in self.folded:
            costs[f.node] = costs[f.node] + self.table(f.of)[f.x, f.y]
        for joined in self.joined:
            table = np.zeros_like(joined.edge.table)
            for term, rows, columns in joined.terms:
                found = self.table(term.of)
                table += (found.T if term.turned else found)[np.ix_(rows, columns)]
            joined.edge.table = table
        self.messages.costs = costs

    def own_costs(self, choice: Choice) -> np.ndarray:
        """What a choice's options cost by themselves."""
        exposed = self.prices.exposed.get(choice.region, 0.0)
        own = np.array(choice.seconds) * (1 - exposed) + self.ties[self.number[choice]]
        found = own * MICRO
        for limit, price in zip(self.limits, self.prices.limits, strict=True):
            if price and choice in limit.options:
                found = found + np.array(limit.options[choice]) * (price / max(limit.limit, 1.0))
        return found

    def way(self, flow: Flow) -> Way:
        graph, exposed = self.graphs[flow], self.prices.exposed.get(flow.region, 0.0)
        held = [
            (limit.moves[flow], price / max(limit.limit, 1.0))
            for limit, price in zip(self.limits, self.prices.limits, strict=True)
            if price and flow in limit.moves
        ]
        hides = flow.hideable or graph.host.any()
        key = flow if held else (id(graph), flow.hideable, hides and exposed, flow.trips)
        if key not in self.known:
            share = 1 - self.problem.hidden_share(flow) * (1 - exposed)
            weights = (graph.seconds * flow.trips * share + TIE) * MICRO
            for by_layout, price in held:
                found = np.array([by_layout.get(layout, 0.0) for layout in graph.index])
                weights = weights + price * found[graph.target]
            self.known[key] = Way(graph, weights, graph.distances(weights))
        return self.known[key]

    def table(self, of: Use | Tie) -> np.ndarray:
        """The cost of every start (row) and end. A sink that wants nothing pays nothing; what
        makes nothing, or from where no path leads, cannot serve it."""
        if isinstance(of, Tie):
            return np.where(of.clash, self.never, 0.0)
        found = self.ways[of.flow].far[np.ix_(of.starts, of.ends)]
        found = np.minimum(found * self.shares[of.flow][of.sink], self.never)
        found[of.starts == -1, :] = self.never
        found[:, of.ends == -1] = 0.0
        return found

    def forbidden(self, costs: list[np.ndarray]) -> float:
        """What stands for infinity: far above what a good assignment costs, and not so far that
        sums with it lose what matters. Here each choice takes its cheapest option."""
        picked = [int(np.argmin(c)) for c in costs]
        total = sum(float(c.min()) for c in costs)
        for flow in self.problem.flows:
            far = self.lengths(flow, picked)
            total += float(far.sum())
        return 10.0 * total + 1.0

    def lengths(self, flow: Flow, picked: Sequence[int]) -> np.ndarray:
        """What the way to each sink costs where every choice takes the option ``picked``; 0 where
        there is none."""
        way = self.ways[flow]

        def at(ends: Iterable[End]) -> np.ndarray:
            return way.graph.numbers(e.layouts[picked[self.number[e.choice]]] for e in ends)

        starts, ends = at(flow.sources), at(flow.sinks)
        far = way.far[np.ix_(starts[starts >= 0], ends)].min(axis=0, initial=np.inf)
        far[(ends < 0) | np.isinf(far)] = 0.0
        return far

    def settle(self, rounds: int = ROUNDS) -> float:
        """Passes messages; then lets each sink pay for its flow as far as its own way is long
        where every choice takes its cheapest option, and passes messages again, as long as that
        raises the bound. Returns it."""
        self.messages.settle()
        for step in range(rounds):
            bound, shares, state = self.bound, self.shares, self.messages.state()
            self.shares = self.by_length(self.messages.cheapest(), 1.0 / (step + 1))
            self.fill()
            if self.messages.settle() <= bound + STILL * abs(bound):
                self.shares = shares
                self.fill()
                self.messages.restore(state)
                self.messages.settle()
                break
        return self.bound

    def by_length(self, picked: Sequence[int], step: float) -> dict[Flow, np.ndarray]:
        """Shares that go a ``step`` (0 to 1) from today's to what each sink's own way takes of
        the sum of all, where every choice takes the option ``picked``."""
        found = dict(self.shares)
        for flow in self.problem.flows:
            if len(flow.sinks) > 1 and (far := self.lengths(flow, picked)).sum() > 0:
                # None pays nothing at all, so that what it cannot reach stays out of reach.
                shares = 0.999999 * far / far.sum() + 0.000001 / len(far)
                found[flow] = (1 - step) * self.shares[flow] + step * shares
        return found


def pick_source(node: int, sources: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, list[Term]]:
    """The layouts of a node that stands for one sink's source (the last is none), and its ties to
    what the sources make."""
    options = [(j, lay) for j, (_, made) in enumerate(sources) for lay in set(made) if lay >= 0]
    layouts = np.array([*(lay for _, lay in options), -1], dtype=np.intp)
    of = np.array([*(j for j, _ in options), -1])
    tied = []
    for j, (source, made) in enumerate(sources):
        rows, keys = np.unique(made, return_inverse=True)
        clash = (of == j)[None, :] & (rows[:, None] != layouts[None, :])
        tied.append(Term(source, node, keys, np.arange(len(of)), Tie(clash)))
    return layouts, tied
