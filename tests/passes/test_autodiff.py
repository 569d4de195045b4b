"""Gradients against central differences and against jax.grad of the reference executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.ir import builder as b
from neocc.ir.builder import Graph, Tensor
from neocc.ir.errors import IRError
from neocc.ir.program import Op, Program
from neocc.ir.reference import run_program
from neocc.ir.types import Dim
from neocc.passes.autodiff import differentiate, gradients
from tests.numpy_executor import run_numpy
from tests.random_programs import assert_close, inputs_for, programs

A, B, C, W, L = (Dim(n, s) for n, s in (("a", 3), ("b", 4), ("c", 2), ("w", 12), ("layers", 3)))
pytestmark = pytest.mark.usefixtures("x64")


def loss_of(make: Callable[..., Tensor], *types: Any, dtype: str = "f64") -> Program:
    """A program whose loss weighs every element of ``make(inputs)`` differently."""
    g = Graph("test")
    tensors = []
    for i, t in enumerate(types):
        if isinstance(t, str):
            tensors.append(g.data(f"ids{i}", (A, C), t))
        else:
            tensors.append(g.parameter(f"p{i}", t, dtype))
    out = make(*tensors)
    weight = g.data("weight", out.dims, out.dtype)
    return g.build({"loss": (out * weight).sum(*out.dims)})


def values(program: Program, positive: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for info, v in program.named_inputs:
        if v.type.dtype == "i32":
            made[info.name] = rng.integers(0, 3, v.type.shape).astype(np.int32)
        else:
            x = rng.standard_normal(v.type.shape)
            made[info.name] = np.abs(x) + 0.5 if positive and info.name != "weight" else x
    return made


def jax_gradients(program: Program, inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    rest = {k: v for k, v in inputs.items() if k not in names}

    def loss(some: dict[str, Any]) -> Any:
        return run_program(program, rest | some)["loss"]

    return jax.jit(jax.grad(loss))({n: jnp.asarray(inputs[n]) for n in names})


def check(program: Program, inputs: dict[str, Any], differences: bool = True) -> dict[str, Any]:
    """Holds every gradient of ``program`` against jax.grad and central differences."""
    both = differentiate(program)
    names = [n[2:] for n in both.outputs if n.startswith("d_")]
    got = run_numpy(both, inputs)
    assert_close(got["loss"], run_numpy(program, inputs)["loss"])
    expected = jax_gradients(program, inputs, names)
    for n in names:
        assert_close(got[f"d_{n}"], expected[n], 1e-11)
    if differences:
        rng, h = np.random.default_rng(7), 1e-5
        step = {n: rng.standard_normal(inputs[n].shape) for n in names}
        ends = [
            run_numpy(program, inputs | {n: inputs[n] + s * h * step[n] for n in names})["loss"]
            for s in (1, -1)
        ]
        slope = sum(float(np.sum(got[f"d_{n}"] * step[n])) for n in names)
        assert_close(slope, (ends[0] - ends[1]) / (2 * h), 1e-7)
    return got


RULES: dict[str, tuple[Any, ...]] = {
    "add": (lambda x, y: x + y, (A, B), (B, A)),
    "sub": (lambda x, y: x - y, (A,), (B, A)),
    "mul": (lambda x, y: x * y, (A, B), (B,)),
    "div": (lambda x, y: x / y, (B,), (A, B)),
    "pow": (lambda x, y: x**y, (A, B), (A,)),
    "maximum": (b.maximum, (A, B), (B,)),
    "minimum": (b.minimum, (B,), (A, B)),
    "select": (lambda x, y: b.select(b.iota(x, A) < 2, x, y * y), (A, B), (B,)),
    "neg": (lambda x: -x, (A,)),
    "exp": (b.exp, (A,)),
    "log": (b.log, (A,)),
    "tanh": (b.tanh, (A,)),
    "sqrt": (b.sqrt, (A,)),
    "rsqrt": (b.rsqrt, (A,)),
    "abs": (lambda x: b.absolute(x - 1.0), (A, B)),
    "sin": (b.sin, (A,)),
    "cos": (b.cos, (A,)),
    "erf": (b.erf, (A,)),
    "einsum": (lambda x, y: b.einsum(x, y, ("c", "a")), (A, B), (B, C)),
    "einsum batched": (lambda x, y: b.einsum(x, y, ("c", "b")), (A, B, C), (C, A, B)),
    "einsum of a lone dim": (lambda x, y: b.einsum(x, y, ("c",)), (A, B), (B, C)),
    "einsum with itself": (lambda x: b.einsum(x, x, ("a",)), (A, B)),
    "sum": (lambda x: x.sum("b", "a"), (A, B, C)),
    "max": (lambda x: x.max("b"), (A, B)),
    "min": (lambda x: x.reduce("min", "a", "b"), (A, B, C)),
    "broadcast": (lambda x: x.broadcast(C, B, A), (A, B)),
    "rename": (lambda x: x.rename(a="d") * x, (A, B)),
    "split": (lambda x: x.split("w", A, B), (C, W)),
    "merge": (lambda x: x.merge("a", "b", "w"), (A, C, B)),
    "merge turned": (lambda x: x.merge("b", "a", "w"), (A, C, B)),
    "slice": (lambda x: x.slice("b", 1, Dim("s", 2)), (A, B)),
    "pad": (lambda x: x.pad("b", 2, Dim("s", 7), 5.0), (B, A)),
    "concat": (lambda x, y: b.concat((x, y, x), ("a", "b", "a"), Dim("s", 10)), (A, C), (C, B)),
    "shift": (lambda x: x.shift("b", 1) * x.shift("b", -2), (A, B)),
    "reorder": (lambda x: x.reorder("b", (1, 3, 0, 2)) * x.reorder("b", (1, 0)), (A, B)),
    "gather": (lambda x, i: b.gather(x, i, "b"), (B,), "i32"),
    "gather inner dim": (lambda x, i: b.gather(x, i, "b"), (L, B), "i32"),
    "scatter_add": (lambda x, i: b.scatter_add(x, i, L), (C, B, A), "i32"),
    "cumsum": (lambda x: x.cumsum("b"), (A, B)),
    "cumsum reversed": (lambda x: x.cumsum("a", reverse=True), (A, B)),
    "used thrice": (lambda x: x * x + x.sum("a") * b.tanh(x), (A, B)),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_is_the_derivative(name: str) -> None:
    make, *types = RULES[name]
    program = loss_of(make, *types)
    check(program, values(program, positive=True))


@pytest.mark.parametrize("name", ["mul", "div", "pow", "exp", "einsum", "max", "gather", "tanh"])
def test_second_derivative_of_a_rule(name: str) -> None:
    make, *types = RULES[name]
    program = loss_of(lambda *x: make(*x) * make(*x), *types)
    check_second(program, values(program, positive=True))


def check_second(program: Program, inputs: dict[str, Any]) -> None:
    """gradients() of a function of what gradients() gave, against jax.grad of both."""
    once = differentiate(program)
    g = Graph("second")
    g.inputs, g.args, g.ops = list(once.inputs), list(once.body.args), list(once.body.ops)
    total = g.constant(0.0, "f64")
    for n in once.outputs[1:]:
        t = Tensor(g, once.output_value(n))
        total = total + b.sin(t).sum(*t.dims)
    names = [i.name for i in once.inputs if i.role == "parameter"]
    seconds = gradients(total, [Tensor(g, once.input_value(n)) for n in names])
    got = run_numpy(g.build(dict(zip(names, seconds, strict=True))), inputs)

    rest = {k: v for k, v in inputs.items() if k not in names}

    def first(some: dict[str, Any]) -> Any:
        grads = jax.grad(lambda s: run_program(program, rest | s)["loss"])(some)
        return sum(jnp.sin(x).sum() for x in grads.values())

    expected = jax.jit(jax.grad(first))({n: jnp.asarray(inputs[n]) for n in names})
    for n in names:
        assert_close(got[n], expected[n], 1e-10)


def test_elements_that_tie_share_the_gradient() -> None:
    program = differentiate(loss_of(lambda x: x.max("b"), (A, B)))
    inputs = {"p0": np.ones((3, 4)), "weight": np.array([4.0, 8.0, -4.0])}
    np.testing.assert_array_equal(run_numpy(program, inputs)["d_p0"][:, 0], [1.0, 2.0, -1.0])
    both = differentiate(loss_of(b.maximum, (A,), (A,)))
    inputs = {"p0": np.ones(3), "p1": np.ones(3), "weight": np.array([4.0, 8.0, -4.0])}
    got = run_numpy(both, inputs)
    np.testing.assert_array_equal(got["d_p0"], [2.0, 4.0, -2.0])
    np.testing.assert_array_equal(got["d_p1"], [2.0, 4.0, -2.0])


def test_power_of_zero_has_finite_gradients() -> None:
    program = loss_of(lambda x: x**2 + x**0, (A,))
    got = run_numpy(differentiate(program), {"p0": np.zeros(3), "weight": np.ones(3)})
    np.testing.assert_array_equal(got["d_p0"], 0)


def test_gradient_of_repeated_ids_is_the_sum_over_the_places_they_stand() -> None:
    program = differentiate(loss_of(lambda x, i: b.gather(x, i, "b"), (B,), "i32"))
    inputs = {"p0": np.zeros(4), "ids1": np.array([[1, 1], [3, 1], [9, -1]], np.int32)}
    inputs["weight"] = np.arange(6.0).reshape(3, 2) + 1
    np.testing.assert_array_equal(run_numpy(program, inputs)["d_p0"], [0, 1 + 2 + 4, 0, 3])


def test_cast_and_mixed_precision_products_keep_each_operand_its_dtype() -> None:
    def make(x: Tensor, y: Tensor) -> Tensor:
        return b.einsum(x.cast("bf16"), y.cast("bf16"), ("a", "c"), dtype="f32")

    program = loss_of(make, (A, B), (B, C), dtype="f32")
    both = differentiate(program)
    assert {both.output_value(f"d_{n}").type.dtype for n in ("p0", "p1")} == {"f32"}
    inside = [op for op in both.body.ops if op.kind == "einsum"][1:]
    assert len(inside) == 2 and all(v.type.dtype == "bf16" for op in inside for v in op.operands)


def test_what_does_not_depend_gets_zeros_and_costs_nothing() -> None:
    g = Graph("zero")
    x, y = g.parameter("x", (A,), "f64"), g.parameter("y", (A, B), "f64")
    loss = (b.detach(x * y.sum("b")) + x).sum("a")
    gx, gy = gradients(loss, [x, y])
    got = run_numpy(g.build({"gx": gx, "gy": gy}), {"x": np.ones(3), "y": np.ones((3, 4))})
    np.testing.assert_array_equal(got["gx"], np.ones(3))
    np.testing.assert_array_equal(got["gy"], np.zeros((3, 4)))
    assert not any(op.kind == "mul" for op in g.ops[5:])


def test_gradient_ops_stand_at_the_line_of_the_op_they_differentiate() -> None:
    g = Graph("lines")
    x = g.parameter("x", (A,), "f64")
    y = b.tanh(x)
    line = g.ops[-1].loc
    before = len(g.ops)
    gradients(y.sum("a"), [x])
    assert [op.loc for op in g.ops[before:] if op.kind == "mul"] == [line, line]


def test_bad_requests_say_what_is_wrong() -> None:
    g = Graph("bad")
    x, i = g.parameter("x", (A,), "f64"), g.data("i", (A,))
    with pytest.raises(IRError, match="float scalar"):
        gradients(x, [x])
    with pytest.raises(IRError, match="float scalar"):
        gradients(i.sum("a"), [x])
    with pytest.raises(IRError, match="only float"):
        gradients(x.sum("a"), [i])
    with pytest.raises(IRError, match="another block"):
        gradients(x.sum("a"), [Graph("other").parameter("x", (A,), "f64")])
    with pytest.raises(IRError, match="no 'cost'"):
        differentiate(g.build({"loss": x.sum("a")}), "cost")


def test_an_update_has_no_gradient() -> None:
    g = Graph("written")
    x, new = g.parameter("x", (A, B), "f64"), g.parameter("new", (A,), "f64")
    loss = b.update(x, new, g.data("at", ()), B).sum("a", "b")
    with pytest.raises(IRError, match=r"test_autodiff.py:\d+: update has no gradient"):
        gradients(loss, [new])


# repeat


def layers_program(recompute: bool, reverse: bool = False) -> Program:
    """Carried x and an integer counter; stacked weights (the dim not in front) and scales;
    a constant matrix and a table looked up at repeated ids."""
    g = Graph("layers")
    x, const = g.parameter("x", (A, B), "f64"), g.parameter("const", (B, C), "f64")
    w, scale = g.parameter("w", (C, L, B), "f64"), g.parameter("scale", (L,), "f64")
    table, ids = g.parameter("table", (C, B), "f64"), g.data("ids", (A,))
    count = ids.sum("a")

    def body(carry: tuple[Tensor, Tensor], slices: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, n = carry
        h = b.einsum(b.tanh(x), const, ("a", "c")) * slices["scale"]
        x = x + b.einsum(b.sin(h), slices["w"], ("a", "b")) + b.gather(table, ids, "c")
        return x * (n.cast("f64") * 0.01 + 1.0), n + 1

    x, count = b.repeat(L, body, (x, count), {"w": w, "scale": scale}, recompute)
    g.ops[-1].attrs["reverse"] = reverse
    weight = g.data("weight", (A, B), "f64")
    return g.build({"loss": (x * weight).sum("a", "b")})


def repeats(program: Program) -> list[Op]:
    return [op for op in program.body.ops if op.kind == "repeat"]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_repeat_with_carried_stacked_and_constant_operands(recompute: bool, reverse: bool) -> None:
    program = layers_program(recompute, reverse)
    check(program, values(program))
    _, backward = repeats(differentiate(program))
    assert backward.attrs["reverse"] != reverse


@pytest.mark.parametrize("recompute", [False, True])
def test_second_derivatives_through_repeat(recompute: bool) -> None:
    program = layers_program(recompute)
    check_second(program, values(program))


def test_recompute_changes_what_is_kept_and_no_gradient() -> None:
    kept, again = (differentiate(layers_program(r)) for r in (False, True))
    inputs = values(kept)
    got, expected = run_numpy(kept, inputs), run_numpy(again, inputs)
    for n in got:
        np.testing.assert_array_equal(got[n], expected[n])

    def products(op: Op) -> int:
        return sum(o.kind == "einsum" for o in op.regions[0].ops)

    (forward, backward), (forward_again, backward_again) = repeats(kept), repeats(again)
    assert (products(forward), products(backward), products(backward_again)) == (2, 4, 5)
    # the carried x and counter, and the one product whose value the backward pass uses
    assert len(forward_again.results) - 2 == 2
    assert len(forward.results) - 2 == 3


def test_backward_repeat_holds_nothing_that_it_does_not_use() -> None:
    for recompute in (False, True):
        for op in repeats(differentiate(layers_program(recompute))):
            region = op.regions[0]
            used = {v for o in region.ops for v in o.operands} | set(region.outputs)
            results = {v for o in region.ops for v in o.results}
            assert set(region.args) <= used and results <= used


def test_two_gradients_of_one_repeat_store_the_carried_values_once() -> None:
    g = Graph("twice")
    x, w = g.parameter("x", (A,), "f64"), g.parameter("w", (L, A), "f64")
    y = b.repeat(L, lambda x, w: b.sin(x * w), x, w, recompute=True)
    (gx,), (gw,) = gradients(y.sum("a"), [x]), gradients((y * y).sum("a"), [w])
    forward = next(op for op in g.ops if op.kind == "repeat")
    assert len(forward.results) == 2
    inputs = {"x": np.arange(3.0), "w": np.arange(9.0).reshape(3, 3) / 5}
    got = run_numpy(g.build({"gx": gx, "gw": gw}), inputs)

    def run(x: Any, w: Any) -> Any:
        for i in range(3):
            x = jnp.sin(x * w[i])
        return x

    want = jax.grad(lambda x: run(x, inputs["w"]).sum())(inputs["x"])
    assert_close(got["gx"], want)
    want = jax.grad(lambda w: (run(inputs["x"], w) ** 2).sum())(inputs["w"])
    assert_close(got["gw"], want)


def test_a_carry_that_gets_its_value_from_another_one_step_later() -> None:
    g = Graph("turns")
    x, y, w = (g.parameter(n, d, "f64") for n, d in (("x", (A,)), ("y", (A,)), ("w", (L, A))))
    # z is overwritten by x, x by y, y by itself and the slice: w reaches z after two steps.
    z = b.repeat(L, lambda c, w: (c[1], c[2], c[2] * w), (x * 2.0, x, y), w)[0]
    weight = g.data("weight", (A,), "f64")
    program = g.build({"loss": (z * weight).sum("a")})
    check(program, values(program))


@pytest.mark.parametrize("recompute", [False, True])
def test_nested_repeats(recompute: bool) -> None:
    inner_dim = Dim("steps", 2)
    g = Graph("nested")
    x, w = g.parameter("x", (A,), "f64"), g.parameter("w", (L, inner_dim, A), "f64")
    m = g.parameter("m", (A, C), "f64")

    def inner(x: Tensor, w: Tensor) -> Tensor:
        h = b.einsum(b.tanh(x * w), m, ("c",))
        return x + b.einsum(h, m, ("a",))

    def outer(x: Tensor, w: Tensor) -> Tensor:
        return b.sin(b.repeat(inner_dim, inner, x, w, recompute)) + x

    x_end = b.repeat(L, outer, x, w, recompute)
    weight = g.data("weight", (A,), "f64")
    program = g.build({"loss": (x_end * weight).sum("a")})
    check(program, values(program))
    check_second(program, values(program))


def test_every_value_of_a_differentiated_program_is_made_once() -> None:
    program = differentiate(layers_program(recompute=False))
    made = list(program.values())
    assert len(made) == len(set(made))


@given(programs(differentiable=True, max_ops=8, sizes=(1, 2, 3, 4)), st.integers(0, 99))
@settings(max_examples=40)
def test_random_programs_against_central_differences(program: Program, seed: int) -> None:
    inputs = inputs_for(program, np.random.default_rng(seed))
    names = [i.name for i in program.inputs if i.role == "parameter"]
    got = run_numpy(differentiate(program), inputs)
    rng, h = np.random.default_rng(seed + 1), 1e-4
    step = {n: rng.standard_normal(inputs[n].shape) for n in names}
    at = [
        float(run_numpy(program, inputs | {n: inputs[n] + s * h * step[n] for n in names})["loss"])
        for s in (-2, -1, 1, 2)
    ]
    slope = sum(float(np.sum(got[f"d_{n}"] * step[n])) for n in names)
    fourth_order = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
    assert abs(slope - fourth_order) <= 1e-6 * max(1.0, abs(slope))


@given(programs(differentiable=True, max_ops=7, sizes=(1, 2, 3)))
@settings(max_examples=8)
def test_random_programs_against_jax(program: Program) -> None:
    inputs = inputs_for(program, np.random.default_rng(3))
    check(program, inputs, differences=False)
