"""What each op means: the reference executor against plain NumPy, and blocks against the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Block, Graph, Tensor, close_repeat
from neocc.ir.errors import IRError
from neocc.ir.ops import COLLECTIVES, OPS, Context
from neocc.ir.program import Op, Program, Value
from neocc.ir.reference import run_program
from neocc.ir.types import DTYPES, Dim, TensorType
from tests.random_programs import assert_close, programs

A, B, C = Dim("a", 3), Dim("b", 4), Dim("c", 2)
RNG = np.random.default_rng(3)
X = RNG.standard_normal((3, 4))
Y = RNG.standard_normal((4, 3))
Z = RNG.standard_normal((3,))
N = np.array([[2, -1], [0, 3], [1, 7]], np.int32)
SEED = np.uint32(5)

Case = tuple[Callable[..., Tensor], Any]


def shifted(x: np.ndarray, by: int) -> np.ndarray:
    made = np.zeros_like(x)
    for i in range(len(x)):
        if 0 <= i - by < len(x):
            made[i] = x[i - by]
    return made


def rows(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    made = np.zeros((*ids.shape, *table.shape[1:]))
    for at in np.ndindex(ids.shape):
        if 0 <= ids[at] < len(table):
            made[at] = table[ids[at]]
    return made


def added(updates: np.ndarray, ids: np.ndarray, size: int) -> np.ndarray:
    made = np.zeros((size, *updates.shape[ids.ndim :]))
    for at in np.ndindex(ids.shape):
        if 0 <= ids[at] < size:
            made[ids[at]] += updates[at]
    return made


def written(x: np.ndarray, new: np.ndarray, at: int) -> np.ndarray:
    """Along the last axis."""
    return np.where(np.arange(x.shape[-1]) == at, new, x)


# x[a, b], y[b, a], z[a], n[a, c] (integers), flag[a]
CASES: dict[str, Case] = {
    "add": (lambda x, y, z, n, p: x + y, X + Y.T),
    "either": (lambda x, y, z, n, p: b.emit("either", x, x), X),
    "add a number": (lambda x, y, z, n, p: 1.5 + x, X + 1.5),
    "sub": (lambda x, y, z, n, p: x - z, X - Z[:, None]),
    "sub the other way": (lambda x, y, z, n, p: z - x, Z[:, None] - X),
    "mul": (lambda x, y, z, n, p: z * y, Y * Z),
    "div": (lambda x, y, z, n, p: x / y, X / Y.T),
    "pow": (lambda x, y, z, n, p: b.absolute(x) ** y, np.abs(X) ** Y.T),
    "maximum": (lambda x, y, z, n, p: b.maximum(x, y), np.maximum(X, Y.T)),
    "minimum": (lambda x, y, z, n, p: b.minimum(x, 0.0), np.minimum(X, 0)),
    "neg": (lambda x, y, z, n, p: -x, -X),
    "exp": (lambda x, y, z, n, p: b.exp(x), np.exp(X)),
    "log": (lambda x, y, z, n, p: b.log(x * x), np.log(X * X)),
    "tanh": (lambda x, y, z, n, p: b.tanh(x), np.tanh(X)),
    "sqrt": (lambda x, y, z, n, p: b.sqrt(x * x), np.abs(X)),
    "rsqrt": (lambda x, y, z, n, p: b.rsqrt(x * x), 1 / np.abs(X)),
    "abs": (lambda x, y, z, n, p: b.absolute(x), np.abs(X)),
    "sin": (lambda x, y, z, n, p: b.sin(x), np.sin(X)),
    "cos": (lambda x, y, z, n, p: b.cos(x), np.cos(X)),
    "erf": (lambda x, y, z, n, p: b.erf(x), np.vectorize(math.erf)(X)),
    "detach": (lambda x, y, z, n, p: b.detach(x), X),
    "lt": (lambda x, y, z, n, p: x < y, X < Y.T),
    "le": (lambda x, y, z, n, p: n <= 1, N <= 1),
    "gt": (lambda x, y, z, n, p: x > 0.0, X > 0),
    "ge": (lambda x, y, z, n, p: n >= 1, N >= 1),
    "eq": (lambda x, y, z, n, p: n.equals(1), N == 1),
    "and": (lambda x, y, z, n, p: (n > 0) & p, (N > 0) & np.array([[1], [0], [1]], bool)),
    "or": (lambda x, y, z, n, p: (n > 0) | p, (N > 0) | np.array([[1], [0], [1]], bool)),
    "not": (lambda x, y, z, n, p: ~p, np.array([False, True, False])),
    "select": (lambda x, y, z, n, p: b.select(p, x, -1.0), np.where([[1], [0], [1]], X, -1)),
    "cast down": (lambda x, y, z, n, p: x.cast("f32"), X.astype(np.float32)),
    "cast to integers": (lambda x, y, z, n, p: x.cast("i32"), X.astype(np.int32)),
    "cast bools": (lambda x, y, z, n, p: p.cast("f64"), np.array([1.0, 0, 1])),
    "broadcast": (lambda x, y, z, n, p: z.broadcast(B, A), np.broadcast_to(Z, (4, 3))),
    "constant": (lambda x, y, z, n, p: x.block.emit("constant", (), value=2.5, dtype="f64"), 2.5),
    "einsum": (lambda x, y, z, n, p: b.einsum(x, y, ("b", "a")), (X * Y.T).T),
    "einsum over all": (lambda x, y, z, n, p: b.einsum(x, y, ()), (X * Y.T).sum()),
    "einsum of a dim of one": (lambda x, y, z, n, p: b.einsum(x, z, ("a",)), X.sum(1) * Z),
    "einsum of integers": (
        lambda x, y, z, n, p: b.dot(n, n.rename(a="d"), C),
        np.einsum("ac,dc->ad", N, N),
    ),
    "dot": (lambda x, y, z, n, p: b.dot(z, x, A), Z @ X),
    "sum": (lambda x, y, z, n, p: x.sum(A), X.sum(0)),
    "sum of both": (lambda x, y, z, n, p: x.sum(A, B), X.sum()),
    "mean": (lambda x, y, z, n, p: x.mean(B), X.mean(1)),
    "max": (lambda x, y, z, n, p: x.max(A), X.max(0)),
    "min": (lambda x, y, z, n, p: x.reduce("min", "b"), X.min(1)),
    "max of integers": (lambda x, y, z, n, p: n.max(A), N.max(0)),
    "rename": (lambda x, y, z, n, p: z * z.rename(a="d"), Z[:, None] * Z),
    "split": (
        lambda x, y, z, n, p: x.split("b", Dim("hi", 2), Dim("lo", 2)),
        X.reshape(3, 2, 2),
    ),
    "merge": (lambda x, y, z, n, p: x.merge("a", "b", "ab"), X.reshape(12)),
    "merge the other way": (lambda x, y, z, n, p: x.merge("b", "a", "ba"), X.T.reshape(12)),
    "slice": (lambda x, y, z, n, p: x.slice("b", 1, C), X[:, 1:3]),
    "concat": (
        lambda x, y, z, n, p: b.concat([x, y, x], ["a", "a", "a"], Dim("all", 9)),
        np.concatenate([X, Y.T, X]),
    ),
    "pad": (
        lambda x, y, z, n, p: z.pad("a", 1, Dim("wide", 6), 0.5),
        np.array([0.5, *Z, 0.5, 0.5]),
    ),
    "shift": (lambda x, y, z, n, p: x.shift("a", 1), shifted(X, 1)),
    "shift back": (lambda x, y, z, n, p: x.shift("a", -2), shifted(X, -2)),
    "reorder": (lambda x, y, z, n, p: x.reorder("a", (2, 0, 1)), X[[2, 0, 1]]),
    "reorder blocks": (lambda x, y, z, n, p: x.reorder("b", (1, 0)), X[:, [2, 3, 0, 1]]),
    "shift away": (lambda x, y, z, n, p: x.shift("a", 5), np.zeros_like(X)),
    "iota": (lambda x, y, z, n, p: b.iota(x, B), np.arange(4, dtype=np.int32)),
    "gather": (lambda x, y, z, n, p: b.gather(y, n.rename(a="d"), "b"), rows(Y, N)),
    "scatter_add": (
        lambda x, y, z, n, p: b.scatter_add(n.cast("f64") * x, n, Dim("rows", 4)),
        added(N[..., None] * X[:, None], N, 4),
    ),
    "update": (
        lambda x, y, z, n, p: b.update(x, z, n.max("a", "c") - 5, "b"),
        written(X, Z[:, None], 2),
    ),
    "update beyond the end": (lambda x, y, z, n, p: b.update(x, z, n.max("a", "c"), "b"), X),
    "update before the start": (
        lambda x, y, z, n, p: b.update(x, z, n.reduce("min", "a", "c"), "b"),
        X,
    ),
    "cumsum": (lambda x, y, z, n, p: x.cumsum("b"), X.cumsum(1)),
    "cumsum from the end": (lambda x, y, z, n, p: x.cumsum("a", True), X[::-1].cumsum(0)[::-1]),
}
ELSEWHERE = {"random", "repeat", "attention", "attention_grad"}  # tested in files of their own


def inputs(g: Graph) -> tuple[Tensor, ...]:
    return (
        g.data("x", [A, B], "f64"),
        g.data("y", [B, A], "f64"),
        g.data("z", [A], "f64"),
        g.data("n", [A, C]),
        g.data("flag", [A], "bool"),
    )


@pytest.mark.parametrize("name", CASES)
def test_an_op_means_what_numpy_says(x64: None, name: str) -> None:
    build, expected = CASES[name]
    g = Graph("case")
    out = build(*inputs(g))
    flag = np.array([True, False, True])
    found = run_program(g.build({"out": out}), {"x": X, "y": Y, "z": Z, "n": N, "flag": flag})[
        "out"
    ]
    expected = np.asarray(expected)
    assert found.dtype == DTYPES[out.dtype] == expected.dtype
    assert_close(found, expected)


def test_every_op_has_its_case() -> None:
    g = Graph("all")
    made = inputs(g)
    for build, _ in CASES.values():
        build(*made)
    kinds = {op.kind for op in g.ops}
    assert set(OPS) - COLLECTIVES - kinds == ELSEWHERE


@pytest.mark.parametrize("reverse", [False, True])
def test_repeat_carries_stacks_and_captures(x64: None, reverse: bool) -> None:
    g = Graph("repeat")
    h, w, k = g.data("h", [A], "f64"), g.data("w", [A, B], "f64"), g.data("k", (), "f64")
    inner = Block(g)
    carry, stacked = inner.add_arg(h.type), inner.add_arg(TensorType((A,), "f64"))
    step = carry * k + stacked
    outputs = [inner.use(step), inner.use(carry * 2.0)]
    attrs = {"dim": B, "carries": 1, "stacked": 1, "reverse": reverse, "recompute": False}
    last, all_of_them = close_repeat(inner, [h, w], outputs, attrs, None)
    program = g.build({"last": last, "all": all_of_them})
    found = run_program(program, {"h": Z, "w": X, "k": np.float64(0.5)})
    state, seen = Z, np.zeros((4, 3))
    for i in reversed(range(4)) if reverse else range(4):
        seen[i] = 2 * state
        state = state * 0.5 + X[:, i]
    assert_close(found["last"], state)
    assert_close(found["all"], seen)


@pytest.mark.parametrize("op, expected", [("sum", 0), ("max", -np.inf), ("min", np.inf)])
def test_a_reduction_of_nothing_is_its_identity(x64: None, op: str, expected: float) -> None:
    g = Graph("empty")
    x = g.data("x", [Dim("none", 0), A], "f64")
    found = run_program(g.build({"out": x.reduce(op, "none")}), {"x": np.zeros((0, 3))})
    assert_close(found["out"], np.full(3, expected))


# Blocks


@given(st.data())
@settings(max_examples=60)
def test_with_mesh_axes_in_front_an_op_does_each_device_by_itself(data: st.DataObject) -> None:
    """Every op of a random program, on operands of which some are the same on all devices."""
    program = data.draw(programs(repeats=False, max_ops=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mesh = (2, 3)
    for op in program.body.ops:
        args = []
        for v in op.operands:
            lead = tuple(n if data.draw(st.booleans()) else 1 for n in mesh)
            args.append(random_array(rng, v, lead))
        with np.errstate(over="ignore"):  # random's counters wrap
            made = OPS[op.kind].evaluate(op, args, Context(np, lead=2))
        found = [np.broadcast_to(x, (*mesh, *x.shape[2:])) for x in made]
        for device in np.ndindex(mesh):
            mine = [np.broadcast_to(x, (*mesh, *x.shape[2:]))[device] for x in args]
            with np.errstate(over="ignore"):
                expected = OPS[op.kind].evaluate(op, mine, Context(np))
            for x, right in zip(found, expected, strict=True):
                assert_close(x[device], right)


def random_array(rng: np.random.Generator, v: Value, lead: tuple[int, ...]) -> np.ndarray:
    shape = (*lead, *v.type.shape)
    if v.type.is_float:
        return rng.uniform(0.5, 2, shape).astype(DTYPES[v.type.dtype])
    return rng.integers(0, 2 if v.type.dtype == "bool" else 5, shape).astype(DTYPES[v.type.dtype])


def cut(parts: dict[str, int], number: dict[str, Any]) -> Callable[[str, int], tuple[int, Any]]:
    """A block function: dims cut into ``parts``, the block ``number`` along each."""

    def block(name: str, size: int) -> tuple[int, Any]:
        local = size // parts.get(name, 1)
        return local, number.get(name, 0) * local

    return block


def op_of(tensor: Tensor) -> Op:
    return next(op for op in tensor.block.ops if tensor.value in op.results)


def test_blocks_of_iota_and_broadcast_know_where_they_are() -> None:
    g = Graph("blocks")
    index = op_of(b.iota(g.data("x", (), "f64"), Dim("d", 12)))
    ctx = Context(np, 1, cut({"d": 3}, {"d": np.arange(3)}))
    (found,) = OPS["iota"].evaluate(index, [], ctx)
    np.testing.assert_array_equal(found, np.arange(12).reshape(3, 4))
    wide = op_of(g.data("y", [A], "f64").broadcast(A, Dim("d", 12)))
    (found,) = OPS["broadcast"].evaluate(wide, [np.ones((1, 3))], ctx)
    assert found.shape == (1, 3, 4)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_a_gather_from_a_cut_table_is_a_sum_over_its_blocks(parts: int) -> None:
    g = Graph("gather")
    table = RNG.standard_normal((6, 2))
    ids = np.array([0, 5, -1, 6, 2, 2, 3], np.int32)
    t, i = g.data("t", [Dim("v", 6), C], "f64"), g.data("i", [Dim("n", 7)])
    op = op_of(b.gather(t, i, "v"))
    ctx = Context(np, 1, cut({"v": parts}, {"v": np.arange(parts)}))
    blocks = table.reshape(parts, 6 // parts, 2)
    (found,) = OPS["gather"].evaluate(op, [blocks, ids[None]], ctx)
    assert_close(found.sum(0), rows(table, ids))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_blocks_of_a_scatter_add_are_rows_of_the_whole(parts: int) -> None:
    g = Graph("scatter")
    updates = RNG.standard_normal((7, 2))
    ids = np.array([0, 5, -1, 6, 2, 2, 3], np.int32)
    u, i = g.data("u", [Dim("n", 7), C], "f64"), g.data("i", [Dim("n", 7)])
    op = op_of(b.scatter_add(u, i, Dim("v", 6)))
    ctx = Context(np, 1, cut({"v": parts}, {"v": np.arange(parts)}))
    (found,) = OPS["scatter_add"].evaluate(op, [updates[None], ids[None]], ctx)
    assert_close(found.reshape(6, 2), added(updates, ids, 6))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_blocks_of_an_update_are_blocks_of_the_whole(parts: int) -> None:
    """Wherever the row is, past either end too; in NumPy on all devices, in JAX on each."""
    g = Graph("update")
    table, new = RNG.standard_normal((2, 6)), RNG.standard_normal(2)
    x, row = g.data("x", [C, Dim("v", 6)], "f64"), g.data("row", [C], "f64")
    op = op_of(b.update(x, row, g.data("at", (), "i32"), "v"))
    blocks = np.moveaxis(table.reshape(2, parts, 6 // parts), 1, 0)
    for at in range(-2, 9):
        expected = written(table, new[:, None], at).reshape(2, parts, 6 // parts)
        ctx = Context(np, 1, cut({"v": parts}, {"v": np.arange(parts)}))
        (found,) = OPS["update"].evaluate(op, [blocks, new[None], np.full(1, at)], ctx)
        np.testing.assert_array_equal(found, np.moveaxis(expected, 1, 0))
        for device in range(parts):
            own = Context(jnp, 0, cut({"v": parts}, {"v": device}))
            args = [blocks[device].astype(np.float32), new.astype(np.float32), np.int32(at)]
            (found,) = OPS["update"].evaluate(op, args, own)
            np.testing.assert_array_equal(found, expected[:, device].astype(np.float32))


# Errors


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda x, y, z, n, p: x + n, "add mixes the dtypes f64, i32; cast one"),
        (lambda x, y, z, n, p: b.exp(n), "exp of i32; cast it to a float dtype"),
        (lambda x, y, z, n, p: ~x, "not of f64, not bool"),
        (lambda x, y, z, n, p: b.select(x, x, x), "select's condition is f64, not bool"),
        (lambda x, y, z, n, p: x + x.slice("a", 0, Dim("a", 2)), "'a' has two sizes: 3 and 2"),
        (lambda x, y, z, n, p: x.sum("seq"), "reduce over 'seq', which"),
        (lambda x, y, z, n, p: x.rename(a="b"), "rename to 'b', which"),
        (lambda x, y, z, n, p: b.dot(x, z, B), "dot over 'b', which both operands must have"),
        (lambda x, y, z, n, p: b.einsum(x, y, ("c",)), "no operand has the result's dim 'c'"),
        (lambda x, y, z, n, p: x.broadcast(A), "broadcast drops dim b=4"),
        (lambda x, y, z, n, p: x.split("b", A, C), "split of b=4 into a=3 and c=2: 3 x 2 != 4"),
        (lambda x, y, z, n, p: x.slice("b", 3, C), "slice [3, 5) of b=4 is out of range"),
        (lambda x, y, z, n, p: x.pad("b", 0, A), "pad of b=4 to a=3 cuts it"),
        (lambda x, y, z, n, p: b.concat([x, z], ["a", "a"], Dim("d", 6)), "the other dims differ"),
        (lambda x, y, z, n, p: b.gather(y, n, "b"), "dim a is in the table and in the ids"),
        (lambda x, y, z, n, p: b.gather(z, n, "a"), "the ids have the dim 'a'; rename it"),
        (lambda x, y, z, n, p: b.scatter_add(x, n, B), "the updates lack the ids' dim c=2"),
        (lambda x, y, z, n, p: x.cumsum("seq"), "cumsum along 'seq', which"),
        (lambda x, y, z, n, p: b.update(x, z, n, "b"), "position is i32[a=3, c=2], not an i32"),
        (lambda x, y, z, n, p: b.update(x, z, n.max("a", "c"), "a"), "is not one row of it"),
        (lambda x, y, z, n, p: b.update(z, x, n.max("a", "c"), "b"), "update along 'b', which"),
        (lambda x, y, z, n, p: b.random(n, [A], 0), "random's seed is"),
        (lambda x, y, z, n, p: bool(x.sum("a", "b")), "no truth value"),
        (lambda x, y, z, n, p: b.repeat(C, lambda c, s: c, (x,), (z,)), "does not have this dim"),
        (lambda x, y, z, n, p: b.repeat(C, lambda c, s: (z,), (x,), ()), "leaves the region as"),
    ],
)
def test_a_faulty_op_names_the_users_line(build: Callable[..., Any], message: str) -> None:
    made = inputs(Graph("faulty"))
    with pytest.raises(IRError) as error:
        build(*made)
    assert message in error.value.message
    assert error.value.loc is not None
    assert error.value.loc.file.endswith("test_ops.py")
    assert error.value.loc.line == build.__code__.co_firstlineno


def test_one_dim_name_has_one_size_and_one_input_name_one_input() -> None:
    g = Graph("sizes")
    g.data("x", [A])
    with pytest.raises(IRError, match=r"test_ops.py:\d+: dim 'a' has size 5 here and 3 at .*:\d+"):
        g.data("y", [Dim("a", 5)])
    with pytest.raises(IRError, match=r"test_ops.py:\d+: two inputs are named 'x'"):
        g.data("x", [A])


def test_running_without_an_input_or_with_a_wrong_shape_is_refused() -> None:
    g = Graph("small")
    program: Program = g.build({"y": g.data("x", [A], "f32") * 2.0})
    with pytest.raises(IRError, match="program 'small' needs the input 'x'"):
        run_program(program, {})
    with pytest.raises(IRError, match=r"input 'x' has shape \(2,\), not \(3,\)"):
        run_program(program, {"x": np.zeros(2)})
