"""Build programs in Python: tensors with operators, and ``repeat`` over a body function."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from neocc.ir.errors import IRError, Loc
from neocc.ir.ops import OPS, repeat_types
from neocc.ir.program import Input, Op, Program, Region, Value
from neocc.ir.types import Dim, TensorType

Scalar = int | float | bool
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INTERNAL = tuple(
    os.path.join(PACKAGE, part)
    for part in (f"ir{os.sep}", f"passes{os.sep}", f"nn{os.sep}", "optim.py")
)


def caller() -> Loc | None:
    """The innermost frame outside the compiler: the user's line."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(INTERNAL):
        frame = frame.f_back
    if frame is None:
        return None
    path = frame.f_code.co_filename
    relative = os.path.relpath(path)
    return Loc(path if relative.startswith("..") else relative, frame.f_lineno)


class Block:
    """A region under construction. Values of enclosing blocks are captured when first used."""

    def __init__(self, parent: Block | None = None):
        self.parent = parent
        self.args: list[Value] = []
        self.ops: list[Op] = []
        self.captured: dict[Value, Value] = {}
        self.loc: Loc | None = None

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def add_arg(self, type: TensorType, name: str = "") -> Tensor:
        value = Value(type, name)
        self.args.append(value)
        return Tensor(self, value)

    @contextlib.contextmanager
    def at(self, loc: Loc | None) -> Iterator[None]:
        """Ops made inside bear this place in the source instead of the caller's."""
        before, self.loc = self.loc, loc
        try:
            yield
        finally:
            self.loc = before

    def use(self, tensor: Tensor) -> Value:
        """The value by which this block may name ``tensor``, captured if it lies outside."""
        if tensor.block is self:
            return tensor.value
        if self.parent is None:
            raise IRError(f"{tensor.value!r} belongs to another program or to an inner region")
        outer = self.parent.use(tensor)
        if outer not in self.captured:
            self.captured[outer] = Value(outer.type, outer.name)
        return self.captured[outer]

    def emit(self, kind: str, operands: Sequence[Tensor], **attrs: Any) -> Tensor:
        """Appends an op and returns its (only) result: see ``emit_all``."""
        (result,) = self.emit_all(kind, operands, **attrs)
        return result

    def emit_all(self, kind: str, operands: Sequence[Tensor], **attrs: Any) -> list[Tensor]:
        """Appends an op and returns its results.

        Raises:
            IRError: the op's type rule is broken; the error bears the user's line.
        """
        loc = self.loc or caller()
        values = tuple(self.use(t) for t in operands)
        try:
            types = OPS[kind].infer(tuple(v.type for v in values), attrs)
        except IRError as error:
            raise IRError(error.message, loc) from None
        results = [Value(t) for t in types]
        self.ops.append(Op(kind, values, results, attrs, loc=loc))
        return [Tensor(self, v) for v in results]


def innermost(tensors: Sequence[Tensor]) -> Block:
    return max((t.block for t in tensors), key=lambda b: b.depth)


def emit(kind: str, *operands: Tensor, **attrs: Any) -> Tensor:
    """An op in the innermost block that any operand lies in."""
    return innermost(operands).emit(kind, operands, **attrs)


