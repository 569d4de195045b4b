"""GPT-Neo's configs as they stand, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import gpt
from neocc.frontends import gptneo
from neocc.ir.errors import NeoccError

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
    "linear": ({"attention_types": [[["linear"], 19]]}, "'linear' is not supported yet"),
    "flat types": ({"attention_types": ["global"] * 19}, "it is a list like"),
    "types as text": ({"attention_types": "global"}, "it is a list like"),
    "no times": ({"attention_types": [[["global"], 0]]}, "it is a list like"),
    "moe": ({"moe_layers": [2, 4]}, "moe_layers = .* mixture of experts"),
    "rotary": ({"rotary_emb": True}, "rotary positions"),
    "axial": ({"axial_pos_emb": [4, 4]}, "axial positions"),
    "glu": ({"mlp_glu": True}, "gated mlp"),
    "rezero": ({"rezero": True}, "ReZero"),
    "scalenorm": ({"scalenorm": True}, "ScaleNorm"),
    "memory kv": ({"num_mem_kv": 16}, "memory keys"),
    "macaron": ({"macaron": True}, "macaron"),
    "untied": ({"no_weight_tie": True}, "output matrix"),
    "mlm": ({"mlm_training": True}, "masked"),
    "adafactor": ({"opt_name": "adafactor"}, "'adafactor' is not supported"),
    "activation": ({"activation_function": "selu"}, "'selu' is not supported"),
    "activation_fn": ({"activation_fn": "selu"}, "another activation"),
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


def test_keys_that_ask_for_nothing_special_pass() -> None:
    plain = {"moe_layers": None, "rezero": False, "mlp_glu": False, "rotary_emb": False}
    assert gptneo.read(PAR | plain).settings == gptneo.read(PAR).settings
