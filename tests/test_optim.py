"""The learning rate, clipping and norms as numbers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.ir.builder import Graph
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.optim import Adafactor, Adam, Matrix, clip_scale, global_norm, learning_rate
from tests.numpy_executor import run_numpy


def rate(step: int, decay: str, warmup: int = 10, steps: int = 100) -> float:
    g = Graph("rate")
    time = g.data("step", (), "f64")
    program = g.build({"lr": learning_rate(time, 2.0, warmup, decay, steps)})
    return float(run_numpy(program, {"step": np.asarray(float(step))})["lr"])


@pytest.mark.parametrize(
    ("decay", "middle"), [("cosine", 2.0 * 0.55), ("linear", 2.0 * 0.55), ("constant", 2.0)]
)
def test_rate_warms_up_decays_to_a_tenth_and_stays(decay: str, middle: float) -> None:
    last = 2.0 if decay == "constant" else 0.2
    assert rate(0, decay) == 0.0
    assert rate(50, decay) == pytest.approx(middle)
    assert rate(100, decay) == pytest.approx(last)
    assert rate(1000, decay) == pytest.approx(last)
    assert rate(0, decay, warmup=0) == pytest.approx(2.0)


def test_rate_in_warm_up_is_the_decayed_rate_in_proportion() -> None:
    cosine = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 0.05)))
    assert rate(5, "cosine") == pytest.approx(0.5 * cosine)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(0.01, 50))
def test_clipping_brings_the_norm_of_all_tensors_down_to_the_limit(
    numbers: list[float], limit: float
) -> None:
    g = Graph("clip")
    a, s = g.data("a", (Dim("a", len(numbers) - 1),), "f64"), g.data("s", (), "f64")
    norm = global_norm([a, s])
    program = g.build({"norm": norm, "scale": clip_scale(norm, limit)})
    out = run_numpy(program, {"a": np.array(numbers[:-1]), "s": np.asarray(numbers[-1])})
    true = float(np.linalg.norm(numbers))
    assert out["norm"] == pytest.approx(true, abs=1e-12)
    assert true * float(out["scale"]) == pytest.approx(min(true, limit), abs=1e-12)


# Optimizers, 100 steps: a stack of two of each, of which either implementation sees one alone.

L, A, H, D = Dim("layers", 2), Dim("a", 130), Dim("h", 17), Dim("d", 8)
SHAPES = {
    "matrix": Matrix((L,), (A,), (H, D)),  # 130 x 136
    "turned": Matrix((L,), (H, D), (A,)),
    "narrow": Matrix((L,), (D,), (A,)),  # 8 < 128: not factored
    "vector": Matrix((L,), (A,), ()),
    "scalar": Matrix((L,), (), ()),
}
STEPS, LR = 100, 0.03
Arrays = dict[str, np.ndarray]


def step_of(optimizer: Adam | Adafactor, decay: float) -> Program:
    g = Graph("step")
    time, lr = g.data("time", (), "f64"), g.constant(LR, "f64")
    update = optimizer.updates(time, lr)
    out = {}
    for n, shape in SHAPES.items():
        w, grad = g.parameter(n, shape.dims, "f64"), g.data(f"d_{n}", shape.dims, "f64")
        slots = optimizer.slots(shape).items()
        state = {s: g.state(f"{n}.{s}", dims, "f64") for s, dims in slots}
        change, new = update(shape, w, grad, state, decay)
        out |= {n: w - change} | {f"{n}.{s}": t for s, t in new.items()}
    return g.build(out)


def start() -> Arrays:
    rng = np.random.default_rng(0)
    made = {n: rng.standard_normal([d.size for d in m.dims]) for n, m in SHAPES.items()}
    return made | {"narrow": 1e-5 * made["narrow"]}  # below the least scale


def gradients(step: int) -> Arrays:
    """Of many sizes, some of them rows of zeros."""
    rng = np.random.default_rng(step + 1)
    size = 10.0 ** rng.integers(-4, 2)
    made = {n: size * rng.standard_normal(x.shape) for n, x in start().items()}
    made["vector"][:, :5] = 0
    return made


def trained(optimizer: Adam | Adafactor, decay: float = 0.0) -> Arrays:
    program, values = step_of(optimizer, decay), start()
    for n, shape in SHAPES.items():
        for s, dims in optimizer.slots(shape).items():
            values[f"{n}.{s}"] = np.zeros([d.size for d in dims])
    for step in range(STEPS):
        grads = {f"d_{n}": x for n, x in gradients(step).items()}
        values = run_numpy(program, values | grads | {"time": np.asarray(float(step))})
    return {n: values[n] for n in SHAPES}


def alone(values: Arrays) -> Arrays:
    """Each of a stack by itself, as a matrix, a vector or a number."""
    made = {}
    for n, x in values.items():
        shape = tuple(
            int(np.prod([d.size for d in side]))
            for side in (SHAPES[n].rows, SHAPES[n].columns)
            if side
        )
        made |= {f"{n}{i}": part.reshape(shape) for i, part in enumerate(x)}
    return made


def by_optax(optimizer: optax.GradientTransformation) -> Arrays:
    update = jax.jit(optimizer.update)
    w: Any = alone(start())
    state = optimizer.init(w)
    for step in range(STEPS):
        change, state = update(alone(gradients(step)), state, w)
        w = optax.apply_updates(w, change)
    return w


def assert_same(got: Arrays, expected: Arrays, atol: float = 1e-9) -> None:
    for n, x in alone(got).items():
        np.testing.assert_allclose(x, expected[n], rtol=1e-6, atol=atol, err_msg=n)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_equals_optax(x64: None, beta1: float) -> None:
    same = optax.adafactor(
        LR, min_dim_size_to_factor=128, momentum=beta1 or None, multiply_by_parameter_scale=True
    )
    # Optax has its decay rate in float32.
    assert_same(trained(Adafactor(beta1)), by_optax(same), atol=1e-6)


def test_adam_equals_optax(x64: None) -> None:
    same = optax.adamw(LR, 0.9, 0.95, 1e-8, weight_decay=0.1)
    assert_same(trained(Adam(0.9, 0.95, 1e-8), decay=0.1), by_optax(same))


def test_adafactor_equals_its_written_rule() -> None:
    """Mesh TensorFlow's optimize.py, with a decay rate of 1 - t ** -0.8 and weight decay."""
    e1, e2, beta1, decay = 1e-12, 1e-2, 0.8, 0.1

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x * x)))

    w = alone(start())
    slots: dict[str, Any] = {n: {"m": 0.0, "r": 0.0, "c": 0.0, "v": 0.0} for n in w}
    for step in range(STEPS):
        keep = 1 - (step + 1.0) ** -0.8
        for n, g in alone(gradients(step)).items():
            s, square = slots[n], g * g + e1
            if g.ndim == 2 and min(g.shape) >= 128:
                s["r"] = keep * s["r"] + (1 - keep) * square.mean(1)
                s["c"] = keep * s["c"] + (1 - keep) * square.mean(0)
                v = np.outer(s["r"], s["c"]) / s["r"].mean()
            else:
                v = s["v"] = keep * s["v"] + (1 - keep) * square
            x = g / np.sqrt(v)
            x = x / max(1.0, rms(x)) * max(rms(w[n]), e2) * LR
            s["m"] = beta1 * s["m"] + (1 - beta1) * x
            w[n] = w[n] - s["m"] - LR * decay * w[n]
    assert_same(trained(Adafactor(beta1, e1, e2), decay), w)


def test_adam_without_correction_equals_the_written_rule() -> None:
    """GPT-Neo's optimizers.py."""
    beta1, beta2, epsilon, decay = 0.9, 0.95, 1e-6, 0.1
    w = alone(start())
    m, v = ({n: 0.0 * x for n, x in w.items()} for _ in "mv")
    for step in range(STEPS):
        for n, g in alone(gradients(step)).items():
            m[n] = beta1 * m[n] + (1 - beta1) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g * g
            w[n] = w[n] - LR * (m[n] / (np.sqrt(v[n]) + epsilon) + decay * w[n])
    assert_same(trained(Adam(beta1, beta2, epsilon, bias_correction=False), decay), w)


def test_adafactor_keeps_rows_and_columns_where_both_are_long() -> None:
    slots = Adafactor().slots(SHAPES["matrix"])
    assert slots == {"vr": (L, A), "vc": (L, H, D)}
    assert Adafactor(0.9).slots(SHAPES["narrow"]).keys() == {"v", "m"}
    assert Adafactor().slots(SHAPES["vector"]) == {"v": (L, A)}
