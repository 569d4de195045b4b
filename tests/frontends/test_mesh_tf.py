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

needs_tf = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="tensorflow not installed: pip install 'neocc[tf]'",
)
CONFIG = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "n_vocab": 30, "n_ctx": 8,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip


def variables(moments: bool = True) -> dict[str, np.ndarray]:
    """As GPT-Neo named and shaped them; two rows more of ``wte`` than the vocabulary."""
    e, rng = 16, np.random.default_rng(0)
    layer: dict[str, tuple[int, ...]] = {f"attn/{n}": (e, e) for n in "qkvo"}
    layer |= {f"norm_{i}/{p}": (e,) for i in (1, 2) for p in "gb"}
    layer |= {"attn/compute_output_bias/o_b": (e,)}
    mlp = "mlp/conv1d_main/"
    layer |= {f"{mlp}c_fc/kernel": (e, 4 * e), f"{mlp}c_fc/bias": (4 * e,)}
    layer |= {f"{mlp}c_proj/kernel": (4 * e, e), f"{mlp}c_proj/bias": (e,)}
    shapes: dict[str, tuple[int, ...]] = {"wte": (32, e), "wpe": (8, e)}
    shapes |= {"ln_f/g": (e,), "ln_f/b": (e,)}
    shapes |= {f"h{i}/{n}": s for i in range(2) for n, s in layer.items()}
    ends = ("", "/adam_m", "/adam_v") if moments else ("",)
    made: dict[str, np.ndarray] = {
        f"gpt2/{n}{end}": rng.standard_normal(s).astype(np.float32)
        for n, s in shapes.items()
        for end in ends
    }
    return made | {"global_step": np.asarray(1234, np.int64)}


def write(folder: Path, made: dict[str, np.ndarray]) -> Path:
    tf: Any = mesh_tf.tensorflow()
    folder.mkdir()
    prefix = folder / "model.ckpt-1234"
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(made),
        shape_and_slices=[""] * len(made),
        tensors=list(made.values()),
    )
    (folder.parent / "neo.json").write_text(json.dumps(CONFIG))
    return prefix


@needs_tf
@pytest.mark.parametrize("moments", [True, False])
def test_there_and_back_is_bit_exact(moments: bool, tmp_path: Path):
    made = variables(moments)
    prefix = write(tmp_path / "theirs", made)
    convert(prefix, tmp_path / "ours", "neocc", tmp_path / "neo.json")
    ours = read_checkpoint(tmp_path / "ours")
    assert ours.step == 1234 and ("wte.m" in ours.tensors) == moments
    q = ours.tensors["h1.attn.q"].read()
    assert np.array_equal(q.reshape(16, 16), made["gpt2/h1/attn/q"])
    assert np.array_equal(ours.tensors["wte"].read(), made["gpt2/wte"][:30])
    convert(tmp_path / "ours", tmp_path / "back", "mtf", most=4000)
    reader = mesh_tf.tensorflow().train.load_checkpoint(str(tmp_path / "back"))
    assert set(reader.get_variable_to_shape_map()) == set(made)
    for name, array in made.items():
        wanted = array[:30] if "wte" in name else array
        found = np.asarray(reader.get_tensor(name))
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name
    assert open_source(tmp_path / "back", tmp_path / "neo.json").step == 1234


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
