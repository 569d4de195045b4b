"""Greedy generation against transformers' own generate, token by token."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neocc.cost.hardware import chip
from neocc.frontends.weights.load import loaded
from neocc.ir.mesh import Mesh
from neocc.runtime.choose import Choice
from neocc.runtime.generate import Sampler
from tests.frontends.hf_models import random_model

missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{' and '.join(missing)} not installed: pip install 'neocc[hf]' torch"
)
NEW, COUNT, LONGEST = 64, 20, 40
MODELS: dict[str, dict[str, Any]] = {
    # Windows that end inside the prompts, and one that ends in what is generated.
    "neo": {
        "vocab_size": 97, "max_position_embeddings": 128, "hidden_size": 32, "num_layers": 4,
        "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8,
    },
    "neo-far": {
        "vocab_size": 101, "max_position_embeddings": 112, "hidden_size": 48, "num_layers": 3,
        "num_heads": 6, "attention_types": [[["local"], 3]], "window_size": 48,
    },
    "gpt2": {"vocab_size": 97, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4},
}  # fmt: skip


def theirs(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    import torch

    found = []
    for prompt in prompts:
        # Without a mask it would take the prompt's zeros for padding.
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
        out = model.generate(**given, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers_token_by_token(name: str, tmp_path: Path):
    model = random_model(name, MODELS[name])
    model.save_pretrained(tmp_path / "theirs")
    rng = np.random.default_rng(7)
    vocab = model.config.vocab_size
    prompts = [rng.integers(0, vocab, n).tolist() for n in rng.integers(1, LONGEST + 1, COUNT)]
    wanted = theirs(model, prompts)
    assert len({t for text in wanted for t in text}) > 30
    assert all(len(text) == NEW for text in wanted)
    with loaded(tmp_path / "theirs") as (found, saved):
        for mesh, layout in (("1x1", ""), ("2x4", "batch:x,heads:y,mlp:y,vocab:y"), ("2x4", "")):
            made = Sampler(found, saved, Mesh.parse(mesh), chip("v5e"), COUNT, LONGEST, NEW, layout)
            texts: list[list[int]] = [[] for _ in prompts]
            for token in made.generate(prompts, Choice(temperature=0)):
                texts[token.sequence].append(token.token)
            assert texts == wanted, (mesh, layout)
