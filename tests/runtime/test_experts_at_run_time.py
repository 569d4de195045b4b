"""Models with mixtures of experts are sampled and scored: as without a cache, on every mesh."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import gpt
from models.gpt import PRESETS
from neocc.cost.hardware import chip
from neocc.frontends.weights.load import loaded
from neocc.ir.mesh import Mesh
from neocc.nn import Experts, Routing
from neocc.runtime.checkpoint import ModelOf
from neocc.runtime.choose import Choice
from neocc.runtime.evaluate import Piece, Scorer
from neocc.runtime.generate import Sampler
from neocc.runtime.state import save
from tests.models.values import parameters, start
from tests.numpy_executor import run_numpy

# Second choices come at random, also where a text is continued: GPT-Neo's default.
EXPERTS = Experts(4, 24, group=8, activation="gelu", evaluating=Routing(2.0, threshold=0.6))
CONFIG = replace(
    PRESETS["tiny"], name="mixed", layers=3, vocab=31, embd=16, heads=2, seq=20, batch=4,
    positions="rotary", moe_layers=(0, 2), experts=EXPERTS,
)  # fmt: skip
LAYOUTS = {"1": "", "2x4": "batch:x,experts:y,vocab:y"}
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8], [9, 7, 9]]
NEW = 8


@functools.cache
def state() -> dict[str, Any]:
    return start(CONFIG, push=0.4)


def checkpoint(folder: str) -> Path:
    path = Path(folder) / "mixed"
    source = ModelOf("gpt.py", "mixed", dataclasses.asdict(CONFIG))
    save(path, source, gpt.train_step(CONFIG), state(), 0)
    return path


MESHES = [pytest.param("1", marks=pytest.mark.slow), "2x4"]


@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_equals_the_model_without_a_cache(mesh: str) -> None:
    """Each prompt alone, all of it run again for each token."""
    w = parameters(CONFIG, state())
    with tempfile.TemporaryDirectory() as folder, loaded(checkpoint(folder)) as (model, saved):
        made = Sampler(model, saved, Mesh.parse(mesh), chip("v5e"), 4, 8, NEW, LAYOUTS[mesh])
        found: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
        for token in made.generate(PROMPTS, Choice(temperature=0)):
            found[token.sequence].append(token.token)
    for i, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(NEW):
            program = gpt.prefill(replace(CONFIG, batch=1), len(text), len(text))
            data = {
                "tokens": np.array([text], np.int32),
                "lengths": np.array([len(text)], np.int32),
            }
            text.append(int(run_numpy(program, w | data)["logits"][0].argmax()))
        assert found[i] == text[len(prompt) :]
    assert len({tuple(t) for t in found.values()}) > 1


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_are_the_same_on_every_mesh_and_beside_any_padding(mesh: str) -> None:
    w = parameters(CONFIG, state())
    pieces = [Piece([3], [5, 9, 2]), Piece([1, 2, 3, 4, 5], [6]), Piece([7, 7], [7] * 18)]
    with tempfile.TemporaryDirectory() as folder, loaded(checkpoint(folder)) as (model, saved):
        scorer = Scorer(model, saved, Mesh.parse(mesh), chip("v5e"), 4, LAYOUTS[mesh])
        scores = scorer.score(pieces)
    for piece, score in zip(pieces, scores, strict=True):
        line = np.array([[*piece.context, *piece.tokens]], np.int32)
        data = {"tokens": line[:, :-1], "labels": line[:, 1:]}
        alone = replace(CONFIG, batch=1)
        logp = run_numpy(gpt.score(alone, line.shape[1] - 1), w | data)["logp"]
        assert score.logp == pytest.approx(logp[0, len(piece.context) - 1 :].sum(), rel=1e-4)
