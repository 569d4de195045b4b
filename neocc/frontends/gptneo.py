"""Reads GPT-Neo's model configs (https://github.com/EleutherAI/gpt-neo) as they stand.

Facts about what each key did are from that repository's README and models/gpt2/gpt2.py,
optimizers.py and model_fns.py, and Mesh TensorFlow's transformer/attention.py and moe.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from neocc.ir.errors import NeoccError
from neocc.nn import Experts, Masking, Routing, check_activation, check_experts

ATTENTION = ("global", "local", "linear", "none")
OPTIMIZERS = ("adam", "adafactor")

# What this program reads.
MODEL_KEYS = {
    "n_layer", "n_embd", "n_head", "n_vocab", "n_ctx", "attention_types",
    "local_attention_radius", "embed_dropout", "attn_dropout", "res_dropout", "z_loss",
    "scale_by_depth", "scale_by_in", "precision", "recompute_grad", "train_batch_size",
    "activation_function", "activation_fn", "axial_pos_emb", "rotary_emb", "mlp_glu",
    "scalenorm", "rezero", "macaron", "num_mem_kv", "share_parameters", "no_weight_tie",
    "entmax_loss", "mlm_training", "mlm_mask_id", "mlm_cls_token_id", "mlm_mask_prob",
    "mlm_same_token_prob", "mlm_random_token_prob", "mlm_mask_ignore_ids", "padding_id",
    "opt_name", "lr", "lr_decay", "lr_decay_end", "warmup_steps", "train_steps", "beta1", "beta2",
    "epsilon", "ada_epsilon1", "ada_epsilon2", "weight_decay", "gradient_clipping",
    "mesh_shape", "layout", "tokens_per_mb_per_replica",
    "moe_layers", "moe_params", "moe_activation",
}  # fmt: skip
# What GPT-Neo's runs read beside the model: data, checkpoints, evaluation, TPU host loop.
RUN_KEYS = {
    "datasets", "dataset_configs", "model", "model_path", "eval_batch_size",
    "predict_batch_size", "eval_steps", "predict_steps", "iterations", "eos_id", "causal", "mode",
    "num_microbatches", "steps_per_checkpoint", "stop_at_token", "remove_partial_sequences",
    "sampling_use_entmax", "temperature", "top_k", "eval_tasks", "use_tpu", "num_cores",
    "no_dataset", "eot_token", "seed", "auto_layout", "auto_layout_and_mesh_shape",
    "share_parameters_dim",
}  # fmt: skip
# What would make another model: an error where set, nothing where it says what is so anyway.
UNSUPPORTED = {
    "lightweight_conv_attention": "convolution in place of attention",
}
# Keys of moe_params that are read, and those that ask for what is not supported where set.
MOE_KEYS = {
    "moe_num_experts", "moe_hidden_size", "moe_group_size", "moe_gating", "moe_loss_coef",
    "moe_top_n_num_experts_per_token", "moe_capacity_factor_train", "moe_capacity_factor_eval",
    "moe_min_expert_capacity", "moe_use_second_place_loss", "moe_second_policy_train",
    "moe_second_policy_eval", "moe_second_threshold_train", "moe_second_threshold_eval",
    "moe_dropout_rate", "moe_z_loss", "moe_switch_policy_train", "moe_switch_policy_eval",
    "moe_switch_dropout", "moe_switch_temperature", "moe_switch_jitter", "moe_ntlb_top_k",
}  # fmt: skip
MOE_UNREAD = {"moe_capacity_factor_second_level"}  # of other kinds of layers
MOE_UNSUPPORTED = {
    "moe_use_experts_attention": "queries and keys of experts",
    "moe_output_dim": "another size of the output",
    "moe_word_embed_mode": "routing by word embeddings",
    "moe_use_second_place_expert_prob": "experts other than the first at random",
    "moe_use_second_place_expert_prob_temp": "experts other than the first at random",
}
HARMLESS = (None, False, 0, [])
KNOWN = MODEL_KEYS | RUN_KEYS | set(UNSUPPORTED)
REQUIRED = ("n_layer", "n_embd", "n_head", "n_vocab")


@dataclass(frozen=True)
class GPTNeo:
    """What a config says. ``settings``: the fields of models/gpt.py's Config but its name;
    ``mesh`` and ``layout`` in Mesh TensorFlow's syntax, as written; ``tokens``: of a microbatch on
    each replica of the model; ``notes`` for the report."""

    settings: dict[str, Any]
    mesh: str | None
    layout: str | None
    tokens: int | None
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
            raise unknown("config key", key, KNOWN)
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
    optimizer = str(data.get("opt_name") or "adam").lower()
    if optimizer not in OPTIMIZERS:
        raise NeoccError(f"opt_name {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    if optimizer == "adafactor":
        notes.append(
            "Adafactor follows lr_decay and warmup_steps, and weight_decay decays weights; GPT-Neo "
            "gave it a constant lr, and weight_decay as the decay rate of its second moments"
        )
    precision = data.get("precision", "float32")
    if precision not in ("float32", "bfloat16"):
        raise NeoccError(f"precision {precision!r}; one of float32, bfloat16")
    weight_decay = number(data, "weight_decay", float, 0.0)
    if weight_decay and optimizer == "adam":
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
        "optimizer": optimizer,
        "beta1": number(data, "beta1", float, 0.9 if optimizer == "adam" else 0.0),
        "beta2": number(data, "beta2", float, 0.999),
        "epsilon": number(data, "epsilon", float, 1e-6),
        "ada_epsilon1": number(data, "ada_epsilon1", float, 1e-30),
        "ada_epsilon2": number(data, "ada_epsilon2", float, 1e-3),
        "bias_correction": False,
        "weight_decay": weight_decay,
        "clip": None if clip is None else number(data, "gradient_clipping", float),
    }
    settings |= architecture(data, notes) | objective(data, notes) | mixture(data, layers, notes)
    tokens = None
    if data.get("tokens_per_mb_per_replica"):
        tokens = number(data, "tokens_per_mb_per_replica", int, minimum=1)
    mesh, layout = text(data, "mesh_shape"), text(data, "layout")
    return GPTNeo(settings, mesh, layout, tokens, tuple(notes))


def architecture(data: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Settings of the model's blocks; what GPT-Neo did otherwise is added to ``notes``."""
    activation = data.get("activation_fn") or data.get("activation_function") or "gelu"
    if not isinstance(activation, str):
        raise NeoccError(f"activation_fn is {activation!r}; it must be a name like 'gelu'")
    check_activation(activation)
    if data.get("activation_function") is not None:
        notes.append(
            "activation_function is honoured here; GPT-Neo read activation_fn instead"
            if data.get("activation_fn") is None
            else "activation_fn counts, as in GPT-Neo, and activation_function does not"
        )
    rotary, axial = flag(data, "rotary_emb"), axial_sides(data)
    if rotary and axial:
        notes.append("rotary_emb goes before axial_pos_emb, as in GPT-Neo")
    if data.get("rotary_emb") is not None and not rotary:
        notes.append("rotary_emb false is off; in GPT-Neo any value switched it on")
    rezero, scalenorm = flag(data, "rezero"), flag(data, "scalenorm")
    if rezero and scalenorm:
        notes.append("rezero goes before scalenorm, as in GPT-Neo")
    glu, memory = flag(data, "mlp_glu"), number(data, "num_mem_kv", int, 0)
    if glu:
        notes.append("GPT-Neo's mlp_glu did not run: it lacked an argument of its own linear layer")
    if memory:
        notes.append("GPT-Neo's num_mem_kv did not run: its mask had no room for them. As meant, "
                     "every query of a global layer sees them")  # fmt: skip
    return {
        "activation": activation,
        "positions": "rotary" if rotary else "axial" if axial else "learned",
        "axial": axial or (0, 0),
        "norm": "rezero" if rezero else "scale" if scalenorm else "layer",
        "glu": glu,
        "macaron": flag(data, "macaron"),
        "mem_kv": memory,
        "share": flag(data, "share_parameters"),
        "tied": not flag(data, "no_weight_tie"),
    }


