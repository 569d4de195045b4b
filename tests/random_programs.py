"""Random valid IR programs, inputs and meshes: the strategies that property tests share.

Programs stay well conditioned: values are kept below ``LIMIT``, and nothing discontinuous (a
comparison, a rounding cast) is applied to a value that depends on the order of a reduction. So
two ways of running one program may be compared with ``assert_close`` at 1e-12.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Block, Graph, Tensor, close_repeat
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import DTYPES, Dim, TensorType, union_dims

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
LIMIT = 32.0  # on the magnitude of values
ELEMENTS = 2048  # on the size of values
WORK = 32768  # on the size of an einsum's iteration space


@dataclass(frozen=True)
class Item:
    """A tensor to build on, a bound on its magnitude, and whether every way of running the
    program gives it the very same bits."""

    tensor: Tensor
    bound: float = LIMIT
    exact: bool = False

    @property
    def type(self) -> TensorType:
        return self.tensor.type

    def has(self, dim: Dim) -> bool:
        return self.type.has(dim.name)


@st.composite
def programs(
    draw: Callable[..., Any],
    *,
    dtype: str = "f64",
    min_ops: int = 2,
    max_ops: int = 12,
    sizes: Sequence[int] = SIZES,
    zero: bool = False,
    differentiable: bool = False,
    repeats: bool = True,
    families: Sequence[str] = (),
) -> Program:
    """Valid programs with ops of every family, intermediates among their outputs.

    dtype: of float inputs. sizes: of dims. zero: some dims may have size 0. differentiable: smooth
    ops only and one output, the scalar ``loss``. families: those to draw from (default: all).
    """
    return Maker(draw, dtype, tuple(sizes), zero, differentiable, repeats, families).program(
        min_ops, max_ops
    )


class Maker:
    """State of one draw: the dims, the block that ops go to, and the values made so far."""

    def __init__(
        self,
        draw: Callable[..., Any],
        dtype: str,
        sizes: tuple[int, ...],
        zero: bool,
        smooth: bool,
        repeats: bool,
        families: Sequence[str],
    ):
        self.draw = draw
        self.dtype = dtype
        self.smooth = smooth
        self.graph = Graph("random_program")
        self.block: Block = self.graph
        self.pool: list[Item] = []
        sizes = (*sizes, 0) if zero else sizes
        count = draw(st.integers(2, 4))
        self.dims = [Dim("abcd"[i], draw(st.sampled_from(sizes))) for i in range(count)]
        self.seed: Tensor | None = None
        self.numbers = itertools.count()
        known = [f for f in FAMILIES if repeats or f != "repeat"]
        self.families = [f for f in known if not families or f in families]

    # Draws

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def item(self, accept: Callable[[Item], bool] = lambda i: True) -> Item | None:
        """One of the latest values that fit, or None."""
        fits = [i for i in self.pool if accept(i)]
        return self.pick(fits[::-1][:6]) if fits else None

    def real(self, accept: Callable[[Item], bool] = lambda i: True) -> Item:
        """One of the latest float values that fit; a new input if there is none."""
        found = self.item(lambda i: i.type.dtype == self.dtype and accept(i))
        return found or self.input(self.subset(self.dims))

    def subset(self, options: Sequence[Dim], least: int = 0) -> list[Dim]:
        """Dims in random order, of a size that stays small."""
        options = list(options)
        if not options:
            return []
        count = self.draw(st.integers(min(least, len(options)), min(3, len(options))))
        order = self.draw(st.permutations(options))
        return fitting(order[:count])

    def new_dim(self, size: int) -> Dim:
        dim = Dim(f"n{next(self.numbers)}", size)
        self.dims.append(dim)
        return dim

    def input(self, dims: Sequence[Dim], dtype: str | None = None) -> Item:
        dtype = dtype or self.dtype
        number = len(self.graph.inputs)
        if dtype == "i32":
            return self.add(self.graph.data(f"ids{number}", dims), LIMIT, True)
        make = (
            self.graph.parameter
            if self.smooth
            else self.pick((self.graph.parameter, self.graph.state, self.graph.data))
        )
        return self.add(make(f"p{number}", dims, dtype), 6.0, True)

    def add(self, tensor: Tensor, bound: float, exact: bool = False) -> Item:
        """Puts a value in the pool, scaled down if it may be large."""
        if bound > LIMIT and tensor.type.is_float:
            tensor, bound, exact = tensor * (4.0 / bound), 4.0, False
        made = Item(tensor, bound, exact or not tensor.type.is_float)
        self.pool.append(made)
        return made

    # Programs

    def program(self, min_ops: int, max_ops: int) -> Program:
        for i in range(self.draw(st.integers(1, 3))):
            self.input(self.subset(self.dims, least=int(i == 0)))
        self.ops(self.draw(st.integers(min_ops, max_ops)))
        return self.graph.build(self.loss() if self.smooth else self.outputs())

    def ops(self, count: int) -> None:
        for _ in range(count):
            family = self.pick(self.families)
            if not FAMILIES[family](self):
                unary(self)

    def outputs(self) -> dict[str, Tensor]:
        last = [i.tensor for i in self.pool if i.tensor.block is self.graph]
        found = {"out0": last[-1]}
        for i in range(self.draw(st.integers(0, 3))):
            found[f"out{i + 1}"] = self.pick(last)
        for info, value in list(zip(self.graph.inputs, self.graph.args, strict=True)):
            if value.type.dtype != self.dtype or not self.draw(st.booleans()):
                continue
            names = set(value.type.names)
            step = self.real(lambda i, names=names: set(i.type.names) <= names)
            if set(step.type.names) <= names:
                found[info.name] = Tensor(self.graph, value) - step.tensor * 0.125
        return found

    def loss(self) -> dict[str, Tensor]:
        first = next(Tensor(self.graph, v) for v in self.graph.args if v.type.dtype == self.dtype)
        loss = mean(b.sin(first))
        for _ in range(self.draw(st.integers(1, 3))):
            term = self.real(lambda i: i.tensor.block is self.graph).tensor
            loss = loss + mean(b.tanh(term) * self.pick((1.0, -0.5, 2.0)))
        return {"loss": loss}


def fitting(dims: Sequence[Dim]) -> list[Dim]:
    kept: list[Dim] = []
    for d in dims:
        if math.prod(k.size for k in kept) * d.size <= ELEMENTS:
            kept.append(d)
    return kept


def mean(x: Tensor) -> Tensor:
    return x.sum(*x.dims) * (1.0 / max(1, x.type.size))


def small(*items: Item, limit: int = ELEMENTS) -> bool:
    """Whether values broadcast against each other stay small."""
    return math.prod(d.size for d in union_dims([i.type for i in items])) <= limit


# Families. Each adds one value or more to the pool, or returns None where it does not apply.


def unary(m: Maker) -> Item:
    x = m.real()
    t = x.tensor
    grown = 1 + x.bound * x.bound
    options: dict[str, Callable[[], Item]] = {
        "tanh": lambda: m.add(b.tanh(t), 1),
        "erf": lambda: m.add(b.erf(t), 1),
        "sin": lambda: m.add(b.sin(t), 1),
        "cos": lambda: m.add(b.cos(t), 1),
        "neg": lambda: m.add(-t, x.bound, x.exact),
        "exp": lambda: m.add(b.exp(b.tanh(t)), math.e),
        "log": lambda: m.add(b.log(1 + t * t), math.log(grown)),
        "sqrt": lambda: m.add(b.sqrt(t * t + 1.0), math.sqrt(grown)),
        "rsqrt": lambda: m.add(b.rsqrt(1 + t * t), 1),
        "scale": lambda: m.add(t * -0.75 + 0.5, x.bound + 1),
    }
    if not m.smooth:
        options["abs"] = lambda: m.add(b.absolute(t), x.bound, x.exact)
        options["detach"] = lambda: m.add(b.detach(t), x.bound, x.exact)
    return options[m.pick(options)]()


def binary(m: Maker) -> Item | None:
    x = m.real()
    y = m.real(lambda i: small(i, x))
    if not small(x, y):
        return None
    s, t = x.tensor, y.tensor
    options: dict[str, Callable[[], Item]] = {
        "add": lambda: m.add(s + t, x.bound + y.bound),
        "sub": lambda: m.add(s - t, x.bound + y.bound),
        "mul": lambda: m.add(s * t, x.bound * y.bound),
        "div": lambda: m.add(s / (1 + t * t), x.bound),
        "pow": lambda: m.add((1 + s * s) ** b.tanh(t), 1 + x.bound * x.bound),
    }
    if not m.smooth:
        bound = max(x.bound, y.bound)
        options["maximum"] = lambda: m.add(b.maximum(s, t), bound, x.exact and y.exact)
        options["minimum"] = lambda: m.add(b.minimum(s, t), bound, x.exact and y.exact)
    return options[m.pick(options)]()


def integer(m: Maker) -> Item | None:
    """Arithmetic on integers, which is exact."""
    x = m.item(lambda i: i.type.dtype == "i32") or m.input(m.subset(m.dims), "i32")
    y = m.item(lambda i: i.type.dtype == "i32" and small(i, x)) or x
    kind = m.pick(("add", "mul", "maximum", "sub"))
    made = {
        "add": lambda: x.tensor + y.tensor,
        "mul": lambda: x.tensor * 3,
        "maximum": lambda: b.maximum(x.tensor, y.tensor),
        "sub": lambda: 5 - y.tensor,
    }[kind]()
    return m.add(made, LIMIT, True)


def condition(m: Maker) -> Tensor | None:
    """A bool tensor made of exact values."""
    kind = m.pick(("iota", "exact", "exact"))
    if kind == "iota" and len(m.dims) > 1:
        d, e = m.draw(st.permutations(m.dims))[:2]
        like = m.pool[-1].tensor
        if d.size * e.size > ELEMENTS:
            return None
        made = b.iota(like, d) <= b.iota(like, e)
        return ~made if m.draw(st.booleans()) else made
    x = m.item(lambda i: i.exact and i.type.dtype != "bool")
    if x is None:
        return None
    y = m.item(lambda i: i.exact and i.type.dtype == x.type.dtype and small(i, x)) or x
    compare = m.pick(("lt", "le", "eq", "gt_number"))
    if compare == "gt_number":
        return x.tensor > 0
    made = b.emit(compare, x.tensor, y.tensor)
    if m.draw(st.booleans()):
        zero = x.tensor < 0
        made = m.pick((made & zero, made | zero))
    return made


def select(m: Maker) -> Item | None:
    c = condition(m)
    if c is None:
        return None
    mask = Item(c)
    x = m.real(lambda i: small(i, mask))
    y = m.real(lambda i: small(i, x, mask))
    if not small(x, y, mask):
        return None
    if m.draw(st.booleans()):
        return m.add(b.select(c, x.tensor, 0.25), max(x.bound, 1), x.exact)
    return m.add(b.select(c, x.tensor, y.tensor), max(x.bound, y.bound), x.exact and y.exact)


def einsum(m: Maker) -> Item | None:
    dtype = m.dtype if m.smooth else m.pick((m.dtype, m.dtype, m.dtype, "i32"))
    x = m.real() if dtype == m.dtype else m.item(lambda i: i.type.dtype == "i32")
    if x is None:
        return None
    y = m.item(lambda i: i.type.dtype == dtype and small(i, x, limit=WORK))
    if y is None:
        return None
    both = union_dims((x.type, y.type))
    out = m.subset(both)
    gone = math.prod(d.size for d in both if d not in out)
    made = b.einsum(x.tensor, y.tensor, [d.name for d in out])
    return m.add(made, x.bound * y.bound * gone)


def reduce(m: Maker) -> Item | None:
    dtype = m.dtype if m.smooth else m.pick((m.dtype, m.dtype, "i32"))
    op = m.pick(("sum", "max", "min") if not m.smooth else ("sum",))
    x = m.item(lambda i: i.type.dtype == dtype and len(i.type.dims) > 0)
    if x is None:
        return None
    dims = m.subset(x.type.dims, least=1)
    if op != "sum" and any(d.size == 0 for d in dims):
        return None
    gone = math.prod(d.size for d in dims)
    made = x.tensor.reduce(op, *dims)
    return m.add(made, x.bound * gone if op == "sum" else x.bound, x.exact and op != "sum")


def broadcast(m: Maker) -> Item | None:
    x = m.real()
    extra = m.subset([d for d in m.dims if not x.has(d)])
    dims = fitting((*x.type.dims, *extra))
    if tuple(dims[: len(x.type.dims)]) != x.type.dims:
        return None
    return m.add(x.tensor.broadcast(*m.draw(st.permutations(dims))), x.bound, x.exact)


def rename(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0)
    if x is None:
        return None
    old = m.pick(x.type.dims)
    names = [d.name for d in m.dims if d.size == old.size and not x.has(d)]
    to = m.pick([*names, None])
    to = to or m.new_dim(old.size).name
    return m.add(x.tensor.rename(**{old.name: to}), x.bound, x.exact)


def split(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0)
    if x is None:
        return None
    d = m.pick(x.type.dims)
    factors = [f for f in range(1, d.size + 1) if d.size % f == 0] or [2]
    major = m.pick(factors)
    into = (m.new_dim(major), m.new_dim(d.size // major))
    return m.add(x.tensor.split(d.name, *into), x.bound, x.exact)


def merge(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 1)
    if x is None:
        return None
    major, minor = m.draw(st.permutations(x.type.dims))[:2]
    to = m.new_dim(major.size * minor.size)
    return m.add(x.tensor.merge(major.name, minor.name, to.name), x.bound, x.exact)


def slice(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0)
    if x is None:
        return None
    d = m.pick(x.type.dims)
    size = m.draw(st.integers(min(1, d.size), d.size))
    start = m.draw(st.integers(0, d.size - size))
    return m.add(x.tensor.slice(d.name, start, m.new_dim(size)), x.bound, x.exact)


def concat(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0 and i.type.size <= ELEMENTS // 3)
    if x is None:
        return None
    d = m.pick(x.type.dims)
    rest = set(x.type.without([d.name]).dims)
    options = [
        (i, e)
        for i in m.pool
        if i.type.dtype == x.type.dtype and i.type.size <= ELEMENTS // 3
        for e in i.type.dims
        if set(i.type.without([e.name]).dims) == rest
    ]
    parts = [(x, d)]
    for _ in range(m.draw(st.integers(1, 2))):
        parts.insert(m.draw(st.integers(0, 1)), m.pick(options[::-1][:6]))
    to = m.new_dim(sum(e.size for _, e in parts))
    made = b.concat([i.tensor for i, _ in parts], [e.name for _, e in parts], to)
    return m.add(made, max(i.bound for i, _ in parts), all(i.exact for i, _ in parts))


def pad(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0 and i.type.dtype in ("i32", m.dtype))
    if x is None:
        return None
    d = m.pick(x.type.dims)
    before, after = m.draw(st.integers(0, 2)), m.draw(st.integers(0, 2))
    to = m.new_dim(before + d.size + after)
    value = m.pick((0, 0, 2))
    return m.add(x.tensor.pad(d.name, before, to, value), max(x.bound, 2), x.exact)


def shift(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0 and i.type.dtype in ("i32", m.dtype))
    if x is None:
        return None
    d = m.pick(x.type.dims)
    by = m.draw(st.integers(-min(3, d.size) - 1, min(3, d.size) + 1))
    return m.add(x.tensor.shift(d.name, by), x.bound, x.exact)


def iota(m: Maker) -> Item | None:
    if not m.dims:  # loops around have taken them all
        return None
    dtype = m.pick(("i32", m.dtype))
    d = m.pick(m.dims)
    return m.add(b.iota(m.pool[-1].tensor, d, dtype), float(d.size), True)


def ids(m: Maker, dims: Sequence[Dim]) -> Item:
    """Integers over dims among ``dims``: a value that exists or a new input."""
    found = m.item(lambda i: i.type.dtype == "i32" and set(i.type.dims) <= set(dims))
    return found or m.input(m.subset(dims), "i32")


def reorder(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0 and i.type.dtype in ("i32", m.dtype))
    if x is None:
        return None
    d = m.pick(x.type.dims)
    blocks = m.pick([n for n in range(1, max(1, d.size) + 1) if d.size % n == 0])
    order = m.draw(st.permutations(range(blocks)))
    return m.add(x.tensor.reorder(d.name, order), x.bound, x.exact)


def gather(m: Maker) -> Item | None:
    table = m.real(lambda i: len(i.type.dims) > 0)
    if not table.type.dims:
        return None
    d = m.pick(table.type.dims)
    found = ids(m, [e for e in m.dims if not table.has(e)])
    made = table.type.size // max(1, d.size) * found.type.size
    if made > ELEMENTS:
        return None
    return m.add(b.gather(table.tensor, found.tensor, d.name), table.bound, table.exact)


def scatter_add(m: Maker) -> Item | None:
    updates = m.real(lambda i: len(i.type.dims) > 0)
    found = ids(m, updates.type.dims)
    if not set(found.type.dims) <= set(updates.type.dims):
        return None
    options = [d for d in m.dims if not updates.has(d)]
    if not options:
        return None
    d = m.pick(options)
    if updates.type.size * d.size > ELEMENTS:
        return None
    made = b.scatter_add(updates.tensor, found.tensor, d)
    return m.add(made, updates.bound * max(1, found.type.size))


def update(m: Maker) -> Item | None:
    if m.smooth:
        return None
    x = m.real(lambda i: len(i.type.dims) > 0)
    if not x.type.dims:
        return None
    d = m.pick(x.type.dims)
    at = m.item(lambda i: i.type.dtype == "i32" and not i.type.dims) or m.input((), "i32")
    rest = [e for e in x.type.dims if e != d]
    new = m.item(lambda i: i.type.dtype == x.type.dtype and set(i.type.dims) == set(rest))
    new = new or m.input(rest, x.type.dtype)
    made = b.update(x.tensor, new.tensor, at.tensor, d)
    return m.add(made, max(x.bound, new.bound), x.exact and new.exact)


def cumsum(m: Maker) -> Item | None:
    x = m.item(lambda i: len(i.type.dims) > 0 and i.type.dtype in ("i32", m.dtype))
    if x is None or (m.smooth and x.type.dtype == "i32"):
        return None
    d = m.pick(x.type.dims)
    return m.add(x.tensor.cumsum(d.name, m.draw(st.booleans())), x.bound * max(1, d.size))


def random(m: Maker) -> Item | None:
    if m.dtype not in ("f32", "f64"):
        return None
    if m.seed is None:
        m.seed = m.graph.data("seed", (), "u32")
    salt = m.draw(st.integers(0, 2**32 - 1))
    distribution = m.pick(("uniform", "normal"))
    made = b.random(m.seed, m.subset(m.dims), salt, distribution, m.dtype)
    return m.add(made, 8.0, distribution == "uniform")


def cast(m: Maker) -> Item | None:
    x = m.item(lambda i: i.exact)
    if x is None:
        return None
    if x.type.dtype == m.dtype and x.bound <= LIMIT:
        if m.smooth:
            return None
        through = m.pick(("f32", "bf16", "i32"))
        made = m.add(x.tensor.cast(through), x.bound, True)
        return made if through == "i32" else m.add(made.tensor.cast(m.dtype), x.bound, True)
    # Integers are reduced by a comparison first: sums of them have no bound.
    return m.add((x.tensor.cast("i32") < 3).cast(m.dtype), 1.0, True)


def attention(m: Maker) -> Item | None:
    """Fused attention of a float value: any two of its dims are queries and head_dim, any of the
    others are shared with the keys. Or its gradient, on any operands that fit."""
    q = m.real(lambda i: len(i.type.dims) > 1)
    if len(q.type.dims) < 2:
        return None
    seq, head_dim, *rest = m.draw(st.permutations(q.type.dims))
    free = [d for d in m.dims if not q.has(d)]
    memory = m.pick([*free, None]) or m.new_dim(m.draw(st.integers(1, 5)))
    dims = [memory, head_dim, *rest[: m.draw(st.integers(0, len(rest)))]]
    if math.prod(d.size for d in {*q.type.dims, *dims}) > WORK or len(fitting(dims)) < len(dims):
        return None

    def keys() -> Item:
        same = m.item(lambda i: i.type.dtype == m.dtype and set(i.type.dims) == set(dims))
        return same or m.input(m.draw(st.permutations(dims)))

    k, v = keys(), keys()
    causal, window = m.draw(st.booleans()), m.pick((None, 1, 2, 5))
    scale = 4.0 / ((q.bound * k.bound or 1.0) * max(1, head_dim.size))
    out, lse = b.fused_attention(
        q.tensor, k.tensor, v.tensor, seq, memory, head_dim, causal, window, scale
    )
    if not m.smooth and m.draw(st.booleans()):
        dout = m.real(lambda i: set(i.type.dims) == set(q.type.dims))
        if set(dout.type.dims) != set(q.type.dims):
            dout = q
        operands = [i.tensor for i in (q, k, v)] + [out, lse, dout.tensor]
        attrs = out.block.ops[-1].attrs
        grads = b.innermost(operands).emit_all("attention_grad", operands, **attrs)
        spread = 2 * head_dim.size * dout.bound * v.bound * scale
        queries = math.prod(d.size for d in q.type.dims if d != head_dim)
        bounds = (spread * k.bound, spread * q.bound * queries, dout.bound * queries)
        for grad, bound in zip(grads, bounds, strict=True):
            m.add(grad, bound)
    each_sees_one = memory.size > 0 and (window is None or memory.size + window > seq.size)
    if each_sees_one and not m.smooth:
        m.add(lse, 4.0 + math.log(memory.size))
    return m.add(out, v.bound)


def repeat(m: Maker) -> Item | None:
    """A repeat with carried, stacked and captured values, and with stacked results."""
    if m.block.depth > 1:
        return None
    dim = m.pick([d for d in m.dims if d.size <= 4] or [m.new_dim(2)])
    outer, pool = m.block, m.pool
    reals = [i for i in pool if i.type.dtype == m.dtype]
    free = [i for i in reals if not i.has(dim)]
    carried = [m.pick(free[::-1][:4]) for _ in range(m.draw(st.integers(0, 2)))] if free else []
    stacked = [i for i in pool if i.has(dim) and i.type.dtype != "bool"][::-1]
    stacked = stacked[: m.draw(st.integers(0, 2))]
    if not carried and not stacked:
        stacked = [m.input([dim, *fitting(m.subset([d for d in m.dims if d != dim]))[:1]])]
    inner = Block(outer)
    args = [Item(inner.add_arg(i.type), max(i.bound, 2.0)) for i in carried]
    for i in stacked:
        t = inner.add_arg(i.type.without([dim.name]))
        args.append(replace(i, tensor=t))
    # What depends on an argument goes inside; the rest is captured where it is used.
    m.block, m.pool = inner, [i for i in pool if not i.has(dim)] + args
    dims, m.dims = m.dims, [d for d in m.dims if d != dim]
    m.ops(m.draw(st.integers(1, 3)))
    body = m.pool
    m.block, m.pool = outer, pool
    m.dims = [*dims, *(d for d in m.dims if d not in dims)]
    carries = [next_carry(m, c, args, body) for c in args[: len(carried)]]
    options = [i for i in body if i.tensor.block is inner and i.type.size * dim.size <= ELEMENTS]
    count = m.draw(st.integers(0 if carried else 1, 2))
    stacks = [m.pick(options[::-1][:4]) for _ in range(count if options else 0)]
    outputs = [*carries, *(i.tensor for i in stacks)]
    if not outputs:
        return None
    attrs = {
        "dim": dim,
        "carries": len(carried),
        "stacked": len(stacked),
        "reverse": m.draw(st.booleans()),
        "recompute": m.draw(st.booleans()),
    }
    operands = [i.tensor for i in (*carried, *stacked)]
    results = close_repeat(inner, operands, [inner.use(t) for t in outputs], attrs, None)
    made = [Item(t, c.bound) for t, c in zip(results, args[: len(carried)], strict=False)]
    made += [replace(i, tensor=t) for t, i in zip(results[len(carried) :], stacks, strict=True)]
    m.pool.extend(made)
    return made[-1]


def next_carry(m: Maker, carry: Item, args: Sequence[Item], body: Sequence[Item]) -> Tensor:
    """What takes the place of a carried value: itself, another one, or something new."""
    names = set(carry.type.names)
    fits = [i for i in body if i.type.dtype == m.dtype and set(i.type.names) <= names]
    same = [a for a in args if a.type == carry.type and a.bound <= carry.bound]
    kind = m.pick(("new", "new", "same"))
    if kind == "same":
        return m.pick(same).tensor
    return carry.tensor * 0.5 + b.tanh(m.pick(fits[::-1][:4]).tensor)


FAMILIES: dict[str, Callable[[Maker], Item | None]] = {
    "unary": unary,
    "binary": binary,
    "integer": integer,
    "select": select,
    "einsum": einsum,
    "reduce": reduce,
    "broadcast": broadcast,
    "rename": rename,
    "split": split,
    "merge": merge,
    "slice": slice,
    "concat": concat,
    "pad": pad,
    "shift": shift,
    "reorder": reorder,
    "iota": iota,
    "gather": gather,
    "scatter_add": scatter_add,
    "update": update,
    "cumsum": cumsum,
    "random": random,
    "cast": cast,
    "attention": attention,
    "repeat": repeat,
}


@st.composite
def meshes(draw: Callable[..., Any], max_axes: int = 3, big: bool = True) -> Mesh:
    """Meshes of 1 to ``max_axes`` axes of sizes 1 to 4; sometimes 8x16 (not ``big``: never)."""
    if big and max_axes > 1 and draw(st.integers(0, 7)) == 7:
        return Mesh.parse("8x16")
    sizes = draw(st.lists(st.sampled_from((2, 1, 3, 4)), min_size=1, max_size=max_axes))
    return Mesh(tuple(zip("xyz", sizes, strict=False)))


def inputs_for(program: Program, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays for a program's inputs: floats of mixed sign; integers in the range of some dim of
    the program, or one beyond it at either end."""
    sizes = sorted({d.size for d in program.dims.values()}) or [4]
    made: dict[str, np.ndarray] = {}
    for info, value in program.named_inputs:
        t = value.type
        if t.is_float:
            array = np.clip(rng.standard_normal(t.shape), -5, 5)
        elif t.dtype == "bool":
            array = rng.integers(0, 2, t.shape)
        elif t.dtype == "u32":
            array = rng.integers(0, 2**32, t.shape)
        else:
            array = rng.integers(-1, rng.choice(sizes, t.shape) + 1)
        made[info.name] = np.asarray(array).astype(DTYPES[t.dtype])
    return made


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal up to ``tolerance`` times the largest magnitude (at least 1); NaN equals NaN.
    Integers and booleans are equal exactly."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if expected.dtype.kind in "iub":
        np.testing.assert_array_equal(actual, expected)
        return
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(1.0, float(finite.max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)
