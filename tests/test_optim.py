"""The learning rate, clipping and norms as numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.ir.builder import Graph
from neocc.ir.types import Dim
from neocc.optim import clip_scale, global_norm, learning_rate
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