class Tensor:
    """A value with operators. Arithmetic broadcasts by dim name; dtypes must agree, except
    that a Python number takes the tensor's dtype."""

    __slots__ = ("block", "value")

    def __init__(self, block: Block, value: Value):
        self.block = block
        self.value = value

    @property
    def type(self) -> TensorType:
        return self.value.type

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.value.type.dims

    @property
    def dtype(self) -> str:
        return self.value.type.dtype

    def dim(self, name: str) -> Dim:
        return self.type.dim(name)

    def named(self, name: str) -> Tensor:
        """The same tensor under a name that reports and printed programs show."""
        self.value.name = name
        return self

    def _lift(self, other: Tensor | Scalar) -> Tensor:
        if isinstance(other, Tensor):
            return other
        return self.block.emit("constant", (), value=other, dtype=self.dtype)

    def __add__(self, other: Tensor | Scalar) -> Tensor:
        return emit("add", self, self._lift(other))

    def __radd__(self, other: Scalar) -> Tensor:
        return emit("add", self._lift(other), self)

    def __sub__(self, other: Tensor | Scalar) -> Tensor:
        return emit("sub", self, self._lift(other))

    def __rsub__(self, other: Scalar) -> Tensor:
        return emit("sub", self._lift(other), self)

    def __mul__(self, other: Tensor | Scalar) -> Tensor:
        return emit("mul", self, self._lift(other))

    def __rmul__(self, other: Scalar) -> Tensor:
        return emit("mul", self._lift(other), self)

    def __truediv__(self, other: Tensor | Scalar) -> Tensor:
        return emit("div", self, self._lift(other))

    def __rtruediv__(self, other: Scalar) -> Tensor:
        return emit("div", self._lift(other), self)

    def __pow__(self, other: Tensor | Scalar) -> Tensor:
        return emit("pow", self, self._lift(other))

    def __rpow__(self, other: Scalar) -> Tensor:
        return emit("pow", self._lift(other), self)

    def __neg__(self) -> Tensor:
        return emit("neg", self)

    def __lt__(self, other: Tensor | Scalar) -> Tensor:
        return emit("lt", self, self._lift(other))

    def __le__(self, other: Tensor | Scalar) -> Tensor:
        return emit("le", self, self._lift(other))

    def __gt__(self, other: Tensor | Scalar) -> Tensor:
        return emit("lt", self._lift(other), self)

    def __ge__(self, other: Tensor | Scalar) -> Tensor:
        return emit("le", self._lift(other), self)

    def equals(self, other: Tensor | Scalar) -> Tensor:
        return emit("eq", self, self._lift(other))

    def __and__(self, other: Tensor) -> Tensor:
        return emit("and", self, other)

    def __or__(self, other: Tensor) -> Tensor:
        return emit("or", self, other)

    def __invert__(self) -> Tensor:
        return emit("not", self)

    def __bool__(self) -> bool:
        raise IRError("a tensor has no truth value while a program is built; use select", caller())

    def cast(self, dtype: str) -> Tensor:
        return self if dtype == self.dtype else emit("cast", self, dtype=dtype)

    def rename(self, **names: str) -> Tensor:
        """Renames dims: ``x.rename(seq="memory")``."""
        result = self
        for old, new in names.items():
            result = emit("rename", result, dim=old, to=new)
        return result

    def reduce(self, op: str, *dims: str | Dim) -> Tensor:
        names = tuple(d if isinstance(d, str) else d.name for d in dims)
        return emit("reduce", self, op=op, dims=names) if names else self

    def sum(self, *dims: str | Dim) -> Tensor:
        return self.reduce("sum", *dims)

    def max(self, *dims: str | Dim) -> Tensor:
        return self.reduce("max", *dims)

    def mean(self, *dims: str | Dim) -> Tensor:
        count = 1
        for d in dims:
            count *= (self.dim(d) if isinstance(d, str) else d).size
        return self.sum(*dims) * (1.0 / count)

    def broadcast(self, *dims: Dim) -> Tensor:
        return emit("broadcast", self, dims=tuple(dims))

    def split(self, dim: str, major: Dim, minor: Dim) -> Tensor:
        return emit("split", self, dim=dim, into=(major, minor))

    def merge(self, major: str, minor: str, to: str) -> Tensor:
        return emit("merge", self, dims=(major, minor), to=to)

    def slice(self, dim: str, start: int, to: Dim) -> Tensor:
        return emit("slice", self, dim=dim, start=start, to=to)

    def pad(self, dim: str, before: int, to: Dim, value: Scalar = 0) -> Tensor:
        return emit("pad", self, dim=dim, before=before, to=to, value=value)

    def shift(self, dim: str, by: int) -> Tensor:
        return emit("shift", self, dim=dim, by=by)

    def reorder(self, dim: str, order: Sequence[int]) -> Tensor:
        """Equal blocks along a dim in another order: block i is block ``order[i]`` of this one."""
        return emit("reorder", self, dim=dim, order=tuple(order))

    def cumsum(self, dim: str, reverse: bool = False) -> Tensor:
        return emit("cumsum", self, dim=dim, reverse=reverse)

    def __repr__(self) -> str:
        return f"Tensor({self.value!r})"


