"""Conversions between Hugging Face's layout and neocc's, against a plain forward pass in numpy."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.gpt import PRESETS
from neocc.frontends.weights.convert import convert, open_source, restored
from neocc.frontends.weights.hf_folder import open_folder
from neocc.ir.errors import NeoccError
from neocc.nn import Experts, Masking
from neocc.runtime import read_checkpoint
from tests.frontends import hf_models, on_mesh

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(7).integers(0, 61, (4, 16))


@pytest.fixture(params=hf_models.CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = hf_models.CONFIGS[request.param]
    return hf_models.write(tmp_path / request.param, config, hf_models.tensors(config))


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {n: t.read() for n, t in open_folder(path)[1].items()}


@pytest.mark.parametrize("mesh", ["2x4", pytest.param("1x1", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_plain_model(folder: Path, mesh: str, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    convert(folder, tmp_path / "ours", "neocc")
    wanted = hf_models.logits(config, arrays(folder), TOKENS)
    assert np.abs(wanted).max() > 3
    np.testing.assert_allclose(on_mesh.logits(tmp_path / "ours", TOKENS, mesh), wanted, atol=1e-4)


@pytest.mark.parametrize("most", [4e9, 20_000])
def test_there_and_back_is_bit_exact(folder: Path, tmp_path: Path, most: float):
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "ours", "neocc", most=most)
    done = convert(tmp_path / "ours", tmp_path / "back", "hf", most=most)
    assert (
        len(list((tmp_path / "back").glob("*.safetensors"))) == (1 if most > 1e6 else 7)
        or most < 1e6
    )
    assert not any("left out" in n or "zeros" in n for n in done.notes)
    before, after = arrays(folder), arrays(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.tobytes() == after[name].tobytes(), name
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    own = json.loads((folder / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: v for k, v in own.items() if v is not None} == {
        k: back[k] for k in own if own[k] is not None
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"masking": Masking(5, cls=3, ignore=(1, 2))},
        {"moe_layers": (1,), "experts": Experts(4)},
    ],
)
def test_a_config_comes_back_from_json_as_it_was(change: dict[str, Any]):
    c = dataclasses.replace(PRESETS["tiny"], attention=((("global", "local"), 1),), **change)
    assert restored(type(c), json.loads(json.dumps(dataclasses.asdict(c)))) == c


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_kept(dtype: str, tmp_path: Path):
    import ml_dtypes

    config = hf_models.NEO | {"torch_dtype": dtype}
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    narrow = {n: a.astype(kind) for n, a in hf_models.tensors(config).items()}
    folder = hf_models.write(tmp_path / "hf", config, narrow)
    convert(folder, tmp_path / "ours", "neocc")
    assert read_checkpoint(tmp_path / "ours").tensors["h1.mlp.fc"].dtype == kind
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    for name, array in arrays(tmp_path / "back").items():
        assert array.tobytes() == narrow[name].tobytes()
    if dtype == "float16":
        return
    wanted = hf_models.logits(config, narrow, TOKENS)
    found = on_mesh.logits(tmp_path / "ours", TOKENS, "1x1", dtype="f32")
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_models_without_a_head_buffers_and_a_tied_head_are_read(tmp_path: Path):
    config = hf_models.GPT2
    made = hf_models.tensors(config)
    bare = {n.removeprefix("transformer."): a for n, a in made.items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 16, 16), np.float32) for i in range(3)}
    bare |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
    convert(hf_models.write(tmp_path / "bare", config, bare), tmp_path / "a", "neocc")
    tied = made | {"lm_head.weight": made["transformer.wte.weight"]}
    convert(hf_models.write(tmp_path / "tied", config, tied), tmp_path / "b", "neocc")
    a, b = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    assert a.sums == b.sums
    other = made | {"lm_head.weight": made["transformer.wte.weight"] + 1}
    with pytest.raises(NeoccError, match=r"'lm_head.weight' of .* is not 'transformer.wte.weight'"):
        convert(hf_models.write(tmp_path / "other", config, other), tmp_path / "c", "neocc")


def cut(folder: Path) -> None:
    """The file ends within its last tensor."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[12] ^= 0x10
    path.write_bytes(data)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    """Tensors replaced, or taken out where None."""

    def apply(folder: Path) -> None:
        made = hf_models.tensors(hf_models.NEO)
        for name, array in changes.items():
            name = name.replace("__", ".")
            if array is None:
                del made[name]
            else:
                made[name] = array
        hf_models.write(folder, hf_models.NEO, made)

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(hf_models.NEO | changes))

    return apply


