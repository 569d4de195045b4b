"""Fused attention whose keys and values go round a ring of devices, and are never whole on one.

Each device has one block of the queries and one of the keys and values. In every turn it attends to
the keys that it holds while it sends them on. Liu, Zaharia and Abbeel, "Ring attention with
blockwise transformers for near-infinite context", arXiv 2310.01889. In the gradient either keys
and values go round, and the sums for both behind them, a turn later, so that they too are sent
while the next products run; or queries do, with the gradient of the output and their statistics,
and the sums for queries behind: whichever is less to send. Where every head has keys of its own
those are the queries, with one sum in float32 in place of two.

Under a causal mask the first devices of contiguous blocks would have little to do and the last ones
much. So there a device takes halves ``i`` and ``2n - 1 - i`` of ``2n`` (zig-zag): its own first
half and the second one of the device as far from the other end, its mirror, with which it swaps
them on the way in and out; nothing is swapped where the whole model has its sequences in that order
(``passes.zigzag``). Then every turn has the same work on every device: two of the four pairs of
halves. With a window the blocks stay as they are, and go only as far round as the window reaches.

Arrays are folded: q[n, group, seq, d], k[n, memory, d], of the local sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from neocc.ir.ops.attention_tiles import (
    LOWEST,
    Kernel,
    Tiles,
    backward_tiles,
    forward_tiles,
    held_at_once,
    in_parts,
    in_tiles,
    merged,
)
from neocc.ir.ops.base import Ring

BEYOND = np.iinfo(np.int32).max  # index of a key that fills a tile up: no key is there
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Circle:
    """How ``devices`` share attention of ``seq`` local queries and ``memory`` local keys.

    ``tiles``: of the local scores; ``halves``: 2 in zig-zag order, whose tiles end with a half,
    else 1; ``swaps``: blocks come and go contiguous, so that halves are swapped. ``turns``: for
    each, the tiles that are computed, by number: where the lower half of the keys lies before the
    lower half of the queries, and where behind; equally many. ``both``: keys may come from either
    side.
    """

    devices: int
    seq: int
    memory: int
    halves: int
    swaps: bool
    tiles: Tiles
    turns: tuple[tuple[Pairs, Pairs], ...]
    both: bool

    @property
    def computed(self) -> tuple[int, ...]:
        """Tiles of each turn."""
        return tuple(len(pairs) for pairs, _ in self.turns)

    @property
    def behind(self) -> int:
        """How many places the keys have gone on at the end."""
        return len(self.turns) - 1

    def ways(self, count: int) -> tuple[int, ...]:
        """Of ``count`` sequences that attend by themselves: forward alone, or one half of them
        forward and the other backward, so that the wires work both ways."""
        return (1, -1) if self.both and self.devices > 2 and count % 2 == 0 < count else (1,)

    def moves(self, way: int) -> Pairs:
        """Where each place sends its keys."""
        return tuple((i, (i + way) % self.devices) for i in range(self.devices))

    def home(self, gone: int) -> Pairs:
        """Where each place sends what has gone on by so many places, in the end."""
        return tuple((i, (i - gone) % self.devices) for i in range(self.devices))

    def mirror(self, gone: int = 0) -> Pairs:
        """Where each place sends the half that is its mirror's, of what has gone on."""
        n = self.devices
        return tuple((i, n - 1 - (i - gone) % n) for i in range(n))