def objective(data: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Settings of the loss; what GPT-Neo did otherwise is added to ``notes``."""
    entmax = flag(data, "entmax_loss")
    if entmax:
        notes.append(
            "entmax_loss is the loss of that name, whose gradient is p - onehot; GPT-Neo's -log p "
            "was not a number as soon as one p was 0"
        )
    if not flag(data, "mlm_training"):
        return {"entmax": entmax, "masking": None}
    vocab = number(data, "n_vocab", int, minimum=1)

    def token(key: str) -> int:
        value = number(data, key, int, minimum=0)
        if value >= vocab:
            raise NeoccError(f"{key} is {value}; n_vocab is {vocab}")
        return value

    if data.get("mlm_mask_id") is None:
        raise NeoccError("mlm_training needs 'mlm_mask_id', the token that hides others")
    ignore = data.get("mlm_mask_ignore_ids") or []
    if not isinstance(ignore, list) or not all(type(i) is int for i in ignore):
        raise NeoccError(f"mlm_mask_ignore_ids is {ignore!r}; it must be a list of integers")
    same = number(data, "mlm_same_token_prob", float, 0.1)
    drawn = number(data, "mlm_random_token_prob", float, 0.0)
    rate = number(data, "mlm_mask_prob", float, 0.15)
    if rate > 1 or same + drawn > 1:
        raise NeoccError(
            f"mlm_mask_prob {rate}, mlm_same_token_prob {same} and mlm_random_token_prob {drawn}: "
            "the first is at most 1, and so are the other two together"
        )
    notes.append(
        "masked tokens are the ones that count in the loss, only they are replaced at random, and "
        "every layer looks both ways; GPT-Neo counted the others, and its global layers did not run"
    )
    masking = Masking(
        mask=token("mlm_mask_id"),
        rate=rate,
        same=same,
        random=drawn,
        cls=None if data.get("mlm_cls_token_id") is None else token("mlm_cls_token_id"),
        ignore=tuple(ignore),
        padding=token("padding_id") if data.get("padding_id") is not None else 0,
    )
    return {"entmax": entmax, "masking": masking}


def mixture(data: Mapping[str, Any], layers: int, notes: list[str]) -> dict[str, Any]:
    """Settings of the mixture of experts. ``moe_params`` is checked also where no layer is one."""
    given = data.get("moe_params")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise NeoccError(
            f"moe_params is {given!r}; it must be an object like {{'moe_gating': ...}}"
        )
    known = MOE_KEYS | MOE_UNREAD | set(MOE_UNSUPPORTED)
    for key, value in given.items():
        if key not in known:
            raise unknown("key of moe_params", key, known)
        if key in MOE_UNSUPPORTED and value not in HARMLESS:
            what = MOE_UNSUPPORTED[key]
            raise NeoccError(f"{key} = {value!r} asks for {what}: not supported yet")
    activation = data.get("moe_activation") or "relu"
    if not isinstance(activation, str):
        raise NeoccError(f"moe_activation is {activation!r}; it must be a name like 'relu'")
    check_activation(activation)
    gating = given.get("moe_gating") or "top_2"

    def routing(mode: str, capacity: float) -> Routing:
        return Routing(
            capacity=number(given, f"moe_capacity_factor_{mode}", float, capacity),
            policy=str(given.get(f"moe_second_policy_{mode}") or "random"),
            threshold=number(given, f"moe_second_threshold_{mode}", float, 0.2),
            switch=str(given.get(f"moe_switch_policy_{mode}") or "input_jitter"),
        )

    each = number(given, "moe_top_n_num_experts_per_token", int, 3, minimum=1)
    next_ones = number(given, "moe_ntlb_top_k", int, 4, minimum=1)
    temperature = number(given, "moe_switch_temperature", float, 1.0)
    experts = Experts(
        count=number(given, "moe_num_experts", int, 16, minimum=1),
        hidden=number(given, "moe_hidden_size", int, 4096, minimum=1),
        gating=gating,
        choices={"top_2": 2, "top_n": each, "ntlb": next_ones}.get(gating, 1),
        group=number(given, "moe_group_size", int, 1024, minimum=1),
        least=number(given, "moe_min_expert_capacity", int, 1, minimum=1),
        activation=activation,
        dropout=probability(given, "moe_dropout_rate"),
        loss=number(given, "moe_loss_coef", float, 1e-2),
        second_loss=flag(given, "moe_use_second_place_loss"),
        z_loss=number(given, "moe_z_loss", float, 0.0),
        jitter=number(given, "moe_switch_jitter", float, 1e-2),
        input_dropout=number(given, "moe_switch_dropout", float, 0.1),
        temperature=temperature or 1.0,
        routing=routing("train", 1.25),
        evaluating=routing("eval", 2.0),
    )
    check_experts(experts)
    chosen = data.get("moe_layers") or []
    if not isinstance(chosen, list) or not all(type(i) is int for i in chosen):
        raise NeoccError(f"moe_layers is {chosen!r}; it must be a list of integers")
    if wrong := [i for i in chosen if not 0 <= i < layers]:
        raise NeoccError(f"moe_layers has {wrong[0]}; layers are 0 to {layers - 1}")
    if not chosen:
        return {"moe_layers": (), "experts": None}
    notes.append(
        "experts take their tokens from groups that lie in one sequence, of the same size on every "
        "mesh; GPT-Neo's groups depended on the mesh"
    )
    return {"moe_layers": tuple(sorted(set(chosen))), "experts": experts}


def microbatches(batch: int, seq: int, tokens: int, replicas: int) -> int:
    """Parts of a batch such that each holds at most ``tokens`` on each of the replicas that the
    batch is cut into, or one sequence: Mesh TensorFlow's serialize_num_microbatches. Where the
    batch does not divide by the replicas, by as many of them as it does."""
    each = batch // math.gcd(batch, replicas)
    size = min(each, max(1, tokens // seq))
    while each % size:
        size -= 1
    return each // size


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


def axial_sides(data: Mapping[str, Any]) -> tuple[int, int] | None:
    match data.get("axial_pos_emb"):
        case None | False:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            seq = number(data, "n_ctx", int, 2048, minimum=1)
            if rows * columns < seq:
                have = rows * columns
                raise NeoccError(f"axial_pos_emb {rows} x {columns} is {have}; n_ctx is {seq}")
            return rows, columns
        case value:
            raise NeoccError(
                f"axial_pos_emb is {value!r}; it must be two integers, whose product is n_ctx"
            )


def unknown(what: str, key: str, known: Collection[str]) -> NeoccError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return NeoccError(f"unknown {what} {key!r}; the nearest known one is {near!r}")


def flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value not in (None, False, True):
        raise NeoccError(f"{key} is {value!r}; it must be true or false")
    return bool(value)


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
