"""GPT-Neo's own checkpoints: how its Mesh TensorFlow variables are called, and reading them.

Names and shapes are those that GPT-Neo's models/gpt2/gpt2.py and optimizers.py made, and Mesh
TensorFlow's transformer/attention.py and layers.py: each variable whole, however it was laid out;
heads and their features as one dim, heads outermost. Adam's moments are variables beside each one.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neocc.frontends.weights.forms import LAYER, Form, Part
from neocc.ir.errors import NeoccError

STEP = "global_step"
SCOPE = "gpt2/"
WITHIN = {
    "ln1.g": "norm_1/g",
    "ln1.b": "norm_1/b",
    "ln2.g": "norm_2/g",
    "ln2.b": "norm_2/b",
    "attn.q": "attn/q",
    "attn.k": "attn/k",
    "attn.v": "attn/v",
    "attn.o": "attn/o",
    "attn.b": "attn/compute_output_bias/o_b",
    "mlp.fc": "mlp/conv1d_main/c_fc/kernel",
    "mlp.fc_b": "mlp/conv1d_main/c_fc/bias",
    "mlp.proj": "mlp/conv1d_main/c_proj/kernel",
    "mlp.proj_b": "mlp/conv1d_main/c_proj/bias",
}
OUTSIDE = {"wte": "wte", "wpe": "wpe", "ln_f.g": "ln_f/g", "ln_f.b": "ln_f/b"}
SLOTS = {"": "", ".m": "/adam_m", ".v": "/adam_v"}
MOMENT = re.compile(r"(.+)(\.[mv])")
# Adafactor's, which hold rows and columns of what they estimate: neocc has no place for them.
ADAFACTOR = re.compile(r".*_slot_(vr|vc|v|m)")


def variable_form(weights: Mapping[str, tuple[int, ...]]) -> Form:
    """The form of a checkpoint of a model with these weights and moments, each [in, out] or [n].

    Raises:
        NeoccError: GPT-Neo had no variable for one of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    for name, shape in weights.items():
        moment = MOMENT.fullmatch(name)
        plain, slot = (
            (moment[1], SLOTS[moment[2]]) if moment and moment[1] in weights else (name, "")
        )
        layer = LAYER.fullmatch(plain)
        if layer and layer[2] in WITHIN:
            variable = f"{SCOPE}h{layer[1]}/{WITHIN[layer[2]]}{slot}"
        elif layer is None and plain in OUTSIDE:
            variable = f"{SCOPE}{OUTSIDE[plain]}{slot}"
        elif layer and layer[2].startswith("moe."):
            raise NeoccError(f"weight {name!r}: experts are not converted yet")
        else:
            raise NeoccError(f"GPT-Neo has no variable for the weight {name!r}")
        parts[name] = Part(variable)
        shapes[variable] = shape
    return Form(shapes, parts, dict(weights))


@dataclass(frozen=True, eq=False)
class Variable:
    """A variable of a checkpoint; of more rows than ``shape`` has, the first."""

    reader: Any
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        array = self.value()
        return array[first:last] if array.ndim else array

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]:
        yield self.read(first, last)

    def value(self) -> np.ndarray:
        try:
            array = np.asarray(self.reader.get_tensor(self.name))
        except Exception as error:  # TensorFlow's own: DataLossError, OutOfRangeError, ...
            reason = str(error).splitlines()[0]
            raise NeoccError(f"tensor {self.name!r} cannot be read: {reason}") from None
        array = array[: self.shape[0]] if array.ndim else array
        return array.astype(self.dtype, copy=False)


def tensorflow() -> Any:
    """Raises:
    NeoccError: it is not there.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no pages about processors
    try:
        return importlib.import_module("tensorflow")
    except ImportError:
        raise NeoccError(
            "GPT-Neo's own checkpoints are read and written by TensorFlow, which is not there: "
            "pip install 'neocc[tf]'"
        ) from None


def prefix_of(path: Path) -> Path | None:
    """The checkpoint that a path means: a folder's latest, ``model.ckpt-1000`` or its index; or
    none."""
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    if Path(f"{path}.index").is_file():
        return path
    if (path / "checkpoint").is_file():
        text = (path / "checkpoint").read_text("utf-8", "replace")
        latest = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        if latest and (path / f"{Path(latest[1]).name}.index").is_file():
            return path / Path(latest[1]).name
    found = sorted(path.glob("*.index")) if path.is_dir() else []
    return found[0].with_suffix("") if len(found) == 1 else None


def open_checkpoint(prefix: Path, vocab: int) -> dict[str, Variable]:
    """The variables of a checkpoint; of ``wte`` the first ``vocab`` rows, where GPT-Neo's config
    had rounded the vocabulary up.

    Raises:
        NeoccError: TensorFlow is not there, or cannot read it.
    """
    tf = tensorflow()
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
        dtypes = reader.get_variable_to_dtype_map()
    except Exception as error:
        raise NeoccError(f"cannot read {prefix}: {str(error).splitlines()[0]}") from None
    found = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        dtype = np.dtype(dtypes[name].as_numpy_dtype)
        if name.removeprefix(SCOPE).split("/")[0] == "wte" and shape[0] > vocab:
            shape = (vocab, *shape[1:])
        found[name] = Variable(reader, name, dtype, shape)
    return found


def write_checkpoint(
    folder: Path, stem: str, tensors: list[Any], produce: Any, most: float
) -> None:
    """Writes ``STEM.index``, its data files and the file ``checkpoint`` that names it, as many
    bytes at a time as ``most``, or one tensor's."""
    tf = tensorflow()
    shards: list[list[Any]] = [[]]
    for t in tensors:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + t.nbytes > most:
            shards.append([])
        shards[-1].append(t)
    prefixes = []
    for number, shard in enumerate(shards):
        prefix = str(folder / f"{stem}.part-{number:05}")
        arrays = [whole_array(t, produce) for t in shard]
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=[t.name for t in shard],
            shape_and_slices=[""] * len(shard),
            tensors=arrays,
        )
        prefixes.append(prefix)
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=prefixes,
        destination_prefix=str(folder / stem),
        delete_old_dirs=False,
    )
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{stem}"\nall_model_checkpoint_paths: "{stem}"\n', "utf-8"
    )


def whole_array(tensor: Any, produce: Any) -> np.ndarray:
    array = np.empty(math.prod(tensor.shape), tensor.dtype)
    at = 0
    for part in produce(tensor):
        array[at : at + part.size] = part.reshape(-1)
        at += part.size
    return array.reshape(tensor.shape)
