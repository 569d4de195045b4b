"""GPT-Neo's own checkpoints: how its Mesh TensorFlow variables are called, and reading them.

Names and shapes are those that GPT-Neo's models/gpt2/gpt2.py and optimizers.py made, and Mesh
TensorFlow's transformer/attention.py and layers.py: each variable whole, however it was laid out;
heads and their features as one dim, heads outermost. The optimizer's state is variables beside each
one: of Adam by optimizers.py, of Adafactor by Mesh TensorFlow's optimize.py.
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

from neocc.frontends.weights.forms import LAYER, SIDES, Form, Part, without_moment
from neocc.ir.errors import NeoccError

STEP = "global_step"
SCOPE = "gpt2/"
MLPS = {"mlp": "mlp/conv1d_main", "macaron": "mlp_macaron/conv1d_main"}
WITHIN = {
    **{f"ln{i}.{p}": f"norm_{i}/{p}" for i in (1, 2) for p in "gb"},
    **{f"rezero{i}.g": f"norm_rezero_{i}/g" for i in (1, 2)},
    **{f"attn.{p}": f"attn/{p}" for p in "qkvo"},
    "attn.b": "attn/compute_output_bias/o_b",
    **{f"attn.mem_{p}": f"attn/attention/mem_{p}" for p in "kv"},
    **{f"{ours}.fc": f"{theirs}/c_fc/kernel" for ours, theirs in MLPS.items()},
    **{f"{ours}.fc_b": f"{theirs}/c_fc/bias" for ours, theirs in MLPS.items()},
    **{f"{ours}.proj": f"{theirs}/c_proj/kernel" for ours, theirs in MLPS.items()},
    **{f"{ours}.proj_b": f"{theirs}/c_proj/bias" for ours, theirs in MLPS.items()},
    "moe.up": "wi/kernel",
    "moe.down": "wo/kernel",
}
# The second half of a gated mlp's columns, behind those of the first.
BESIDE = {f"{m}.gate{end}": f"{m}.fc{end}" for m in MLPS for end in ("", "_b")}
HEAD = "wte_final_linear/conv1d_main/linear_out"
OUTSIDE = {
    "wte": "wte", "wpe": "wpe", "wpe_1": "axial_wpe_1", "wpe_2": "axial_wpe_2", "ln_f.g": "ln_f/g",
    "ln_f.b": "ln_f/b", "head.w": f"{HEAD}/kernel", "head.b": f"{HEAD}/bias",
}  # fmt: skip
ADAM = {".m": "/adam_m", ".v": "/adam_v"}
ADAFACTOR = re.compile(r".*_slot_(vr|vc|v|m)")
SLOT = re.compile(r".*(_slot_(vr|vc|v|m)|/adam_[mv])")


def made_by(config: Any) -> tuple[str, str]:
    """What variables are called after: the optimizer of a config of models/gpt.py, and the gating
    of its experts."""
    experts = getattr(config, "experts", None)
    return config.optimizer, "top_2" if experts is None else experts.gating


def variable_form(
    weights: Mapping[str, tuple[int, ...]], optimizer: str = "adam", gating: str = "top_2"
) -> Form:
    """The form of a checkpoint of a model with these weights and moments, by their sides. Adafactor
    has one state for both halves of a gated mlp, which cannot be parted: it has none here.

    Raises:
        NeoccError: GPT-Neo had no variable for one of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    gated = {BESIDE[n] for w in weights if (n := inner(w)) in BESIDE}
    for name, shape in weights.items():
        plain, moment = without_moment(name, weights)
        own = inner(plain)
        if moment and optimizer == "adafactor" and gated:
            continue
        layer = LAYER.fullmatch(plain)
        first = BESIDE.get(own, own)
        if layer and first == "moe.gate":
            variable = f"{gating}_gating/kernel"
        elif layer and first in WITHIN:
            variable = WITHIN[first]
        elif layer is None and own in OUTSIDE:
            variable = OUTSIDE[own]
        else:
            raise NeoccError(f"GPT-Neo has no variable for the weight {name!r}")
        # Of shared parameters the scope has an empty name.
        scope = SCOPE if layer is None else f"{SCOPE}{f'h{layer[1]}' if layer[1] else ''}/"
        variable = f"{scope}{variable}{slot(optimizer, moment, weights[plain])}"
        column = None
        if layer and first in gated:
            column = 0 if own == first else weights[f"h{layer[1]}.{first}{moment}"][-1]
            shape = (*shape[:-1], 2 * shape[-1])
        parts[name], shapes[variable] = Part(variable, column=column), shape
    return Form(shapes, parts, {w: weights[w] for w in parts})


def inner(weight: str) -> str:
    """Its name within a layer."""
    layer = LAYER.fullmatch(weight)
    return layer[2] if layer else weight


def slot(optimizer: str, moment: str, shape: tuple[int, ...]) -> str:
    """What a moment's variable has behind the name of its weight, of such a shape. Adafactor's
    ``vr`` lacks the longer side of a matrix, the first of two equal ones; neocc's the columns."""
    if not moment or optimizer == "adam":
        return ADAM[moment] if moment else ""
    if moment in SIDES and shape[-2] >= shape[-1]:
        moment = {".vr": ".vc", ".vc": ".vr"}[moment]
    return f"_slot_{moment[1:]}"


@dataclass(frozen=True, eq=False)
class Variable:
    """A variable of a checkpoint; of what is more than ``shape`` has, the first."""

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
        array = array[tuple(slice(n) for n in self.shape)]
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


def open_checkpoint(prefix: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Variable]:
    """The variables of a checkpoint. Where GPT-Neo's config had rounded the vocabulary up, of the
    embedding and the output layer as much as is ``wanted``.

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
        vocabulary = name == f"{SCOPE}wte" or name.startswith(VOCABULARY)
        if vocabulary and rounded_up(shape, wanted.get(name, ())):
            shape = wanted[name]
        found[name] = Variable(reader, name, dtype, shape)
    return found


# Variables that have the vocabulary along a side, and their slots.
VOCABULARY = (f"{SCOPE}wte/", f"{SCOPE}wte_slot_", f"{SCOPE}{HEAD}/")


def rounded_up(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one side has more than is wanted, and the others as much."""
    if len(shape) != len(wanted):
        return False
    return sum(a != b for a, b in zip(shape, wanted, strict=True)) == 1 and shape > wanted


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
