"""GPT-Neo's configs as they stand, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import gpt
from neocc.frontends import gptneo
from neocc.ir.errors import NeoccError
from neocc.nn import Experts, Masking, Routing

CONFIGS = Path(__file__).resolve().parents[3] / "shared/data/gptneo_configs"
COUNTS = {
    "gpt2_small": 124_412_160,
    "gpt3_small_256": 125_234_688,
    "gpt3_PAR_small_256": 141_771_264,
    "gpt3_medium_256": 355_846_144,
    "gpt3_large_256": 760_261_632,
    "gpt3_XL_256_Pile": 1_315_575_808,
    "gpt3_2-7B_256": 2_651_307_520,
    "gpt3_6-7B_256": 6_658_011_136,
    "gpt3_13B_256": 12_852_771_840,
    "gpt3_13B_256_Pile": 12_852_771_840,
}
PAR: dict[str, Any] = {
    "n_head": 12,
    "n_vocab": 50304,
    "n_embd": 768,
    "n_ctx": 2048,
    "n_layer": 19,
    "attention_types": [[["global", "none", "none"], 5], [["none"], 4]],
    "train_batch_size": 256,
    "lr": 0.0006,
    "lr_decay": "cosine",
    "train_steps": 572300,
    "warmup_steps": 3000,
    "weight_decay": 0.10,
    "res_dropout": 0.1,
    "activation_function": "gelu",
    "mesh_shape": "x:64,y:4",
    "layout": "batch:x,heads:y,vocab:y,intermediate_expanded:y",
    "datasets": [["pile", 25, "documents_random", 1.0]],
    "recompute_grad": False,
    "gradient_clipping": 1.0,
}


def test_a_config_becomes_the_settings_of_the_model() -> None:
    read = gptneo.read(PAR)
    c = gpt.config_from_gptneo(PAR, "par")
    assert gpt.train_step(c).parameter_count == 141_771_264
    assert (read.mesh, read.layout) == (PAR["mesh_shape"], PAR["layout"])
    assert (c.name, c.layers, c.batch, c.lr, c.steps, c.dtype) == (
        "par",
        19,
        256,
        6e-4,
        572300,
        "f32",
    )
    assert c.attention == ((("global", "none", "none"), 5), (("none",), 4))
    assert (c.scale_scores, c.bias_correction, c.neo_init) == (False, False, True)
    assert (c.res_dropout, c.attn_dropout, c.clip, c.weight_decay) == (0.1, 0.0, 1.0, 0.1)
    assert any("activation_fn" in note for note in read.notes)
    assert any("without attention" in note for note in read.notes)


def test_small_models_have_their_exact_count() -> None:
    data = {"n_layer": 12, "n_embd": 768, "n_head": 6, "n_vocab": 50257, "n_ctx": 1024}
    assert gpt.train_step(gpt.config_from_gptneo(data)).parameter_count == COUNTS["gpt2_small"]


@pytest.mark.parametrize("name", COUNTS)
def test_the_shipped_configs_have_their_exact_count(name: str) -> None:
    path = CONFIGS / f"{name}.json"
    if not path.exists():
        pytest.skip("needs GPT-Neo's config files")
    c = gpt.config_from_gptneo(json.loads(path.read_text()), name)
    assert gpt.train_step(c).parameter_count == COUNTS[name]
    if name == "gpt2_small":
        assert (c.embed_dropout, c.attn_dropout, c.res_dropout) == (0.1, 0.1, 0.1)
        assert (c.steps, c.recompute, c.seq) == (300_000, False, 1024)
    if name == "gpt3_13B_256":
        assert c.attention == ((("global", "local"), 20),)
        assert (c.window, c.dtype, c.recompute) == (256, "bf16", True)


@pytest.mark.parametrize(
    ("types", "layers", "expected"),
    [
        ([[["global"], 3], [["global"], 2]], 5, ((("global",), 5),)),
        ([[["local", "global", "local", "global"], 3]], 12, ((("local", "global"), 6),)),
        ([[["global", "global", "none"], 2]], 6, ((("global", "global", "none"), 2),)),
        ([[["global", "local"], 1], [["local", "local"], 1]], 4,
         ((("global", "local"), 1), (("local",), 2))),
    ],
)  # fmt: skip
def test_attention_types_are_brought_to_their_shortest_form(
    types: Any, layers: int, expected: Any
) -> None:
    assert gptneo.attention(types, layers) == expected


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"n_heads": 12}, "unknown config key 'n_heads'; the nearest .* 'n_head'"),
    "far key": ({"zzz": 1}, "unknown config key 'zzz'; the nearest"),
    "too few layers": ({"attention_types": [[["global"], 5]]}, "describes 5 layers; n_layer is 19"),
    "unknown type": ({"attention_types": [[["globe"], 19]]}, "'globe'; one of global, local"),
    "flat types": ({"attention_types": ["global"] * 19}, "it is a list like"),
    "types as text": ({"attention_types": "global"}, "it is a list like"),
    "no times": ({"attention_types": [[["global"], 0]]}, "it is a list like"),
    "moe layer": ({"moe_layers": [2, 19]}, "moe_layers has 19; layers are 0 to 18"),
    "moe as a number": ({"moe_layers": 2}, "moe_layers is 2; it must be a list of integers"),
    "moe key": ({"moe_params": {"num_experts": 4}}, "of moe_params 'num_experts'; .* 'moe_num_exp"),
    "moe text": ({"moe_params": "top_2"}, "moe_params is 'top_2'; it must be an object"),
    "hierarchy": ({"moe_params": {"moe_num_experts": [4, 4]}}, r"moe_num_experts is \[4, 4\]"),
    "gating": (
        {"moe_params": {"moe_gating": "switch_max"}},
        "gating 'switch_max'; one of top_2, top_n",
    ),
    "policy": ({"moe_params": {"moe_second_policy_eval": "x"}}, "policy 'x'; one of all, none"),
    "too few experts": ({"moe_params": {"moe_num_experts": 1}}, "chooses 1 to 1 of 1, not 2"),
    "expert attention": (
        {"moe_params": {"moe_use_experts_attention": True}},
        "queries and keys of experts",
    ),
    "moe activation": ({"moe_activation": ["relu", "linear"]}, "moe_activation is .* a name"),
    "expert dropout": ({"moe_params": {"moe_dropout_rate": 1.0}}, "moe_dropout_rate is 1.0"),
    "rotary": ({"rotary_emb": "yes"}, "rotary_emb is 'yes'; it must be true or false"),
    "axial": ({"axial_pos_emb": True}, "axial_pos_emb is True; it must be two integers"),
    "few axial": ({"axial_pos_emb": [4, 4]}, "axial_pos_emb 4 x 4 is 16; n_ctx is 2048"),
    "memory kv": ({"num_mem_kv": -1}, "num_mem_kv is -1"),
    "unmasked mlm": ({"mlm_training": True}, "mlm_training needs 'mlm_mask_id'"),
    "mask": ({"mlm_training": True, "mlm_mask_id": 50304}, "mlm_mask_id is 50304; n_vocab is"),
    "shares": (
        {
            "mlm_training": True,
            "mlm_mask_id": 1,
            "mlm_same_token_prob": 0.6,
            "mlm_random_token_prob": 0.5,
        },
        "so are the other two together",
    ),
    "ignore": (
        {"mlm_training": True, "mlm_mask_id": 1, "mlm_mask_ignore_ids": 3},
        "a list of integers",
    ),
    "optimizer": ({"opt_name": "lion"}, "opt_name 'lion'; one of adam, adafactor"),
    "activation": ({"activation_function": "sellu"}, "'sellu'; the nearest known one is 'selu'"),
    "activation_fn": ({"activation_fn": "prelu"}, "'prelu' has a slope or parameters"),
    "no name": ({"activation_fn": 3}, "activation_fn is 3; it must be a name"),
    "microbatch": ({"tokens_per_mb_per_replica": "2k"}, "tokens_per_mb_per_replica is '2k'"),
    "decay": ({"lr_decay": "cubic"}, "lr_decay 'cubic'"),
    "precision": ({"precision": "fp8"}, "precision 'fp8'"),
    "heads": ({"n_head": 7}, "768 does not divide by n_head 7"),
    "text for a number": ({"n_embd": "768"}, "n_embd is '768'; it must be an integer"),
    "true for a number": ({"n_layer": True}, "n_layer is True"),
    "no layer": ({"n_layer": 0}, "at least 1"),
    "rate": ({"attn_dropout": 1.0}, "attn_dropout is 1.0"),
    "mesh": ({"mesh_shape": 8}, "mesh_shape is 8"),
    "missing": ({"n_vocab": None}, "no 'n_vocab'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configs_are_refused_by_name(what: str) -> None:
    change, message = BAD[what]
    with pytest.raises(NeoccError, match=message):
        gptneo.read(PAR | change)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(NeoccError, match="JSON object, not a list"):
        gptneo.read([PAR])  # type: ignore[arg-type]


MASK = {"mlm_training": True, "mlm_mask_id": 7}
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "linear": ({"attention_types": [[["global", "linear"], 9], [["none"], 1]]}, {}, ""),
    "axial": (
        {"axial_pos_emb": [32, 64]}, {"positions": "axial", "axial": (32, 64)}, ""
    ),
    "rotary": ({"rotary_emb": True}, {"positions": "rotary"}, ""),
    "no rotary": ({"rotary_emb": False}, {"positions": "learned"}, "any value switched it on"),
    "both": (
        {"rotary_emb": True, "axial_pos_emb": [32, 64]}, {"positions": "rotary"}, "before axial"
    ),
    "glu": ({"mlp_glu": True}, {"glu": True}, "mlp_glu did not run"),
    "scalenorm": ({"scalenorm": True}, {"norm": "scale"}, ""),
    "rezero": ({"rezero": True, "scalenorm": True}, {"norm": "rezero"}, "goes before scalenorm"),
    "macaron": ({"macaron": True}, {"macaron": True}, ""),
    "memory": ({"num_mem_kv": 16}, {"mem_kv": 16}, "num_mem_kv did not run"),
    "shared": ({"share_parameters": True}, {"share": True}, ""),
    "untied": ({"no_weight_tie": True}, {"tied": False}, ""),
    "activation": (
        {"activation_function": "selu"}, {"activation": "selu"}, "read activation_fn instead"
    ),
    "activation_fn": (
        {"activation_fn": "silu"}, {"activation": "silu"}, "and activation_function does not"
    ),
    "entmax": ({"entmax_loss": True}, {"entmax": True}, "was not a number"),
    "mlm": (MASK, {"masking": Masking(7)}, "every layer looks both ways"),
    "mlm keys": (
        MASK | {"mlm_cls_token_id": 5, "mlm_mask_prob": 0.3, "mlm_same_token_prob": 0.2,
                "mlm_random_token_prob": 0.1, "mlm_mask_ignore_ids": [3, 4], "padding_id": 2},
        {"masking": Masking(7, 0.3, 0.2, 0.1, 5, (3, 4), 2)},
        "",
    ),
    "experts": (
        {"moe_layers": [4, 1], "moe_params": {}},
        {"moe_layers": (1, 4), "experts": Experts()},
        "GPT-Neo's groups depended on the mesh",
    ),
    "top_n": (
        {"moe_layers": [0], "moe_activation": "gelu", "moe_params": {
            "moe_gating": "top_n", "moe_num_experts": 8, "moe_hidden_size": 64,
            "moe_top_n_num_experts_per_token": 4, "moe_group_size": 128, "moe_loss_coef": 0.1,
            "moe_capacity_factor_train": 1.5, "moe_capacity_factor_eval": 3,
            "moe_min_expert_capacity": 2, "moe_use_second_place_loss": 1, "moe_z_loss": 0.01,
            "moe_second_policy_train": "threshold", "moe_second_threshold_train": 0.3,
            "moe_second_policy_eval": "all", "moe_dropout_rate": 0.1, "moe_output_dim": None,
            "moe_capacity_factor_second_level": 1.0,
        }},
        {"experts": Experts(
            8, 64, "top_n", 4, 128, 2, "gelu", 0.1, 0.1, True, 0.01,
            routing=Routing(1.5, "threshold", 0.3), evaluating=Routing(3.0, "all"),
        )},
        "",
    ),
    "switch": (
        {"moe_layers": [3], "moe_params": {
            "moe_gating": "switch", "moe_switch_policy_train": "input_dropout",
            "moe_switch_policy_eval": "argmax", "moe_switch_dropout": 0.2,
            "moe_switch_jitter": 0.05, "moe_switch_temperature": 2.0,
        }},
        {"experts": Experts(
            gating="switch", choices=1, jitter=0.05, input_dropout=0.2, temperature=2.0,
            routing=Routing(switch="input_dropout"), evaluating=Routing(2.0, switch="argmax"),
        )},
        "",
    ),
    "no experts": (
        {"moe_layers": [], "moe_params": {"moe_num_experts": 4}}, {"experts": None}, ""
    ),
    "mlm off": ({"mlm_training": False, "mlm_mask_id": 7}, {"masking": None}, ""),
    "adafactor": (
        {"opt_name": "Adafactor", "ada_epsilon1": 1e-20, "ada_epsilon2": 1e-2},
        {"optimizer": "adafactor", "beta1": 0.0, "ada_epsilon1": 1e-20, "ada_epsilon2": 1e-2},
        "constant lr",
    ),
    "momentum": ({"opt_name": "adafactor", "beta1": 0.9}, {"beta1": 0.9}, ""),
    "adam": ({}, {"optimizer": "adam", "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-6}, ""),
    "precision": ({"precision": "bfloat16"}, {"dtype": "bf16", "param_dtype": "f32"}, ""),
    "recompute": ({"recompute_grad": True}, {"recompute": True}, ""),
    "schedule": (
        {"lr_decay": "linear", "warmup_steps": 5}, {"lr_decay": "linear", "warmup": 5}, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", KEYS)
def test_a_key_sets_the_model_and_says_what_gpt_neo_did_otherwise(what: str) -> None:
    change, expected, note = KEYS[what]
    read = gptneo.read(PAR | change)
    c = gpt.config_from_gptneo(PAR | change)
    assert {n: getattr(c, n) for n in expected} == expected
    assert note == "" or any(note in n for n in read.notes)
    gpt.weights(c)


@pytest.mark.parametrize(
    ("batch", "seq", "tokens", "replicas", "parts"),
    [
        (512, 2048, 2048, 64, 8),  # one sequence at a time
        (512, 2048, 4096, 64, 4),
        (512, 2048, 100, 64, 8),  # a sequence is the least
        (512, 2048, 10**9, 64, 1),
        (12, 10, 50, 1, 3),  # 5 do not divide 12, 4 do
        (10, 10, 10, 4, 5),  # the batch does not divide by 4, but by 2
    ],
)
def test_microbatches_hold_no_more_tokens_than_asked(
    batch: int, seq: int, tokens: int, replicas: int, parts: int
) -> None:
    assert gptneo.microbatches(batch, seq, tokens, replicas) == parts


def test_keys_that_ask_for_nothing_special_pass() -> None:
    plain = {"moe_layers": None, "rezero": False, "mlp_glu": False, "rotary_emb": False}
    assert gptneo.read(PAR | plain).settings == gptneo.read(PAR).settings


def test_the_page_of_keys_has_every_key_that_is_read() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "gptneo.md").read_text("utf-8")
    missing = {k for k in gptneo.MODEL_KEYS | gptneo.MOE_KEYS if f"`{k}`" not in page}
    assert not missing
