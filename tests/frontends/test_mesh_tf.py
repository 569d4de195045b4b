"""GPT-Neo's own checkpoints, through TensorFlow: there and back, and a clear word without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neocc.frontends import mesh_tf
from neocc.frontends.weights.convert import convert, open_source
from neocc.ir.errors import NeoccError
from neocc.runtime import read_checkpoint
from tests.frontends import on_mesh

needs_tf = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="tensorflow not installed: pip install 'neocc[tf]'",
)
GOLDEN = Path(__file__).parents[2].parent / "shared" / "data" / "gptneo_golden"
CONFIG: dict[str, Any] = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "n_vocab": 30, "n_ctx": 8,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
MOE = {"moe_layers": [1], "moe_params": {"moe_num_experts": 3, "moe_hidden_size": 20}}
WIDE = {"opt_name": "adafactor", "n_embd": 128, "n_vocab": 140, "n_ctx": 130}
OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "axial": {"axial_pos_emb": [2, 4]},
    "rotary": {"rotary_emb": True},
    "gated": {"mlp_glu": True},
    "scalenorm": {"scalenorm": True},
    "rezero": {"rezero": True, "attention_types": [[["none", "global"], 1]]},
    "macaron": {"macaron": True, "mlp_glu": True},
    "memory": {"num_mem_kv": 3},
    "untied": {"no_weight_tie": True},
    "linear": {"attention_types": [[["linear", "global"], 1]]},
    "shared": {"share_parameters": True, "scalenorm": True, "num_mem_kv": 2},
    "experts": {**MOE},
    "switch": {**MOE, "moe_params": {**MOE["moe_params"], "moe_gating": "switch"}, "rezero": True},
    "adafactor": WIDE,
    "adafactor with means": {**WIDE, "beta1": 0.9, "share_parameters": True, "no_weight_tie": True},
    "adafactor of experts": {
        **WIDE, **MOE, "moe_params": {"moe_num_experts": 3, "moe_hidden_size": 150},
    },
}  # fmt: skip


def weights(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What models/gpt2/gpt2.py made, by its scopes: the vocabulary rounded up by two."""
    e, h = c["n_embd"], c["n_head"]
    inside = 2 if c.get("mlp_glu") else 1
    types = [t for names, times in c["attention_types"] for t in names * times]
    found: dict[str, tuple[int, ...]] = {"wte": (c["n_vocab"] + 2, e)}
    if axial := c.get("axial_pos_emb"):
        found |= {f"axial_wpe_{i}": (n, e) for i, n in enumerate(axial, 1)}
    elif not c.get("rotary_emb"):
        found["wpe"] = (c["n_ctx"], e)

    def mlp(scope: str) -> dict[str, tuple[int, ...]]:
        made = {"c_fc": (e, 4 * e * inside), "c_proj": (4 * e, e)}
        found = {f"{scope}/conv1d_main/{n}/kernel": s for n, s in made.items()}
        return found | {f"{scope}/conv1d_main/{n}/bias": s[1:] for n, s in made.items()}

    def norm(scope: str) -> dict[str, tuple[int, ...]]:
        if c.get("rezero"):
            return {}
        return {f"{scope}/g": ()} if c.get("scalenorm") else {f"{scope}/{p}": (e,) for p in "gb"}

    for i, kind in enumerate(types):
        own = mlp("mlp_macaron") if c.get("macaron") else {}
        if kind != "none":
            own |= norm("norm_1") | {f"attn/{n}": (e, e) for n in "qkvo"}
            own |= {"attn/compute_output_bias/o_b": (e,)}
        if kind == "global" and (n := c.get("num_mem_kv")):
            own |= {f"attn/attention/mem_{p}": (n, h, e // h) for p in "kv"}
        own |= norm("norm_2")
        if i in c.get("moe_layers", ()):
            how = c["moe_params"]
            experts, hidden = how["moe_num_experts"], how["moe_hidden_size"]
            own[f"{how.get('moe_gating', 'top_2')}_gating/kernel"] = (e, experts)
            own |= {"wi/kernel": (experts, e, hidden), "wo/kernel": (experts, hidden, e)}
        else:
            own |= mlp("mlp")
        if c.get("rezero"):
            own |= {"norm_rezero_1/g": (), "norm_rezero_2/g": ()}
        scope = "" if c.get("share_parameters") else f"h{i}"
        found |= {f"{scope}/{n}": s for n, s in own.items()}
    if c.get("no_weight_tie"):
        final = "wte_final_linear/conv1d_main/linear_out"
        found |= {f"{final}/kernel": (e, c["n_vocab"] + 2), f"{final}/bias": (c["n_vocab"] + 2,)}
    else:
        found |= {"ln_f/g": (e,), "ln_f/b": (e,)}
    return {f"gpt2/{n}": s for n, s in found.items()}


def slots(c: dict[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What GPT-Neo's optimizers.py, or Mesh TensorFlow's optimize.py, kept beside a variable."""
    if c.get("opt_name") != "adafactor":
        return {f"{name}/adam_m": shape, f"{name}/adam_v": shape}
    found = {f"{name}_slot_m": shape} if c.get("beta1") else {}
    longest = sorted(range(len(shape)), key=lambda d: -shape[d])[:2]
    if len(shape) < 2 or shape[longest[1]] < 128:
        return found | {f"{name}_slot_v": shape}
    without = [tuple(n for d, n in enumerate(shape) if d != at) for at in longest]
    return found | {f"{name}_slot_vr": without[0], f"{name}_slot_vc": without[1]}


def variables(moments: bool = True, **changes: Any) -> dict[str, np.ndarray]:
    c, rng = CONFIG | changes, np.random.default_rng(0)
    shapes = weights(c)
    if moments:
        shapes |= {n: s for w, shape in weights(c).items() for n, s in slots(c, w, shape).items()}
    made = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    return made | {"global_step": np.asarray(1234, np.int64)}


def write(folder: Path, made: dict[str, np.ndarray], **changes: Any) -> Path:
    tf: Any = mesh_tf.tensorflow()
    folder.mkdir()
    prefix = folder / "model.ckpt-1234"
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(made),
        shape_and_slices=[""] * len(made),
        tensors=list(made.values()),
    )
    (folder.parent / "neo.json").write_text(json.dumps(CONFIG | changes))
    return prefix


@needs_tf
@pytest.mark.parametrize("option", OPTIONS)
def test_there_and_back_is_bit_exact(option: str, tmp_path: Path):
    changes = OPTIONS[option]
    c, made = CONFIG | changes, variables(**changes)
    prefix = write(tmp_path / "theirs", made, **changes)
    done = convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    assert not any("left out" in n for n in done.notes)
    ours = read_checkpoint(tmp_path / "ours")
    assert ours.step == 1234 and ("step" in ours.tensors)
    assert np.array_equal(ours.tensors["wte"].read(), made["gpt2/wte"][: c["n_vocab"]])
    convert(tmp_path / "ours", tmp_path / "back", "mtf", most=4000)
    reader = mesh_tf.tensorflow().train.load_checkpoint(str(tmp_path / "back"))
    assert set(reader.get_variable_to_shape_map()) == set(made)
    for name, array in made.items():
        more = c["n_vocab"] + 2
        wanted = array[tuple(slice(-2 if n == more else None) for n in array.shape)]
        found = np.asarray(reader.get_tensor(name))
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name
    assert open_source(tmp_path / "back", tmp_path / "neo.json").step == 1234


@needs_tf
def test_a_checkpoint_without_state_has_parameters_alone(tmp_path: Path):
    prefix = write(tmp_path / "theirs", variables(moments=False))
    convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    assert not {"wte.m", "step"} & read_checkpoint(tmp_path / "ours").tensors.keys()


@needs_tf
def test_each_weight_and_state_comes_to_its_place(tmp_path: Path):
    changes = {**WIDE, "macaron": True, "num_mem_kv": 3, "no_weight_tie": True}
    made = variables(**changes)
    prefix = write(tmp_path / "theirs", made, **changes)
    convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    ours = {n: t.read() for n, t in read_checkpoint(tmp_path / "ours").tensors.items()}
    for name, variable in (
        ("h0.attn.mem_k", "h0/attn/attention/mem_k"),
        ("h1.macaron.fc", "h1/mlp_macaron/conv1d_main/c_fc/kernel"),
        # vr lacks the longer side there, and the columns here.
        ("h1.macaron.fc.vr", "h1/mlp_macaron/conv1d_main/c_fc/kernel_slot_vr"),
        ("h1.mlp.proj.vr", "h1/mlp/conv1d_main/c_proj/kernel_slot_vc"),
        ("h0.attn.q.vr", "h0/attn/q_slot_vc"),
        ("h0.attn.o.vc", "h0/attn/o_slot_vr"),
        ("h0.ln2.g.v", "h0/norm_2/g_slot_v"),
    ):
        wanted = made[f"gpt2/{variable}"]
        assert np.array_equal(ours[name][0].reshape(wanted.shape), wanted), name
    assert np.array_equal(ours["wte.vr"], made["gpt2/wte_slot_vc"][:140])
    assert np.array_equal(
        ours["head.w"], made["gpt2/wte_final_linear/conv1d_main/linear_out/kernel"][:, :140]
    )
    gated = variables(mlp_glu=True)
    prefix = write(tmp_path / "gated", gated, mlp_glu=True)
    convert(prefix, tmp_path / "halves", "neocc", tmp_path / "neo.json")
    halves = read_checkpoint(tmp_path / "halves").tensors
    both = gated["gpt2/h1/mlp/conv1d_main/c_fc/kernel"]
    assert np.array_equal(halves["h1.mlp.fc"].read()[0], both[:, :64])
    assert np.array_equal(halves["h1.mlp.gate"].read()[0], both[:, 64:])


@needs_tf
def test_state_of_another_optimizer_is_left_out_with_a_note(tmp_path: Path):
    prefix = write(tmp_path / "theirs", variables(opt_name="adafactor"))
    done = convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    assert any("Adafactor's state is left out" in n for n in done.notes)
    assert "wte.v" not in read_checkpoint(tmp_path / "ours").tensors


GOLDENS: dict[str, dict[str, Any]] = {
    "global": {},
    "local_r4": {"attention_types": [[["global", "local"], 1]], "local_attention_radius": 4},
    "linear": {"attention_types": [[["global", "linear"], 1]]},
    "rotary": {"rotary_emb": True},
    "axial": {"axial_pos_emb": [4, 4]},
}


@needs_tf
@pytest.mark.skipif(not GOLDEN.exists(), reason="needs GPT-Neo's golden files")
@pytest.mark.parametrize("mesh", ["1x1", "2x4"])
@pytest.mark.parametrize("name", GOLDENS)
def test_logits_of_gpt_neos_own_weights_through_its_checkpoint(
    name: str, mesh: str, tmp_path: Path
):
    file = np.load(GOLDEN / f"{name}.npz")
    sizes = {"n_embd": 32, "n_head": 4, "n_vocab": 64, "n_ctx": 16}
    changes = sizes | {"attention_types": [[["global"], 2]]} | GOLDENS[name]
    made = {k.removeprefix("w:"): file[k] for k in file.files if k.startswith("w:")}
    assert made.keys() == weights(CONFIG | changes).keys()
    prefix = write(tmp_path / "theirs", made, **changes)
    convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    found = on_mesh.logits(tmp_path / "ours", file["tokens"][:, :-1], mesh)
    most = max(1.0, float(np.abs(file["logits"]).max()))
    np.testing.assert_allclose(found, file["logits"], rtol=0, atol=1e-5 * most)


@needs_tf
def test_wrong_ones_are_refused_by_the_variables_name(tmp_path: Path):
    made = variables(False)
    del made["gpt2/h1/norm_2/g"]
    prefix = write(tmp_path / "a", made)
    with pytest.raises(NeoccError, match="no tensor 'gpt2/h1/norm_2/g'"):
        open_source(prefix, tmp_path / "neo.json")
    made = variables(False) | {"gpt2/h0/attn/q": np.zeros((16, 8), np.float32)}
    prefix = write(tmp_path / "b", made)
    with pytest.raises(NeoccError, match=r"tensor 'gpt2/h0/attn/q' .*\[16, 8\]"):
        open_source(prefix, tmp_path / "neo.json")
    with pytest.raises(NeoccError, match="give its --config"):
        open_source(prefix)


def test_without_tensorflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(NeoccError, match=r"pip install 'neocc\[tf\]'"):
        mesh_tf.tensorflow()