@lru_cache(maxsize=1024)
def circle(
    seq: int,
    memory: int,
    causal: bool,
    window: int | None,
    devices: int,
    block: int,
    ordered: bool = False,
) -> Circle:
    """Of local sizes, in tiles of at most ``block`` x ``block`` scores; ``ordered``: blocks come
    and go in zig-zag order."""
    aligned = causal and seq == memory
    halves = 2 if aligned and window is None and devices > 1 and seq % 2 == 0 and seq else 1
    down, across = (max(1, -(-size // halves // block)) for size in (seq, memory))
    rows, columns = -(-seq // halves // down), -(-memory // halves // across)

    def pairs(lower: bool = False, most: int | None = None, apart: int = 0) -> Pairs:
        """Tiles with a key not behind its query, if ``lower``, and less than ``most`` before it,
        where the keys' block begins ``apart`` before that of the queries."""
        found = []
        for a in range(halves * down):
            for b in range(halves * across):
                first, last = apart + a * rows, apart + (a + 1) * rows - 1
                reach = 0 if most is None else first - most + 1
                seen = not lower or b * columns <= last
                if seen and (most is None or (b + 1) * columns - 1 >= reach):
                    found.append((a, b))
        return tuple(found)

    every = pairs()
    if halves == 2:
        first = pairs(lower=True)
        earlier = tuple((a, b) for a, b in every if b < across)
        later = tuple((a, b) for a, b in every if a >= down)
        turns = [(first, first), *((earlier, later) for _ in range(devices - 1))]
    elif aligned:
        count = devices if window is None else min(devices, 1 + -(-(window - 1) // max(1, seq)))
        each = (pairs(True, window, turn * seq) for turn in range(count))
        turns = [(some, some) for some in each]
    else:
        turns = [(every, every)] * devices
    cut = Tiles(rows, columns, halves * down, halves * across, every)
    both = not (aligned and window is not None)
    swaps = halves == 2 and not ordered
    return Circle(devices, seq, memory, halves, swaps, cut, tuple(turns), both)


# Orders


def spread(place: Any, rank: int) -> Any:
    """A number of a device, shaped to broadcast against arrays of ``rank`` axes."""
    return place.reshape(place.shape + (1,) * (rank - place.ndim))


def low_half(place: Any, devices: int, xp: Any) -> Any:
    """The lower of the halves that a place has in zig-zag order, of ``2 * devices``: the first of
    its own block, or the second of its mirror's."""
    return xp.minimum(2 * place, 2 * devices - 1 - 2 * place)


def zigzag(devices: int) -> tuple[int, ...]:
    """Zig-zag order: which halves of contiguous blocks each place has, one after the other."""
    lows = [int(low_half(place, devices, np)) for place in range(devices)]
    return tuple(half for low in lows for half in (low, 2 * devices - 1 - low))


def upper(place: Any, shape: Circle, rank: int) -> Any:
    """Whether a place's own half is the higher one."""
    return spread(2 * place >= shape.devices, rank)


def to_zigzag(x: Any, shape: Circle, ring: Ring, at: int, xp: Any) -> Any:
    """From contiguous blocks of axis ``at`` to zig-zag order: each device swaps its second half
    with its mirror."""
    if not shape.swaps:
        return x
    own, other = xp.split(x, 2, at)
    other = ring.send(other, shape.mirror())
    swapped = upper(ring.place, shape, x.ndim)
    return xp.concatenate([xp.where(swapped, other, own), xp.where(swapped, own, other)], at)


def from_zigzag(x: Any, shape: Circle, ring: Ring, at: int, xp: Any, gone: int = 0) -> Any:
    """The way back, also of what has gone on by some places."""
    if not shape.swaps:
        return ring.send(x, shape.home(gone))
    low, high = xp.split(x, 2, at)
    swapped = upper((ring.place - gone) % shape.devices, shape, x.ndim)
    own, other = xp.where(swapped, high, low), xp.where(swapped, low, high)
    own, other = ring.send(own, shape.home(gone)), ring.send(other, shape.mirror(gone))
    return xp.concatenate([own, other], at)


def firsts(place: Any, shape: Circle, length: int, xp: Any) -> list[Any]:
    """Global index of the first element of each half that a place has of a block of ``length``."""
    if shape.halves == 1:
        return [place * length]
    low = low_half(place, shape.devices, xp)
    return [half * (length // 2) for half in (low, 2 * shape.devices - 1 - low)]


def indices(place: Any, shape: Circle, length: int, xp: Any) -> Any:
    """Global indices [..., length] of the elements that a place has."""
    steps = xp.arange(length // shape.halves, dtype=xp.int32)
    return xp.concatenate([f[..., None] + steps for f in firsts(place, shape, length, xp)], -1)


# Turns


ROUND = {True: ("q", "dout", "stats"), False: ("k", "v")}  # what goes round, queries or keys
SUMS = {True: ("dq",), False: ("dk", "dv")}  # and comes behind


def rows_go_round(bytes: Mapping[str, int]) -> bool:
    """Whether in the gradient queries go round, in place of keys: those that are less to send, by
    the bytes that a device has of each (see ``sent``)."""
    rows, keys = (
        sum(bytes[n] for n in ROUND[which]) + sum(bytes[f"{n}+"] for n in SUMS[which])
        for which in (True, False)
    )
    return rows < keys


Take = Callable[[Any, Any, Any], Any]  # state, what goes round, number of the turn -> state
Onward = Callable[[Any], Any]


def each_way(x: Any, ways: Sequence[int], axis: int, xp: Any, f: Callable[[Any, int], Any]) -> Any:
    """``f`` of each of the equal parts of an axis, and its way."""
    parts = xp.split(x, len(ways), axis) if len(ways) > 1 else [x]
    made = [f(part, way) for part, way in zip(parts, ways, strict=True)]
    return xp.concatenate(made, axis) if len(ways) > 1 else made[0]


def circulate(shape: Circle, on: Onward, xp: Any, state: Any, here: Any, take: Take) -> Any:
    """Takes what each device holds into a state, turn by turn, and sends it ``on`` meanwhile."""

    def turn(carry: Any, step: Any) -> tuple[Any, None]:
        state, here = carry
        ahead = tuple(on(x) for x in here)
        return (take(state, here, step), ahead), None

    last = shape.behind
    if last == 0:
        return take(state, here, 0)
    carry, _ = turn((state, here), 0)
    middle = set(shape.turns[1:last])
    if xp.__name__ != "numpy" and len(middle) == 1 and last > 2:
        from jax import lax

        carry, _ = lax.scan(turn, carry, xp.arange(1, last, dtype=xp.int32))
    else:
        for step in range(1, last):
            carry, _ = turn(carry, step)
    state, here = carry
    return take(state, here, last)


def halved(x: Any, axis: int, shape: Circle, count: int, size: int) -> Any:
    """``x`` with each half filled up to its share of ``count`` tiles of ``size``."""
    if x.shape[axis] == count * size:
        return x
    parts = x.reshape((*x.shape[:axis], shape.halves, -1, *x.shape[axis + 1 :]))
    return merged(in_tiles(parts, axis + 1, count // shape.halves, size), axis)


def unhalved(x: Any, axis: int, shape: Circle, length: int) -> Any:
    """The inverse, down to ``length``."""
    if x.shape[axis] == length:
        return x
    parts = x.reshape((*x.shape[:axis], shape.halves, -1, *x.shape[axis + 1 :]))
    whole = [slice(None)] * parts.ndim
    whole[axis + 1] = slice(length // shape.halves)
    return merged(parts[tuple(whole)], axis)


@dataclass(frozen=True)
class Turn:
    """One turn under JAX: which tiles, and where they lie in the whole. ``rows``, ``columns``: the
    places that the queries and the keys come from."""

    kernel: Kernel
    shape: Circle
    step: Any
    rows: Any
    columns: Any

    @property
    def pairs(self) -> Any:
        """[count, 2]: numbers of the tiles."""
        xp = self.kernel.xp
        number = self.step if isinstance(self.step, int) else 1  # those in a loop are alike
        before, behind = (xp.asarray(p, xp.int32).reshape(-1, 2) for p in self.shape.turns[number])
        if self.shape.turns[number][0] == self.shape.turns[number][1]:
            return before
        own, other = (low_half(p, self.shape.devices, xp) for p in (self.rows, self.columns))
        return xp.where(other < own, before, behind)

    def indices(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Global indices of a tile's rows, those of all groups, and of its keys."""
        xp, cut, shape = self.kernel.xp, self.shape.tiles, self.shape

        def begin(place: Any, length: int, half: Any) -> Any:
            low, *high = firsts(place, shape, length, xp)
            return xp.where(half == 0, low, high[0]) if high else low

        half, tile = xp.divmod(a, cut.down // shape.halves)
        i = tile * cut.rows + xp.arange(cut.rows, dtype=xp.int32)
        i = i + begin(self.rows, shape.seq, half)
        half, tile = xp.divmod(b, cut.across // shape.halves)
        j = tile * cut.columns + xp.arange(cut.columns, dtype=xp.int32)
        real = j < shape.memory // shape.halves
        j = xp.where(real, j + begin(self.columns, shape.memory, half), BEYOND)
        return xp.tile(i, self.kernel.group), j


@dataclass(frozen=True)
class Round:
    """One op's way round, on a device: ``ways`` of the equal parts of what attends by itself, along
    axis ``lead`` of every array. ``rows``: the queries go round, the other way than the keys would,
    so that turn by turn each meets the same keys."""

    kernel: Kernel
    shape: Circle
    ring: Ring
    ways: tuple[int, ...]
    lead: int
    rows: bool = False

    def gone(self, way: int) -> int:
        """How many places on what goes round is after a turn."""
        return -way if self.rows else way

    def on(self, x: Any) -> Any:
        """What goes round, one place on."""

        def move(part: Any, way: int) -> Any:
            return self.ring.send(part, self.shape.moves(self.gone(way)))

        return each_way(x, self.ways, self.lead, self.kernel.xp, move)

    def back(self, x: Any) -> Any:
        """What has gone on, in its place and order."""
        shape, xp = self.shape, self.kernel.xp

        def home(part: Any, way: int) -> Any:
            return from_zigzag(
                part, shape, self.ring, x.ndim - 2, xp, self.gone(way) * shape.behind
            )

        return each_way(x, self.ways, self.lead, xp, home)

    def sources(self, apart: Any) -> tuple[Any, Any]:
        """The places that the queries and the keys come from that a device has when those that go
        round have gone so many places on, as keys would."""
        place, n = self.ring.place, self.shape.devices
        return ((place + apart) % n, place) if self.rows else (place, (place - apart) % n)

    def tiles(self, loop: Any, step: Any, held: int, *arrays: Any) -> Any:
        """A loop over the tiles of one turn, ``held`` of what attends by itself at a time."""
        kernel, shape = self.kernel, self.shape

        def run(ways: Any, *some: Any) -> Any:
            turn = Turn(kernel, shape, step, *self.sources(step * ways[0]))
            return loop(kernel, shape.tiles, turn.pairs, turn.indices, *some)

        count = arrays[0].shape[0] // len(self.ways)
        return in_parts(run, held, np.repeat(np.array(self.ways, np.int32), count), *arrays)

    def whole(self, step: Any) -> tuple[Any, Any]:
        """Global indices of all queries, of each group, and of all keys that a device has in a
        turn; they go one way."""
        rows, columns = self.sources(self.ways[0] * step)
        i = indices(rows, self.shape, self.shape.seq, np)
        return np.tile(i, self.kernel.group), indices(columns, self.shape, self.shape.memory, np)

    def keys(self, *arrays: Any) -> list[Any]:
        """In whole tiles."""
        cut = self.shape.tiles
        return [halved(x, 1, self.shape, cut.across, cut.columns) for x in arrays]

    def queries(self, *arrays: Any) -> list[Any]:
        cut = self.shape.tiles
        return [halved(x, 2, self.shape, cut.down, cut.rows) for x in arrays]

    def held(self, q: Any) -> int:
        return held_at_once(q[: q.shape[0] // len(self.ways)], self.shape.tiles)


def forward(
    kernel: Kernel, shape: Circle, ring: Ring, q: Any, k: Any, v: Any, dtype: Any
) -> tuple[Any, Any]:
    """out[n, group, seq, d], in ``dtype``, and lse[n, group, seq]."""
    xp, at = kernel.xp, q.ndim - 2
    q, k, v = (to_zigzag(x, shape, ring, x.ndim - 2, xp) for x in (q, k, v))
    run = Round(kernel, shape, ring, shape.ways(k.shape[-3]), at - 2)
    if xp.__name__ == "numpy":
        out, lse = one_way(run, whole_forward, q, k, v)
    else:
        out, lse = tiled_forward(run, q, k, v)
    out, lse = (from_zigzag(x, shape, ring, at, xp) for x in (out.astype(dtype), lse))
    return out, lse


def one_way(run: Round, f: Callable[..., Sequence[Any]], *arrays: Any) -> list[Any]:
    """``f`` of the parts of arrays that go each way, put together, under NumPy."""
    parts = zip(run.ways, *(np.split(x, len(run.ways), run.lead) for x in arrays), strict=True)
    made = [f(replace(run, ways=(way,)), *some) for way, *some in parts]
    return [np.concatenate(x, run.lead) for x in zip(*made, strict=True)]


def whole_forward(run: Round, q: Any, k: Any, v: Any) -> Any:
    """Under NumPy, every turn's scores at once, one way."""
    kernel, at = run.kernel, q.ndim - 2
    flat = merged(q, at - 1)

    def take(state: Any, here: Any, step: Any) -> Any:
        keys, values = here
        return kernel.step(state, flat, keys, values, *run.whole(step))

    nothing: Any = (0.0, 0.0, kernel.dtype.type(LOWEST))
    made = kernel.finish(circulate(run.shape, run.on, np, nothing, (k, v), take))
    return [x.reshape((*x.shape[: at - 1], *q.shape[at - 1 : at + 1], *x.shape[at:])) for x in made]


def tiled_forward(run: Round, q: Any, k: Any, v: Any) -> Sequence[Any]:
    """Under JAX, tile by tile."""
    kernel, shape, xp = run.kernel, run.shape, run.kernel.xp
    (q,) = run.queries(q)
    nothing = (
        xp.zeros(q.shape, kernel.dtype),
        xp.zeros(q.shape[:-1], kernel.dtype),
        xp.full(q.shape[:-1], LOWEST, kernel.dtype),
    )

    def take(state: Any, here: Any, step: Any) -> Any:
        return run.tiles(forward_tiles, step, run.held(q), *state, q, *run.keys(*here))

    made = kernel.finish(circulate(shape, run.on, xp, nothing, (k, v), take))
    return [unhalved(x, 2, shape, shape.seq) for x in made]


def backward(
    kernel: Kernel,
    shape: Circle,
    ring: Ring,
    operands: Sequence[Any],
    stats: Sequence[Any],
    dtype: Any,
    rows: bool,
) -> tuple[Any, Any, Any]:
    """dq, dk and dv, in ``dtype``, of the ``operands`` q, k, v and dout, and the ``stats`` lse and
    delta; ``rows``: the queries go round, in place of the keys."""
    xp = kernel.xp
    q, k, v, dout = (to_zigzag(x, shape, ring, x.ndim - 2, xp) for x in kernel.anew(*operands))
    lead = q.ndim - 4
    both = xp.stack(xp.broadcast_arrays(*stats), lead + 1)
    both = to_zigzag(both, shape, ring, both.ndim - 1, xp)
    run = Round(kernel, shape, ring, shape.ways(k.shape[-3]), lead, rows)
    if xp.__name__ == "numpy":
        sums = one_way(run, whole_backward, q, k, v, dout, both)
    else:
        sums = in_turns(run, partial(tiled_gradient, run), q, k, v, dout, both)
    gone = SUMS[rows]
    found = dict(zip(("dq", "dk", "dv"), (x.astype(dtype) for x in sums), strict=True))
    dq, dk, dv = (
        run.back(x) if name in gone else from_zigzag(x, shape, ring, x.ndim - 2, xp)
        for name, x in found.items()
    )
    return dq, dk, dv


Sums = dict[str, Any]  # dq, dk and dv, or some of them


def in_turns(run: Round, gradient: Callable[..., Sums], *operands: Any) -> tuple[Any, Any, Any]:
    """dq, dk and dv of q, k, v, dout and their stats, where each lies at the end.
    ``gradient(step, sums, *operands)``: the sums with the terms of one turn, of those that are not
    given the terms alone; what comes behind the operands that go round is sent on when that of the
    last turn was there, while this one is computed."""
    given = dict(zip(("q", "k", "v", "dout", "stats"), operands, strict=True))
    goes, behind = ROUND[run.rows], SUMS[run.rows]

    def take(state: Any, here: Any, step: Any) -> Any:
        kept, sums = state
        made = gradient(step, kept, **given | dict(zip(goes, here, strict=True)))
        terms = tuple(made.pop(name) for name in behind)
        if sums is not None:
            terms = tuple(run.on(x) + term for x, term in zip(sums, terms, strict=True))
        return made, terms

    here = tuple(given[name] for name in goes)
    kept, sums = circulate(run.shape, run.on, run.kernel.xp, ({}, None), here, take)
    made = kept | dict(zip(behind, sums, strict=True))
    return made["dq"], made["dk"], made["dv"]


def whole_backward(run: Round, *operands: Any) -> Sequence[Any]:
    """Under NumPy, every turn's scores at once, one way."""
    kernel = run.kernel

    def gradient(step: Any, sums: Sums, q: Any, k: Any, v: Any, dout: Any, stats: Any) -> Sums:
        group = run.lead + 1
        of_rows = (q, dout, *(stats.take(i, group) for i in range(2)))
        rows, dout, lse, delta = (merged(x, group) for x in of_rows)
        dq, *others = kernel.gradient(rows, k, v, dout, lse, delta, *run.whole(step))
        dq = dq.reshape((*dq.shape[:group], *q.shape[group:]))
        terms = zip(("dq", "dk", "dv"), (dq, *others), strict=True)
        return {name: sums.get(name, 0.0) + term for name, term in terms}

    return in_turns(run, gradient, *operands)


def tiled_gradient(
    run: Round, step: Any, sums: Sums, q: Any, k: Any, v: Any, dout: Any, stats: Any
) -> Sums:
    """Under JAX, tile by tile."""
    shape, zeros = run.shape, partial(run.kernel.xp.zeros, dtype=run.kernel.dtype)
    rows = (sums.get("dq", zeros(q.shape)), q, dout, stats[:, 0], stats[:, 1])
    columns = (sums.get("dk", zeros(k.shape)), sums.get("dv", zeros(v.shape)), k, v)
    dq, q, dout, lse, delta = run.queries(*rows)
    dk, dv, k, v = run.keys(*columns)
    of_tiles = (dq, dk, dv, q, k, v, dout, lse, delta)
    dq, dk, dv = run.tiles(backward_tiles, step, run.held(q), *of_tiles)
    dk, dv = (unhalved(x, 1, shape, shape.memory) for x in (dk, dv))
    return {"dq": unhalved(dq, 2, shape, shape.seq), "dk": dk, "dv": dv}


@dataclass(frozen=True)
class Sent:
    """A permute of one run: what it moves, (source, target) places, bytes that a device sends, and
    how often. ``beside``: what is sent at once the other way round; ``turns``: those behind whose
    products it runs; none where it is waited for."""

    what: str
    pairs: Pairs
    bytes: int
    times: int
    beside: Pairs = ()
    turns: range = range(0)


def sent(shape: Circle, grad: bool, count: int, bytes: Mapping[str, int]) -> list[Sent]:
    """All that one run of attention, or of its gradient, sends. ``count``: of what attends by
    itself. ``bytes``: on a device, of its operands and results by name, and of the gradient's sums,
    ``dq+``, ``dk+`` and ``dv+``."""
    found: list[Sent] = []
    last, ways = shape.behind, shape.ways(count)
    rows = grad and rows_go_round(bytes)

    def add(
        name: str, pairs: Callable[[int], Pairs], size: int, turns: range | None = None
    ) -> None:
        """What goes one way, or each half its own."""
        times = 1 if turns is None else len(turns)
        for way in (-w if rows else w for w in ways):
            some, other = pairs(way), pairs(-way) if len(ways) > 1 else ()
            if size and times and any(s != t for s, t in some):
                part = size // len(ways)
                found.append(Sent(name, some, part, times, other, turns or range(0)))

    def swap(*names: str) -> None:
        for name in names if shape.swaps else ():
            found.extend([Sent(name, shape.mirror(), bytes[name] // 2, 1)] if bytes[name] else [])

    swap("q", "k", "v", *(("dout", "stats") if grad else ()))
    for name in ROUND[rows]:
        add(name, shape.moves, bytes[name], range(last))
    for name in SUMS[rows] if grad else ():
        add(f"{name}+", shape.moves, bytes[f"{name}+"], range(1, last + 1))
    swap(*(SUMS[not rows] if grad else ("out", "lse")))
    for name in SUMS[rows] if grad else ():
        add(name, lambda way: shape.home(way * last), bytes[name] // (2 if shape.swaps else 1))
        if shape.swaps:
            add(name, lambda way: shape.mirror(way * last), bytes[name] // 2)
    return found
