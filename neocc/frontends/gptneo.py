"""Reads GPT-Neo's model configs (https://github.com/EleutherAI/gpt-neo) as they stand.

Facts about what each key did are from that repository's README and models/gpt2/gpt2.py,
optimizers.py and model_fns.py, and Mesh TensorFlow's transformer/attention.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neocc.ir.errors import NeoccError

ATTENTION = ("global", "local", "none", "linear", "conv")

# What this program reads.
MODEL_KEYS = {
    "n_layer", "n_embd", "n_head", "n_vocab", "n_ctx", "attention_types",
    "local_attention_radius", "embed_dropout", "attn_dropout", "res_dropout", "z_loss",
    "scale_by_depth", "scale_by_in", "precision", "recompute_grad", "train_batch_size",
    "opt_name", "lr", "lr_decay", "lr_decay_end", "warmup_steps", "train_steps", "beta1", "beta2",
    "epsilon", "weight_decay", "gradient_clipping", "mesh_shape", "layout",
    "activation_function", "tokens_per_mb_per_replica",
}  # fmt: skip
# What GPT-Neo's runs read beside the model: data, checkpoints, evaluation, TPU host loop.
RUN_KEYS = {
    "datasets", "dataset_configs", "model", "model_path", "eval_batch_size",
    "predict_batch_size", "eval_steps", "predict_steps", "iterations", "ada_epsilon1",
    "ada_epsilon2", "padding_id", "eos_id", "causal", "mode", "num_microbatches",
    "steps_per_checkpoint", "stop_at_token", "remove_partial_sequences", "sampling_use_entmax",
    "temperature", "top_k", "eval_tasks", "use_tpu", "num_cores", "no_dataset", "eot_token",
    "mlm_mask_id", "mlm_cls_token_id", "mlm_mask_prob", "mlm_same_token_prob",
    "mlm_random_token_prob", "mlm_mask_ignore_ids", "moe_params", "auto_layout",
    "auto_layout_and_mesh_shape", "share_parameters_dim",
}  # fmt: skip
# What would make another model: an error where set, nothing where it says what is so anyway.
UNSUPPORTED = {
    "activation_fn": "another activation than gelu",
    "axial_pos_emb": "axial positions",
    "rotary_emb": "rotary positions",
    "mlp_glu": "a gated mlp",
    "moe_layers": "mixture of experts",
    "num_mem_kv": "learned memory keys and values",
    "macaron": "macaron blocks",
    "rezero": "ReZero",
    "scalenorm": "ScaleNorm",
    "share_parameters": "parameters shared by all layers",
    "no_weight_tie": "an output matrix of its own",
    "mlm_training": "masked language modelling",
    "entmax_sampling": "entmax",
    "use_entmax": "entmax",
    "lightweight_conv_attention": "convolution in place of attention",
}
HARMLESS = (None, False, 0, [], "gelu", "gelu_new")
KNOWN = MODEL_KEYS | RUN_KEYS | set(UNSUPPORTED)
REQUIRED = ("n_layer", "n_embd", "n_head", "n_vocab")


@dataclass(frozen=True)
class GPTNeo:
    """What a config says. ``settings``: the fields of models/gpt.py's Config but its name;
    ``mesh`` and ``layout`` in Mesh TensorFlow's syntax, as written; ``notes`` for the report."""

    settings: dict[str, Any]
    mesh: str | None
    layout: str | None
    notes: tuple[str, ...]