def unary(kind: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return emit(kind, x)

    function.__name__ = kind
    function.__doc__ = f"Elementwise {kind}."
    return function


exp, log, tanh, sqrt, rsqrt = map(unary, ("exp", "log", "tanh", "sqrt", "rsqrt"))
absolute, sin, cos, erf, detach = map(unary, ("abs", "sin", "cos", "erf", "detach"))


def maximum(x: Tensor, y: Tensor | Scalar) -> Tensor:
    return emit("maximum", x, x._lift(y))


def minimum(x: Tensor, y: Tensor | Scalar) -> Tensor:
    return emit("minimum", x, x._lift(y))


def select(condition: Tensor, x: Tensor | Scalar, y: Tensor | Scalar) -> Tensor:
    """``x`` where the condition holds, else ``y``."""
    like = x if isinstance(x, Tensor) else y
    if not isinstance(like, Tensor):
        raise IRError("select needs a tensor among its two values", caller())
    return emit("select", condition, like._lift(x), like._lift(y))


def einsum(a: Tensor, b: Tensor, out: str | Sequence[str], dtype: str | None = None) -> Tensor:
    """Product of two tensors summed over every dim that is not in ``out``, which names the
    result's dims in order: ``"batch seq heads"``, or a sequence of names."""
    names = tuple(out.split() if isinstance(out, str) else out)
    return emit("einsum", a, b, out=names, dtype=dtype or a.dtype)


def dot(a: Tensor, b: Tensor, *over: str | Dim, dtype: str | None = None) -> Tensor:
    """Contracts the dims ``over``; the result has a's other dims, then b's."""
    gone = {d if isinstance(d, str) else d.name for d in over}
    for name in gone:
        if not (a.type.has(name) and b.type.has(name)):
            raise IRError(f"dot over {name!r}, which both operands must have", caller())
    names = dict.fromkeys(n for n in (*a.type.names, *b.type.names) if n not in gone)
    return einsum(a, b, tuple(names), dtype)


def iota(like: Tensor, dim: Dim, dtype: str = "i32") -> Tensor:
    """0, 1, 2, ... along ``dim``, in the block that ``like`` lies in."""
    return like.block.emit("iota", (), dim=dim, dtype=dtype)


def gather(table: Tensor, ids: Tensor, dim: str | Dim) -> Tensor:
    """Row ``ids`` of ``table`` along ``dim``; ids out of range give zeros."""
    return emit("gather", table, ids, dim=dim if isinstance(dim, str) else dim.name)


def scatter_add(updates: Tensor, ids: Tensor, dim: Dim) -> Tensor:
    """Sums the updates into the rows of a new dim that the ids name."""
    return emit("scatter_add", updates, ids, dim=dim)


def update(x: Tensor, new: Tensor, at: Tensor, dim: str | Dim) -> Tensor:
    """``x`` with ``new``, which lacks ``dim``, in its row ``at`` (an i32 scalar) along it; a row
    beyond either end is dropped. It has no gradient."""
    return emit("update", x, new, at, dim=dim if isinstance(dim, str) else dim.name)


def concat(parts: Sequence[Tensor], dims: Sequence[str], to: Dim) -> Tensor:
    return emit("concat", *parts, dims=tuple(dims), to=to)


def random(
    seed: Tensor, dims: Sequence[Dim], salt: int, distribution: str = "uniform", dtype: str = "f32"
) -> Tensor:
    """Uniform on [0, 1) or standard normal; the same for one seed and salt on every layout."""
    return emit("random", seed, dims=tuple(dims), salt=salt, distribution=distribution, dtype=dtype)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq: str | Dim,
    memory: str | Dim,
    head_dim: str | Dim,
    causal: bool = False,
    window: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Softmax of ``scale`` q k over ``memory``, times v, without holding the scores.

    q[..., seq, head_dim], k and v[..., memory, head_dim], their other dims by name; a dim of q
    that k and v lack shares their keys (grouped queries). Query i sees keys j <= i if ``causal``,
    and only those with abs(i - j) < window if there is one; a query that sees none gets zeros.

    Returns:
        The output, of q's type, and the log of each query's sum of exp(scores), which carries no
        gradient.
    """
    named = {"seq": seq, "memory": memory, "head_dim": head_dim}
    attrs: dict[str, Any] = {n: d if isinstance(d, str) else d.name for n, d in named.items()}
    attrs |= {"causal": causal, "scale": scale}
    if window is not None:
        attrs["window"] = window
    out, lse = innermost((q, k, v)).emit_all("attention", (q, k, v), **attrs)
    return out, lse


Tree = Any  # a Tensor, or a dict, list or tuple of trees


def flatten(tree: Tree) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for child in children for leaf in flatten(child)]


def unflatten(tree: Tree, leaves: Iterator[Any]) -> Tree:
    """``tree`` with its tensors replaced, in the order of ``flatten``."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, Mapping):
        return {k: unflatten(v, leaves) for k, v in tree.items()}
    return type(tree)(unflatten(v, leaves) for v in tree)


def repeat(
    dim: Dim,
    body: Callable[[Tree, Tree], Tree],
    carry: Tree,
    stacked: Tree,
    recompute: bool | None = False,
) -> Tree:
    """``scan`` of a body that makes nothing but the next carry."""
    return scan(dim, lambda c, s: (body(c, s), ()), carry, stacked, recompute)[0]


def scan(
    dim: Dim,
    body: Callable[[Tree, Tree], tuple[Tree, Tree]],
    carry: Tree,
    stacked: Tree,
    recompute: bool | None = False,
) -> tuple[Tree, Tree]:
    """Runs ``body(carry, slice of stacked) -> carry, made`` once per index of ``dim``; the last
    carry, and all that was made, stacked along ``dim``, which comes first.

    ``stacked`` tensors have the dim; the body sees them without it. Tensors of the enclosing
    program that the body uses become constant operands. ``recompute``: True, the
    backward pass keeps only the carried values and computes the rest again; False, it keeps
    matrix products; None, the plan chooses for each of them (``either``).

    Raises:
        IRError: the carry's types change, or a stacked tensor lacks the dim.
    """
    loc = caller()
    carries, stacks = flatten(carry), flatten(stacked)
    outer = innermost([*carries, *stacks])
    inner = Block(outer)
    inner_carry = [inner.add_arg(t.type, t.value.name) for t in carries]
    inner_stack = []
    for t in stacks:
        if dim not in t.dims:
            raise IRError(f"repeat over {dim}: {t.value!r} does not have this dim", loc)
        inner_stack.append(inner.add_arg(t.type.without([dim.name]), t.value.name))
    out, made = body(unflatten(carry, iter(inner_carry)), unflatten(stacked, iter(inner_stack)))
    outputs = [inner.use(t) for t in (*flatten(out), *flatten(made))]
    attrs = {
        "dim": dim,
        "carries": len(carries),
        "stacked": len(stacks),
        "reverse": False,
        "recompute": recompute,
    }
    results = close_repeat(inner, [*carries, *stacks], outputs, attrs, loc)
    last, rest = results[: len(carries)], results[len(carries) :]
    return unflatten(carry, iter(last)), unflatten(made, iter(rest))


def close_repeat(
    inner: Block,
    operands: Sequence[Tensor],
    outputs: Sequence[Value],
    attrs: Mapping[str, Any],
    loc: Loc | None,
) -> list[Tensor]:
    """Ends ``inner`` as the region of a repeat appended to its parent; captures go last."""
    outer = inner.parent
    assert outer is not None
    values = [*(outer.use(t) for t in operands), *inner.captured]
    region = Region((*inner.args, *inner.captured.values()), tuple(inner.ops), tuple(outputs))
    try:
        types = repeat_types(tuple(v.type for v in values), attrs, region)
    except IRError as error:
        raise IRError(error.message, loc) from None
    op = Op("repeat", values, [Value(t) for t in types], attrs, (region,), loc)
    outer.ops.append(op)
    return [Tensor(outer, v) for v in op.results]


class Graph(Block):
    """The block of a whole program; ``build`` makes the program."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.inputs: list[Input] = []
        self.sizes: dict[str, tuple[Dim, Loc | None]] = {}

    def input(self, name: str, dims: Sequence[Dim], dtype: str, role: str) -> Tensor:
        """A named argument.

        Raises:
            IRError: the name is taken, or a dim's name already has another size.
        """
        loc = caller()
        if any(i.name == name for i in self.inputs):
            raise IRError(f"two inputs are named {name!r}", loc)
        for d in dims:
            known, where = self.sizes.setdefault(d.name, (d, loc))
            if known != d:
                raise IRError(
                    f"dim {d.name!r} has size {d.size} here and {known.size} at {where}; "
                    "one name has one size: give one of the two another name",
                    loc,
                )
        self.inputs.append(Input(name, role))
        return self.add_arg(TensorType(tuple(dims), dtype), name)

    def parameter(self, name: str, dims: Sequence[Dim], dtype: str = "f32") -> Tensor:
        return self.input(name, dims, dtype, "parameter")

    def state(self, name: str, dims: Sequence[Dim], dtype: str = "f32") -> Tensor:
        return self.input(name, dims, dtype, "state")

    def data(self, name: str, dims: Sequence[Dim], dtype: str = "i32") -> Tensor:
        return self.input(name, dims, dtype, "data")

    def constant(self, value: Scalar, dtype: str) -> Tensor:
        return self.emit("constant", (), value=value, dtype=dtype)

    def build(self, outputs: Mapping[str, Tensor]) -> Program:
        """The program. An output named like an input is that input's next value.

        Raises:
            IRError: such an output's type differs, or a dim name has two sizes.
        """
        types = {i.name: v.type for i, v in zip(self.inputs, self.args, strict=True)}
        for name, tensor in outputs.items():
            if name in types and tensor.type != types[name]:
                raise IRError(f"output {name!r} is {tensor.type}; the input is {types[name]}")
            if not tensor.value.name:
                tensor.value.name = name
        region = Region(
            tuple(self.args), tuple(self.ops), tuple(self.use(t) for t in outputs.values())
        )
        return Program(self.name, tuple(self.inputs), tuple(outputs), region)
