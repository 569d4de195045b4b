"""Keys and values of the positions before, which a model keeps while it is sampled.

A cache has a row per slot. Prompts of unequal length are padded on the right to the same number of
slots, and what is generated goes to the slots behind, the same one for every sequence: slot s holds
position s of a prompt, and position length + s - filled after it, where the first ``filled`` slots
are the prompts'. A slot between a prompt's end and ``filled`` holds nothing that is ever seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neocc.ir.builder import Graph, Tensor, einsum, exp, gather, iota, random, select, update
from neocc.ir.types import Dim
from neocc.nn.attention import LINEAR_EPSILON
from neocc.nn.experts import Draw
from neocc.nn.norms import joint_softmax, softmax


@dataclass(frozen=True)
class Place:
    """Where a decode step stands: ``lengths[batch]`` of the prompts, the slots that they
    ``filled``, and the slot ``at`` of the token that it is given; all i32."""

    lengths: Tensor
    filled: Tensor
    at: Tensor

    @property
    def positions(self) -> Tensor:
        """Of the token that each sequence is given: [batch]."""
        return self.lengths + (self.at - self.filled)

    def rows(self, table: Tensor) -> Tensor:
        """Those of table[place, ...] that the tokens have: [batch, ...]."""
        return gather(table, self.positions, table.dims[0])

    def seen(self, slots: Dim, window: int | None) -> Tensor:
        """Which slots the token sees, bool[batch, slots]: those before its own that hold a
        position, and only the ``window`` - 1 nearest if there is one."""
        slot = iota(self.lengths, slots)
        prompt = slot < self.lengths
        if window is None:
            return prompt | ((self.filled <= slot) & (slot < self.at))
        near = prompt & (self.positions < slot + window)
        later = (self.filled <= slot) & (slot < self.at) & (self.at < slot + window)
        return near | later


@dataclass(frozen=True)
class Cached:
    """What one layer's attention puts into the cache, and in a decode step what is there.

    lengths[batch]: of the prompts. made: filled by the layer: k and v[batch, memory, heads,
    head_dim] of the positions it is given. past: those of the positions before, [batch, slot,
    heads, head_dim], with ``place``. Linear attention has a state instead (``linear_state``).
    """

    lengths: Tensor
    made: dict[str, Tensor] = field(default_factory=dict)
    past: dict[str, Tensor] = field(default_factory=dict)
    place: Place | None = None


# Each query is asked so many times over. A TPU's compiler makes a product with one row a sum on the
# vector unit, six times slower than eight rows on the matrix unit (libtpu 0.0.42, by its cycles).
ROWS = Dim("rows", 8)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: Cached,
    window: int | None,
    scale: float,
    dtype: str,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one position a sequence, q[batch, seq, heads, head_dim] with a seq of 1: over
    what is in the cache, its own k and v[batch, memory, heads, head_dim], and ``more``, keys and
    values [mem, heads, head_dim] that are always seen. Scores and softmax run in ``dtype``."""
    assert cached.place is not None
    past_k, past_v = cached.past["k"], cached.past["v"]
    slots = next(d for d in past_k.dims if not k.type.has(d.name))
    rows = q.broadcast(*q.dims[:2], ROWS, *q.dims[2:])
    scores = einsum(rows, past_k, ("batch", "heads", "seq", "rows", slots.name), dtype=dtype)
    scores = select(cached.place.seen(slots, window), scores * scale, -1e10)
    own = (q.cast(dtype) * k.cast(dtype)).sum("head_dim") * scale
    parts = [(scores, slots.name), (own, "memory")]
    if more is not None:
        parts.append(
            (einsum(rows, more[0], "batch heads seq rows mem", dtype=dtype) * scale, "mem")
        )
    p, one, *rest = (x.cast(q.dtype) for x in joint_softmax(parts))
    mixed = einsum(p, past_v, "batch seq rows heads head_dim")
    if more is not None:
        mixed = mixed + einsum(rest[0], more[1], "batch seq rows heads head_dim")
    mixed = mixed + (one * v).sum("memory")
    return mixed.slice("rows", 0, Dim("row", 1)).sum("row")


def linear_state(k: Tensor, v: Tensor, lengths: Tensor, dtype: str) -> dict[str, Tensor]:
    """What causal linear attention keeps of a prompt (``neocc.nn.attention.linear_attention``): the
    sums over its positions of exp k times v, s[batch, heads, feature, head_dim], and of exp k,
    z[batch, heads, feature]. k and v[batch, memory, heads, head_dim]; in ``dtype``."""
    k = exp(k.cast(dtype).rename(head_dim="feature"))
    k = select(iota(k, k.dim("memory")) < lengths, k, 0.0)
    s = einsum(k.cast(v.dtype), v, "batch heads feature head_dim", dtype=dtype)
    return {"s": s, "z": k.sum("memory")}


def linear_step(
    q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Tensor], dtype: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Linear attention of one position a sequence, q[batch, seq, heads, head_dim] with a seq of 1,
    and the state after it."""
    p = softmax(q.cast(dtype).rename(head_dim="feature"), "feature")
    e = exp(k.cast(dtype).rename(head_dim="feature")).sum("memory")
    z = past["z"] + e
    s = past["s"] + e * v.cast(dtype).sum("memory")
    p = p / ((p * z).sum("feature") + LINEAR_EPSILON)
    mixed = (p * s).sum("feature").broadcast(*q.dims)
    return mixed.cast(q.dtype), {"s": s, "z": z}


def cache_inputs(
    g: Graph, key: str, kind: str, dims: Sequence[Dim], slot: Dim, dtype: str, wide: str
) -> dict[str, Tensor]:
    """What a decode step is given of the layers with one kind of attention, by names that begin
    with ``key``. dims: layers, batch, heads, head_dim; keys and values in ``dtype``, sums in the
    ``wide`` one."""
    layers, batch, heads, head_dim = dims
    if kind == "none":
        return {}
    if kind == "linear":
        z = (layers, batch, heads, Dim("feature", head_dim.size))
        return {
            f"{key}s": g.state(f"{key}s", (*z, head_dim), wide),
            f"{key}z": g.state(f"{key}z", z, wide),
        }
    rows = (layers, batch, slot, heads, head_dim)
    return {key + n: g.state(key + n, rows, dtype) for n in "kv"}


def stored(new: Tensor, old: Tensor | None, place: Place | None, slot: Dim) -> Tensor:
    """The cache with what the layers made: a state, or the rows [..., memory, ...] of a prompt, or
    that of one token, which goes into the slot where it stands."""
    if not new.type.has("memory"):  # a state, or rows that fill the cache
        return new
    if place is None:
        return new.pad("memory", 0, slot)
    assert old is not None
    return update(old, new.sum("memory"), place.at, slot)


def draws_by_position(seed: Tensor, positions: int, seq: Dim, place: Place | None) -> Draw:
    """Numbers that a sequence's position decides, and not which sequence it is, nor whether it is
    given among others, seq of them from the first, or alone, at its ``place``."""

    def draw(dims: Sequence[Dim], salt: int) -> Tensor:
        others = [d for d in dims if d.name not in ("batch", seq.name)]
        table = random(seed, (Dim("drawn", positions), *others), salt)
        return table.slice("drawn", 0, seq) if place is None else place.rows(table)

    return draw
