"""Conversions against transformers itself: its models' logits, and its reading of what we write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neocc.frontends.weights.convert import convert
from neocc.frontends.weights.hf_folder import open_folder
from tests.frontends import on_mesh
from tests.frontends.hf_models import random_model

missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"{' and '.join(missing)} not installed: pip install 'neocc[hf]' torch"
)

# Several shapes: odd vocabularies, one head, windows below and above the context, other patterns.
MODELS: dict[str, dict[str, Any]] = {
    "neo": {
        "vocab_size": 97, "max_position_embeddings": 24, "hidden_size": 32, "num_layers": 4,
        "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5,
    },
    "neo-global": {
        "vocab_size": 64, "max_position_embeddings": 16, "hidden_size": 48, "num_layers": 2,
        "num_heads": 1, "attention_types": [[["global"], 2]], "window_size": 256,
    },
    "neo-mixed": {
        "vocab_size": 101, "max_position_embeddings": 40, "hidden_size": 24, "num_layers": 5,
        "num_heads": 3, "attention_types": [[["global"], 1], [["local", "global"], 2]],
        "window_size": 1,
    },
    "gpt2": {"vocab_size": 97, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt2-odd": {"vocab_size": 53, "n_positions": 17, "n_embd": 30, "n_layer": 1, "n_head": 5},
    "gpt2-other": {
        "vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2,
        "activation_function": "gelu_pytorch_tanh",
    },
}  # fmt: skip


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_and_the_way_back_is_bit_exact(name: str, tmp_path: Path):
    import transformers

    model = random_model(name, MODELS[name])
    shard = "20KB" if name == "neo" else "5GB"
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    seq = model.config.max_position_embeddings
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (4, seq))
    wanted = their_logits(model, tokens)
    assert wanted.std() > 1
    convert(tmp_path / "theirs", tmp_path / "ours", "neocc")
    for mesh in on_mesh.LAYOUTS:
        found = on_mesh.logits(tmp_path / "ours", tokens, mesh)
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0, err_msg=mesh)

    convert(tmp_path / "ours", tmp_path / "back", "hf", most=30_000)
    before, after = open_folder(tmp_path / "theirs")[1], open_folder(tmp_path / "back")[1]
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].read().tobytes() == after[tensor].read().tobytes(), tensor
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(loaded) is type(model)
    # gelu_pytorch_tanh comes back as gelu_new, the same formula in other steps.
    atol = 0 if model.config.activation_function == "gelu_new" else 1e-5
    np.testing.assert_allclose(their_logits(loaded.eval(), tokens), wanted, atol=atol, rtol=0)


def test_what_neocc_trained_is_the_same_model_in_transformers(tmp_path: Path):
    """A GPT-2 without biases of q, k, v, and moments that stay behind."""
    import transformers

    from models import gpt
    from neocc.ir.types import DTYPES
    from neocc.runtime import ModelOf, whole, write_checkpoint
    from neocc.runtime.safetensors import Planned

    config = gpt.TINY
    program = gpt.train_step(config)
    types = {i.name: v.type for i, v in program.named_inputs if i.role != "data"}
    rng = np.random.default_rng(3)
    state = {
        n: np.asarray(0.3 * rng.standard_normal(t.shape)).astype(DTYPES[t.dtype])
        for n, t in types.items()
    }
    dims = {n: [(d.name, d.size) for d in t.dims] for n, t in types.items()}
    planned = [Planned(n, state[n].dtype, state[n].shape) for n in types]
    with whole(tmp_path / "ours") as folder:
        fields = {k: getattr(config, k) for k in config.__dataclass_fields__}
        model = ModelOf("gpt.py", "tiny", fields)
        write_checkpoint(folder, model, 5, planned, dims, lambda t: iter([state[t.name]]))
    done = convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    assert len(done.notes) == 2
    tokens = np.random.default_rng(1).integers(0, 64, (4, 16))
    found = on_mesh.logits(tmp_path / "ours", tokens, "1x1")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    np.testing.assert_allclose(their_logits(loaded, tokens), found, atol=1e-4)