def read(data: Mapping[str, Any]) -> GPTNeo:
    """Checks and translates a parsed config file.

    Raises:
        NeoccError: an unknown key (with the nearest known one), a key that is missing, of the
            wrong kind, or that asks for what is not supported.
    """
    if not isinstance(data, Mapping):
        raise NeoccError(f"a GPT-Neo config is a JSON object, not a {type(data).__name__}")
    for key, value in data.items():
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.0)[0]
            raise NeoccError(f"unknown config key {key!r}; the nearest known one is {near!r}")
        if key in UNSUPPORTED and value not in HARMLESS:
            raise NeoccError(f"{key} = {value!r} asks for {UNSUPPORTED[key]}: not supported yet")
    for key in REQUIRED:
        if data.get(key) is None:
            raise NeoccError(f"the config has no {key!r}, which every model needs")
    notes: list[str] = []
    layers = number(data, "n_layer", int, minimum=1)
    embd, heads = number(data, "n_embd", int, minimum=1), number(data, "n_head", int, minimum=1)
    if embd % heads:
        raise NeoccError(f"n_embd {embd} does not divide by n_head {heads}")
    types = attention(data.get("attention_types", [[["global"], layers]]), layers)
    flat = {t for pattern, _ in types for t in pattern}
    if "none" in flat:
        notes.append(
            "GPT-Neo added the residual stream to itself in a layer without attention: kept"
        )
    steps = number(data, "train_steps", int, 100_000, minimum=1)
    decay = data.get("lr_decay") or "constant"
    if decay not in ("cosine", "linear", "constant"):
        raise NeoccError(f"lr_decay {decay!r}; one of cosine, linear, or absent for constant")
    optimizer = str(data.get("opt_name", "adam")).lower()
    if optimizer != "adam":
        raise NeoccError(f"opt_name {optimizer!r} is not supported yet; adam is")
    precision = data.get("precision", "float32")
    if precision not in ("float32", "bfloat16"):
        raise NeoccError(f"precision {precision!r}; one of float32, bfloat16")
    weight_decay = number(data, "weight_decay", float, 0.0)
    if weight_decay:
        notes.append("weight decay spares norms and biases; GPT-Neo's name filter decayed ln_f's")
    clip = data.get("gradient_clipping")
    settings = {
        "layers": layers,
        "embd": embd,
        "heads": heads,
        "vocab": number(data, "n_vocab", int, minimum=1),
        "seq": number(data, "n_ctx", int, 2048, minimum=1),
        "batch": number(data, "train_batch_size", int, 256, minimum=1),
        "attention": types,
        "window": number(data, "local_attention_radius", int, 256, minimum=1),
        "scale_scores": False,
        "double_at_none": True,
        "embed_dropout": probability(data, "embed_dropout"),
        "attn_dropout": probability(data, "attn_dropout"),
        "res_dropout": probability(data, "res_dropout"),
        "z_loss": number(data, "z_loss", float, 1e-4),
        "dtype": "bf16" if precision == "bfloat16" else "f32",
        "recompute": bool(data.get("recompute_grad")),
        "neo_init": True,
        "scale_by_depth": bool(data.get("scale_by_depth")),
        "scale_by_in": bool(data.get("scale_by_in")),
        "lr": number(data, "lr", float, 6e-4),
        "lr_decay": decay,
        "warmup": number(data, "warmup_steps", int, 0),
        "steps": number(data, "lr_decay_end", int, steps, minimum=1),
        "beta1": number(data, "beta1", float, 0.9),
        "beta2": number(data, "beta2", float, 0.999),
        "epsilon": number(data, "epsilon", float, 1e-6),
        "bias_correction": False,
        "weight_decay": weight_decay,
        "clip": None if clip is None else number(data, "gradient_clipping", float),
    }
    activation = data.get("activation_function")
    if activation is not None:
        if activation not in ("gelu", "gelu_new"):
            raise NeoccError(f"activation_function {activation!r} is not supported yet; gelu is")
        notes.append("activation_function is honoured here; GPT-Neo read activation_fn instead")
    if data.get("tokens_per_mb_per_replica"):
        notes.append("tokens_per_mb_per_replica is not honoured: the batch runs as a whole")
    return GPTNeo(settings, text(data, "mesh_shape"), text(data, "layout"), tuple(notes))


def attention(types: Any, layers: int) -> tuple[tuple[tuple[str, ...], int], ...]:
    """``[[["global", "local"], 12]]`` as (pattern, times) pairs: each pattern its own shortest
    period, neighbours that are the same joined.

    Raises:
        NeoccError: another form, an unknown type, or not one type per layer.
    """
    found: list[tuple[tuple[str, ...], int]] = []
    for item in types if isinstance(types, list) else [types]:
        match item:
            case [[*names], int(times)] if names and times > 0:
                pass
            case _:
                raise NeoccError(
                    f"attention_types has {item!r}; it is a list like [[['global', 'local'], 12]]"
                )
        for name in names:
            if name not in ATTENTION:
                raise NeoccError(f"attention type {name!r}; one of {', '.join(ATTENTION)}")
            if name not in ("global", "local", "none"):
                raise NeoccError(f"attention type {name!r} is not supported yet")
        n = len(names)
        short = next(p for p in range(1, n + 1) if n % p == 0 and names == names[:p] * (n // p))
        pattern, times = tuple(names[:short]), times * (n // short)
        if found and found[-1][0] == pattern:
            times += found.pop()[1]
        found.append((pattern, times))
    total = sum(len(pattern) * times for pattern, times in found)
    if total != layers:
        raise NeoccError(f"attention_types describes {total} layers; n_layer is {layers}")
    return tuple(found)


def number(
    data: Mapping[str, Any], key: str, kind: type, default: Any = None, minimum: float = 0
) -> Any:
    value = data.get(key)
    value = default if value is None else value
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right or value < minimum:
        what = "an integer" if kind is int else "a number"
        raise NeoccError(f"{key} is {value!r}; it must be {what} of at least {minimum}")
    return kind(value)


def probability(data: Mapping[str, Any], key: str) -> float:
    value = number(data, key, float, 0.0)
    if value >= 1:
        raise NeoccError(f"{key} is {value!r}; a dropout rate is at least 0 and below 1")
    return value


def text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise NeoccError(f"{key} is {value!r}; it must be a string like 'x:8,y:16'")
    return value
