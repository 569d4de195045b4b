"""Hugging Face's GPT-Neo and GPT-2: their configs, and how their tensors are called.

Facts are those of transformers' models/gpt_neo and models/gpt2 (modeling and configuration): a
Linear's weight is [out, in], a Conv1D's [in, out]; GPT-2's ``c_attn`` is q, k and v side by side;
the output matrix is ``wte``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neocc.frontends.gptneo import attention
from neocc.frontends.weights.forms import LAYER, Form, Part
from neocc.ir.errors import NeoccError

PREFIX = "transformer."
# What gelu_new is called: all of them the tanh form.
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")

NORMS = {
    "ln1.g": "ln_1.weight", "ln1.b": "ln_1.bias", "ln2.g": "ln_2.weight", "ln2.b": "ln_2.bias",
}  # fmt: skip
MLP_BIASES = {"mlp.fc_b": "mlp.c_fc.bias", "mlp.proj_b": "mlp.c_proj.bias"}
MLP = {"mlp.fc": "mlp.c_fc.weight", "mlp.proj": "mlp.c_proj.weight"}
OUTSIDE = {
    "wte": "wte.weight", "wpe": "wpe.weight", "ln_f.g": "ln_f.weight", "ln_f.b": "ln_f.bias",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a family of models calls its tensors. ``as_is`` and ``transposed``: weights within a
    layer, by neocc's names; ``side_by_side``: by tensor, the weights that are its columns."""

    name: str
    architecture: str
    as_is: Mapping[str, str]
    transposed: Mapping[str, str]
    side_by_side: Mapping[str, tuple[str, ...]]


GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    NORMS | MLP_BIASES | {"attn.b": "attn.attention.out_proj.bias"},
    MLP
    | {f"attn.{n}": f"attn.attention.{n}_proj.weight" for n in "qkv"}
    | {"attn.o": "attn.attention.out_proj.weight"},
    {},
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    NORMS | MLP_BIASES | MLP | {"attn.o": "attn.c_proj.weight", "attn.b": "attn.c_proj.bias"},
    {},
    {
        "attn.c_attn.weight": ("attn.q", "attn.k", "attn.v"),
        "attn.c_attn.bias": ("attn.q_b", "attn.k_b", "attn.v_b"),
    },
)
FAMILIES = {f.name: f for f in (GPT_NEO, GPT2)}


@dataclass(frozen=True)
class HuggingFace:
    """A Hugging Face config as read: its family, and the fields of models/gpt.py's Config."""

    family: Family
    settings: dict[str, Any]


def read_config(data: Mapping[str, Any]) -> HuggingFace:
    """Raises:
    NeoccError: another architecture, or an option that models/gpt.py does not have.
    """
    kind = data.get("model_type")
    if kind not in FAMILIES:
        raise NeoccError(f"model_type is {kind!r}; neocc reads {' and '.join(FAMILIES)}")
    if data.get("tie_word_embeddings", True) is not True:
        raise NeoccError("tie_word_embeddings is false: an output matrix of its own is not read")
    if (eps := data.get("layer_norm_epsilon", 1e-5)) != 1e-5:
        raise NeoccError(f"layer_norm_epsilon is {eps}; models/gpt.py has 1e-05")
    if (activation := data.get("activation_function", "gelu_new")) not in TANH_GELU:
        raise NeoccError(f"activation_function {activation!r}; one of {', '.join(TANH_GELU)}")
    family = FAMILIES[kind]
    settings = neo_settings(data) if family is GPT_NEO else gpt2_settings(data)
    settings["dtype"] = "f32" if data.get("dtype", data.get("torch_dtype")) in WIDE else "bf16"
    return HuggingFace(family, settings)


WIDE = (None, "float32", "float64")


def neo_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    layers, embd = size(data, "num_layers", 24), size(data, "hidden_size", 2048)
    inner(data, "intermediate_size", embd)
    types = attention(data.get("attention_types", [[["global", "local"], 12]]), layers)
    for kind in (k for pattern, _ in types for k in pattern):
        if kind not in ("global", "local"):
            raise NeoccError(f"attention type {kind!r}: {GPT_NEO.architecture} has no such layers")
    return {
        "layers": layers,
        "embd": embd,
        "heads": size(data, "num_heads", 16),
        "vocab": size(data, "vocab_size", 50257),
        "seq": size(data, "max_position_embeddings", 2048),
        "attention": types,
        "window": size(data, "window_size", 256),
        "scale_scores": False,
        "qkv_bias": False,
        "neo_init": True,
        "embed_dropout": rate(data, "embed_dropout", 0.0),
        "attn_dropout": rate(data, "attention_dropout", 0.0),
        "res_dropout": rate(data, "resid_dropout", 0.0),
    }


