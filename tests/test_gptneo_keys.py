"""GPT-Neo's config keys through the commands: each is compiled and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from typer.testing import CliRunner, Result

from benchmarks.train_curves import stdlib_text
from neocc.cli import app

NEO: dict[str, Any] = {
    "n_layer": 4, "n_embd": 32, "n_head": 4, "n_vocab": 258, "n_ctx": 16, "train_batch_size": 8,
    "attention_types": [[["global", "local"], 2]], "local_attention_radius": 4, "lr": 0.01,
    "mesh_shape": "x:2,y:2", "layout": "batch:x,heads:y,intermediate_expanded:y",
}  # fmt: skip
MASKED = {"mlm_training": True, "mlm_mask_id": 257, "mlm_cls_token_id": 256, "padding_id": 255}
KEYS: dict[str, dict[str, Any]] = {
    "linear": {"attention_types": [[["global", "linear"], 2]]},
    "axial": {"axial_pos_emb": [4, 4]},
    "rotary": {"rotary_emb": True},
    "glu": {"mlp_glu": True},
    "scalenorm": {"scalenorm": True},
    "rezero": {"rezero": True},
    "macaron": {"macaron": True},
    "memory": {"num_mem_kv": 3},
    "shared": {"share_parameters": True},
    "untied": {"no_weight_tie": True, "lr": 0.003},
    "activation": {"activation_fn": "gelu_exact"},
    "entmax": {"entmax_loss": True},
    "masked": MASKED | {"mlm_mask_prob": 0.5, "mlm_random_token_prob": 0.1},
    "experts": {
        "moe_layers": [1, 3], "moe_activation": "gelu",
        "moe_params": {"moe_num_experts": 4, "moe_hidden_size": 64, "moe_group_size": 8},
        "layout": "batch:x,heads:y,intermediate_expanded:y,experts:x,expert_hidden:y",
    },
    "adafactor": {"opt_name": "adafactor", "lr_decay": "linear", "beta1": 0.5, "lr": 1.0},
    "microbatches": {"tokens_per_mb_per_replica": 32},
    "recompute": {"recompute_grad": True, "precision": "bfloat16", "res_dropout": 0.1},
    "many": {
        **MASKED, "attention_types": [[["global", "linear"], 1], [["local", "none"], 1]],
        "rotary_emb": True, "mlp_glu": True, "rezero": True, "macaron": True, "num_mem_kv": 2,
        "share_parameters": True, "activation_function": "selu", "opt_name": "adafactor",
        "lr": 0.2, "mlm_mask_prob": 0.8,
        "tokens_per_mb_per_replica": 32, "gradient_clipping": 1.0, "weight_decay": 0.1,
    },
}  # fmt: skip
QUICK = ("many", "experts")
SOME = [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KEYS]


def run(command: str, tmp_path: Path, key: str, *more: str) -> Result:
    jax.devices()  # started with eight devices: the command must not set another number
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**NEO, **KEYS[key]}))
    result = CliRunner().invoke(app, [command, "gpt.py", "--config", str(path), *more])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("key", SOME)
def test_a_config_compiles_on_its_own_mesh(tmp_path: Path, key: str) -> None:
    report = json.loads(run("compile", tmp_path, key, "--no-compare", "--json").stdout)
    assert report["plan"]["mesh"] == [{"axis": "x", "size": 2}, {"axis": "y", "size": 2}]
    if "tokens_per_mb_per_replica" in KEYS[key]:
        assert any(": 2 microbatches" in note for note in report["notes"])


def test_microbatches_of_a_config_are_planned_unless_others_are_asked_for(tmp_path: Path) -> None:
    """32 tokens are two sequences; of a batch of 8 on 2 replicas, 2 times 2 each."""
    more = ("--no-compare", "--layout", "batch:x,heads:y")
    assert "2 microbatches;" in run("compile", tmp_path, "microbatches", *more).stdout
    shown = run("compile", tmp_path, "microbatches", *more, "--microbatches", "4").stdout
    assert "4 microbatches;" in shown
    free = run("compile", tmp_path, "microbatches", "--no-compare", "--mesh", "2x4").stdout
    assert "microbatches;" not in free  # each of 8 devices has one sequence


@pytest.mark.parametrize("key", SOME)
def test_a_config_trains(tmp_path: Path, key: str) -> None:
    text, log = tmp_path / "text.txt", tmp_path / "log.jsonl"
    text.write_bytes(stdlib_text()[:20_000])
    more = ("--text", str(text), "--steps", "20", "--vocab", "258", "--mesh", "2x1")
    shown = run("train", tmp_path, key, *more, "--layout", "batch:x", "--log", str(log)).output
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5]), losses
    if key == "many":
        assert "every layer looks both ways" in " ".join(shown.split())