WRONG = {
    "truncated": (cut, r"tensor 'transformer.ln_f.bias' ends at byte .*truncated"),
    "only a start": (lambda f: os.truncate(f / "model.safetensors", 5), "only the start of one"),
    "header flipped": (flip, "tensor .*trqnsformer.wte.weight|no tensor .transformer.wte.weight"),
    "shape": (
        rewrite(transformer__h__2__mlp__c_fc__weight=np.zeros((24, 96), np.float32)),
        r"tensor 'transformer.h.2.mlp.c_fc.weight' of .* has the shape \[24, 96\]; .*\[96, 24\]",
    ),
    "missing": (
        rewrite(transformer__h__3__ln_2__bias=None),
        "no tensor 'transformer.h.3.ln_2.bias', which GPTNeoForCausalLM",
    ),
    "too many": (
        rewrite(transformer__h__4__ln_1__bias=np.zeros(24, np.float32)),
        "tensor 'transformer.h.4.ln_1.bias' of .* is none of GPTNeoForCausalLM",
    ),
    "other sizes": (config(hidden_size=48), r"tensor 'transformer.wte.weight' .*\[61, 24\]"),
    "another family's tensors": (
        config(**hf_models.GPT2 | {"n_layer": 4}),
        "no tensor 'transformer.h.0.attn.c_attn.weight', which GPT2LMHeadModel .* "
        "it has 'transformer.h.0.attn.attention.k_proj.weight'",
    ),
    "another architecture": (
        config(model_type="llama"),
        "model_type is 'llama'; .*'transformer.wte.weight' is the first",
    ),
    "activation": (config(activation_function="relu"), "activation_function 'relu'"),
    "eps": (config(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "mlp": (config(intermediate_size=100), "intermediate_size"),
    "untied": (config(tie_word_embeddings=False), "tie_word_embeddings"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "old": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is of PyTorch",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_refused_and_nothing_is_written(case: str, tmp_path: Path):
    change, message = WRONG[case]
    folder = hf_models.write(tmp_path / "hf", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    change(folder)
    with pytest.raises(NeoccError, match=f"(?s){message}"):
        convert(folder, tmp_path / "ours", "neocc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_missing_shard_and_a_tensor_that_is_not_in_its_shard_are_named(tmp_path: Path):
    folder = hf_models.write(tmp_path / "hf", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    convert(folder, tmp_path / "ours", "neocc")
    convert(tmp_path / "ours", tmp_path / "many", "hf", most=20_000)
    index = tmp_path / "many" / "model.safetensors.index.json"
    map_ = json.loads(index.read_text())["weight_map"]
    shard = map_["transformer.h.2.mlp.c_fc.weight"]
    name = next(n for n, f in map_.items() if f == shard)
    (tmp_path / "many" / shard).rename(tmp_path / "moved")
    with pytest.raises(NeoccError, match=f"tensor '{name}': its file .*{shard} is missing"):
        convert(tmp_path / "many", tmp_path / "x", "neocc")
    (tmp_path / "moved").rename(tmp_path / "many" / shard)
    map_["transformer.wte.weight"] = shard
    index.write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(NeoccError, match=r"tensor 'transformer.wte.weight' is not in "):
        convert(tmp_path / "many", tmp_path / "x", "neocc")


def test_a_flipped_byte_of_neoccs_own_is_refused_by_the_tensors_name(tmp_path: Path):
    folder = hf_models.write(tmp_path / "hf", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    convert(folder, tmp_path / "ours", "neocc")
    stored = read_checkpoint(tmp_path / "ours").tensors["h1.attn.o"]
    data = bytearray(stored.path.read_bytes())
    data[stored.start + 5] ^= 1
    stored.path.write_bytes(data)
    with pytest.raises(NeoccError, match=r"tensor 'h1.attn.o' .* are not those"):
        convert(tmp_path / "ours", tmp_path / "back", "hf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": [[["none", "global"], 2]]}, "attention type 'none': GPTNeoForCausalLM"),
        ({"window": 5, "scale_scores": True}, "attention = .*local"),
        ({"qkv_bias": True}, "no tensor for the weight 'h0.attn.q_b'|has no tensor 'h0.attn.q_b'"),
    ],
)
def test_a_model_that_hugging_face_has_not_is_refused(
    fields: dict[str, Any], said: str, tmp_path: Path
):
    folder = hf_models.write(tmp_path / "hf", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    convert(folder, tmp_path / "ours", "neocc")
    manifest = tmp_path / "ours" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["model"]["config"] |= fields
    if "attention" in fields:  # such layers have no attention weights
        data["tensors"] = {
            n: t for n, t in data["tensors"].items() if not n.startswith(("h0.attn", "h0.ln1"))
        }
    manifest.write_text(json.dumps(data))
    with pytest.raises(NeoccError, match=said):
        convert(tmp_path / "ours", tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


def test_the_target_must_not_be_there(folder: Path, tmp_path: Path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(NeoccError, match="is there already"):
        convert(folder, tmp_path / "ours", "neocc")


KILLED = """
import os, signal, sys
from pathlib import Path
from neocc.frontends.weights.convert import convert
left = int(sys.argv[4])
def count(event, args):
    global left
    if event in ("open", "os.rename", "os.mkdir") and "partial" in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], most=30_000)
"""


@pytest.mark.parametrize("kind", ["neocc", "hf"])
@pytest.mark.parametrize("boundary", [2, 4, 7])
def test_a_killed_conversion_leaves_nothing_that_loads(boundary: int, kind: str, tmp_path: Path):
    """Before the first file is made, before the third, and before the manifest or the last."""
    source = hf_models.write(tmp_path / "a", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    if kind == "hf":
        convert(source, tmp_path / "own", "neocc")
        source = tmp_path / "own"
    target = tmp_path / "out"
    arguments = [str(source), str(target), kind, str(boundary)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.glob(".out.partial-*")
    assert len(list(left.iterdir())) == boundary - 2
    with pytest.raises(NeoccError, match=r"nothing that neocc knows|has no|missing|cannot read"):
        open_source(left)
    assert str(left) in convert(source, target, kind).notes[-1]
    assert open_source(target).form.parts


FULL = """
import resource, signal, sys
from pathlib import Path
from neocc.frontends.weights.convert import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
convert(Path(sys.argv[1]), Path(sys.argv[2]), "neocc")
"""


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path):
    source = hf_models.write(tmp_path / "a", hf_models.NEO, hf_models.tensors(hf_models.NEO))
    arguments = [sys.executable, "-c", FULL, str(source), str(tmp_path / "out")]
    done = subprocess.run(arguments, cwd=ROOT, check=False, capture_output=True, text=True)
    assert "CheckpointError: cannot write" in done.stderr and "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