def gpt2_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    embd = size(data, "n_embd", 768)
    inner(data, "n_inner", embd)
    if data.get("scale_attn_by_inverse_layer_idx"):
        raise NeoccError("scale_attn_by_inverse_layer_idx is set: models/gpt.py does not have it")
    if data.get("add_cross_attention"):
        raise NeoccError("add_cross_attention is set: models/gpt.py does not have it")
    return {
        "layers": size(data, "n_layer", 12),
        "embd": embd,
        "heads": size(data, "n_head", 12),
        "vocab": size(data, "vocab_size", 50257),
        "seq": size(data, "n_positions", 1024),
        "scale_scores": bool(data.get("scale_attn_weights", True)),
        "qkv_bias": True,
        "embed_dropout": rate(data, "embd_pdrop", 0.1),
        "attn_dropout": rate(data, "attn_pdrop", 0.1),
        "res_dropout": rate(data, "resid_pdrop", 0.1),
    }


def size(data: Mapping[str, Any], key: str, default: int) -> int:
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise NeoccError(f"{key} is {value!r}; it must be an integer of at least 1")
    return value


def rate(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise NeoccError(f"{key} is {value!r}; a dropout rate is at least 0 and below 1")
    return float(value)


def inner(data: Mapping[str, Any], key: str, embd: int) -> None:
    if data.get(key) not in (None, 4 * embd):
        raise NeoccError(f"{key} is {data[key]!r}; models/gpt.py has 4 x {embd}")


def write_config(c: Any, dtype: str) -> tuple[Family, dict[str, Any]]:
    """The Hugging Face config of a model with the Config ``c``: GPT-Neo where attention scores are
    not scaled, GPT-2 where they are. ``dtype``: of the weights, in PyTorch's words.

    Whether it is the same model is for the caller to check: options that Hugging Face's configs
    have no word for are left out here.
    """
    family = GPT2 if c.scale_scores else GPT_NEO
    either = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": c.vocab,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if c.vocab == 50257:
        either |= {"bos_token_id": 50256, "eos_token_id": 50256}
    if family is GPT2:
        return family, either | {
            "n_layer": c.layers,
            "n_embd": c.embd,
            "n_head": c.heads,
            "n_positions": c.seq,
            "embd_pdrop": c.embed_dropout,
            "attn_pdrop": c.attn_dropout,
            "resid_pdrop": c.res_dropout,
        }
    return family, either | {
        "num_layers": c.layers,
        "hidden_size": c.embd,
        "num_heads": c.heads,
        "max_position_embeddings": c.seq,
        "attention_types": [[list(types), times] for types, times in c.pattern],
        "window_size": c.window,
        "embed_dropout": c.embed_dropout,
        "attention_dropout": c.attn_dropout,
        "resid_dropout": c.res_dropout,
    }


def tensor_form(family: Family, weights: Mapping[str, tuple[int, ...]]) -> Form:
    """The form of a family's checkpoint of a model with these weights, each [in, out] or [n].

    Raises:
        NeoccError: the family has no tensor for one of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    columns = {w: (t, ws) for t, ws in family.side_by_side.items() for w in ws}
    for name, shape in weights.items():
        layer = LAYER.fullmatch(name)
        head, own = (f"{PREFIX}h.{layer[1]}.", layer[2]) if layer else (PREFIX, name)
        if layer is None and own in OUTSIDE:
            part = Part(head + OUTSIDE[own])
        elif layer and own in family.as_is:
            part = Part(head + family.as_is[own])
        elif layer and own in family.transposed:
            part = Part(head + family.transposed[own], transposed=True)
        elif layer and own in columns:
            tensor, beside = columns[own]
            before = beside[: beside.index(own)]
            column = sum(weights[f"h{layer[1]}.{w}"][-1] for w in before)
            part = Part(head + tensor, column=column)
            width = sum(weights[f"h{layer[1]}.{w}"][-1] for w in beside)
            shape = (*shape[:-1], width)
        else:
            raise NeoccError(f"{family.architecture} has no tensor for the weight {name!r}")
        parts[name] = part
        shapes[part.tensor] = shape[::-1] if part.transposed else shape
    return Form(shapes, parts, dict(weights))
