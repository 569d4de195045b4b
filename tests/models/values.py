"""What the tests of models/gpt.py start from: data, and parameters off their symmetric values."""

from __future__ import annotations

from typing import Any

import numpy as np

from models import gpt
from models.gpt import Config
from tests.numpy_executor import run_numpy


def batch(c: Config, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, c.vocab, (c.batch, c.seq + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def start(c: Config, seed: int = 0, push: float = 0.1) -> dict[str, np.ndarray]:
    """Initial parameters and state, pushed off the symmetric values that hide mistakes."""
    rng = np.random.default_rng(seed)
    made = run_numpy(gpt.init(c), {"seed": np.uint32(seed)})
    for n in gpt.weights(c):
        made[n] = made[n] + push * rng.standard_normal(made[n].shape).astype(made[n].dtype)
    return made


def parameters(c: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {n: values[n] for n in gpt.weights(c)}
