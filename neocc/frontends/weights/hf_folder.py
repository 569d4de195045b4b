"""Folders of Hugging Face checkpoints: config.json beside safetensors files, sharded or not.

The tensors of the models as such begin with ``transformer.h.0``, those of the ones without a head
with ``h.0``: both are read, the first is written. What transformers writes beside the weights is no
part of the model: causal masks as buffers, the output matrix again where it is tied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neocc.frontends.huggingface import PREFIX
from neocc.ir.json_object import read_object
from neocc.runtime import (
    CheckpointError,
    Planned,
    Produce,
    Stored,
    gather_tensors,
    read_header,
    write_shards,
)

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
HEAD = "lm_head.weight"
BUFFERS = ("attn.bias", "attn.masked_bias", "attn.attention.bias", "attn.attention.masked_bias")
# Files that say how text becomes tokens; they go along with the weights.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip


def is_folder(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / INDEX).is_file() or (path / SINGLE).is_file()


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Config and tensors of a folder; the tensors under the names of a model with a head, without
    buffers and without the tied output matrix.

    Raises:
        CheckpointError: a file is missing, not whole, or not what it should be; by the tensor's
            name where there is one.
    """
    config = read_object(folder / CONFIG, CheckpointError)
    if (folder / INDEX).is_file():
        files = read_object(folder / INDEX, CheckpointError).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors to files")
        tensors = gather_tensors(folder, files)
    elif (folder / SINGLE).is_file():
        tensors = read_header(folder / SINGLE)
    else:
        old = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        hint = (
            f"; {old[0]} is of PyTorch: load it with transformers and save_pretrained it anew"
            if old
            else ""
        )
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    bare = not any(n.startswith(PREFIX) for n in tensors)
    named = {PREFIX + n if bare and n != HEAD else n: t for n, t in tensors.items()}
    kept = {n: t for n, t in named.items() if not is_buffer(n)}
    head, wte = kept.pop(HEAD, None), kept.get(f"{PREFIX}wte.weight")
    if head is not None and wte is not None and not same(head, wte):
        raise CheckpointError(
            f"tensor {HEAD!r} of {folder} is not {wte.name!r}: an output matrix of its own is not "
            "read"
        )
    return config, kept


def is_buffer(name: str) -> bool:
    """``h.3.attn.bias`` is a mask, ``h.3.attn.c_attn.bias`` a parameter."""
    inner = name.removeprefix(PREFIX).split(".", 2)
    return len(inner) == 3 and inner[0] == "h" and inner[2] in BUFFERS


def same(a: Stored, b: Stored) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(
        x.tobytes() == y.tobytes() for x, y in zip(a.chunks(), b.chunks(), strict=True)
    )


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Sequence[Planned],
    produce: Produce,
    most: float,
) -> None:
    """Writes into ``folder``; the config, without which transformers loads nothing, at the end."""
    files, _ = write_shards(folder, "model", tensors, produce, most, {"format": "pt"})
    if len(set(files.values())) > 1:
        total = sum(t.nbytes for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
