"""Hugging Face's GPT-Neo and GPT-2 as random tensors in their layout, and a plain forward pass.

Written from the facts of transformers' modeling files, in numpy: no torch is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from neocc.runtime.safetensors import Planned, write_file

NEO: dict[str, Any] = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 61,
    "max_position_embeddings": 16,
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 5,
    "intermediate_size": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "float32",
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 61,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "float32",
}
CONFIGS = {"gpt_neo": NEO, "gpt2": GPT2}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the names of the model without a head."""
    neo = config["model_type"] == "gpt_neo"
    e, layers = (
        config[k] for k in (("hidden_size", "num_layers") if neo else ("n_embd", "n_layer"))
    )
    seq = config["max_position_embeddings" if neo else "n_positions"]
    found = {"wte.weight": (config["vocab_size"], e), "wpe.weight": (seq, e)}
    for i in range(layers):
        found |= {
            f"h.{i}.{n}": (e,) for n in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
        }
        found |= {f"h.{i}.mlp.c_fc.bias": (4 * e,), f"h.{i}.mlp.c_proj.bias": (e,)}
        if neo:
            own = {f"attn.attention.{n}_proj.weight": (e, e) for n in ("q", "k", "v", "out")}
            own |= {"attn.attention.out_proj.bias": (e,)}
            own |= {"mlp.c_fc.weight": (4 * e, e), "mlp.c_proj.weight": (e, 4 * e)}
        else:
            own = {"attn.c_attn.weight": (e, 3 * e), "attn.c_attn.bias": (3 * e,)}
            own |= {"attn.c_proj.weight": (e, e), "attn.c_proj.bias": (e,)}
            own |= {"mlp.c_fc.weight": (e, 4 * e), "mlp.c_proj.weight": (4 * e, e)}
        found |= {f"h.{i}.{n}": shape for n, shape in own.items()}
    return found | {"ln_f.weight": (e,), "ln_f.bias": (e,)}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random ones, norms and biases too, by the names of a model with a head."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes(config).items():
        array = 0.3 * rng.standard_normal(shape) + ("ln_" in name and name.endswith("weight"))
        made[f"transformer.{name}"] = array.astype(np.float32)
    return made


def write(
    folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], file: str = "model"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    planned = [Planned(n, a.dtype, a.shape) for n, a in arrays.items()]
    write_file(folder / f"{file}.safetensors", planned, lambda t: iter([arrays[t.name]]))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(config: dict[str, Any], w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """tokens[batch, seq] -> logits[batch, seq, vocab], in float64."""
    w = {n.removeprefix("transformer."): a.astype(np.float64) for n, a in w.items()}
    neo = config["model_type"] == "gpt_neo"
    heads = config["num_heads" if neo else "n_head"]
    if neo:
        kinds = [k for types, times in config["attention_types"] for k in types * times]
    else:
        kinds = ["global"] * config["n_layer"]
    batch, seq = tokens.shape

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:seq]
    i, j = np.arange(seq)[:, None], np.arange(seq)[None, :]
    for layer, kind in enumerate(kinds):
        own = {
            n.removeprefix(f"h.{layer}."): a for n, a in w.items() if n.startswith(f"h.{layer}.")
        }
        a = norm(x, f"h.{layer}.ln_1")
        if neo:
            q, k, v = (a @ own[f"attn.attention.{n}_proj.weight"].T for n in "qkv")
        else:
            q, k, v = np.split(a @ own["attn.c_attn.weight"] + own["attn.c_attn.bias"], 3, -1)
        q, k, v = (t.reshape(batch, seq, heads, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
        scores = q @ k.transpose(0, 1, 3, 2)
        if not neo:
            scores = scores / np.sqrt(q.shape[-1])
        seen = (j <= i) & ((kind == "global") | (i - j < config.get("window_size", 256)))
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, seq, -1)
        if neo:
            mixed = mixed @ own["attn.attention.out_proj.weight"].T
            x = x + mixed + own["attn.attention.out_proj.bias"]
        else:
            x = x + mixed @ own["attn.c_proj.weight"] + own["attn.c_proj.bias"]
        fc, proj = own["mlp.c_fc.weight"], own["mlp.c_proj.weight"]
        fc, proj = (fc.T, proj.T) if neo else (fc, proj)
        h = norm(x, f"h.{layer}.ln_2") @ fc + own["mlp.c_fc.bias"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ proj + own["mlp.c_proj.bias"]
    return norm(x, "ln_f") @ w["wte.weight"].T


def random_model(name: str, config: dict[str, Any]) -> Any:
    """transformers' own GPT-Neo (a name that begins so) or GPT-2, with random weights wider than
    its own: norms and biases too, and what is greedy does not soon repeat itself."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"bos_token_id": None, "eos_token_id": None, **config}
    if name.startswith("neo"):
        made = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes))
    else:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made.eval()
