"""Checkpoints: folders of safetensors files that are there as a whole or not at all.

neocc's own has ``manifest.json`` beside them: the model that it is of, the step, and dims, dtype,
file and checksum of every tensor by the name that the model's program gives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neocc.ir.errors import NeoccError
from neocc.ir.json_object import read_object
from neocc.ir.types import DTYPES, TensorType
from neocc.runtime.safetensors import (
    CheckpointError,
    Planned,
    Produce,
    Stored,
    read_header,
    write_file,
)
from neocc.runtime.schema import check, schema
from neocc.version import VERSION

KIND, SCHEMA, MANIFEST = "neocc checkpoint", 1, "manifest.json"
SHARD = 4 * 10**9  # bytes of a file, unless one tensor has more
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ModelOf:
    """The model that a checkpoint is of: its file, its name, the fields of its config."""

    file: str
    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One of neocc's own. ``step``: steps that it was trained; ``dims``: of each tensor, name and
    size; ``sums``: CRC-32 of each tensor's bytes."""

    path: Path
    neocc: str
    model: ModelOf
    step: int
    tensors: Mapping[str, Stored]
    dims: Mapping[str, tuple[tuple[str, int], ...]]
    sums: Mapping[str, int]

    def verify(self) -> None:
        """Reads it all.

        Raises:
            CheckpointError: a tensor's bytes are not those that were written.
        """
        for name, stored in self.tensors.items():
            if stored.checksum() != self.sums[name]:
                raise CheckpointError(
                    f"tensor {name!r} of {self.path}: its bytes in {stored.path.name} are not "
                    "those that were written"
                )

    def find(self, name: str, type: TensorType) -> Stored:
        """The tensor of that name, which has these dims; of whatever float dtype.

        Raises:
            CheckpointError: there is none, or it has others.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}, which the model needs")
        dims = tuple((d.name, d.size) for d in type.dims)
        stored = self.tensors[name]
        floats = type.is_float and NAME_OF.get(stored.dtype) in ("f64", "f32", "bf16", "f16")
        if dims != self.dims[name] or not (floats or stored.dtype == DTYPES[type.dtype]):
            have = ", ".join(f"{n}={size}" for n, size in self.dims[name])
            raise CheckpointError(
                f"tensor {name!r} of {self.path} is {NAME_OF[stored.dtype]}[{have}]; the model has "
                f"{type.with_layout(None)}"
            )
        return stored


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` at the end. If anything is raised before, it is
    removed; if the process is killed before, what is left beside ``path`` has another name.

    Raises:
        CheckpointError: ``path`` is there already, or the file system refuses something.
    """
    if path.exists():
        raise CheckpointError(f"{path} is there already: give another name, or remove it")
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            flush(file)
        flush(part)
        part.rename(path)
        flush(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def flush(path: Path) -> None:
    """What was written to a file or folder is on the disk after it."""
    if path.is_dir() and sys.platform == "win32":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def leftovers(path: Path) -> list[Path]:
    """What killed writers of ``path`` left behind."""
    return sorted(path.parent.glob(f".{path.name}.partial-*"))


def write_shards(
    folder: Path,
    stem: str,
    tensors: Sequence[Planned],
    produce: Produce,
    most: float = SHARD,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], dict[str, int]]:
    """Writes ``STEM.safetensors``, or where that had more than ``most`` bytes
    ``STEM-00001-of-0000N.safetensors``; file and CRC-32 of each tensor."""
    shards: list[list[Planned]] = [[]]
    for t in tensors:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + t.nbytes > most:
            shards.append([])
        shards[-1].append(t)
    files: dict[str, str] = {}
    sums: dict[str, int] = {}
    for number, shard in enumerate(shards, 1):
        end = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{stem}{end}.safetensors"
        sums |= write_file(folder / name, shard, produce, metadata)
        files |= {t.name: name for t in shard}
    return files, sums


def write_checkpoint(
    folder: Path,
    model: ModelOf,
    step: int,
    tensors: Sequence[Planned],
    dims: Mapping[str, Sequence[tuple[str, int]]],
    produce: Produce,
    most: float = SHARD,
) -> None:
    """Writes one of neocc's own into ``folder`` (see ``whole``); the manifest, without which it is
    none, at the end."""
    files, sums = write_shards(folder, "weights", tensors, produce, most)
    manifest = {
        "kind": KIND,
        "schema": SCHEMA,
        "neocc": VERSION,
        "model": {"file": model.file, "name": model.name, "config": dict(model.config)},
        "step": step,
        "tensors": {
            t.name: {
                "dtype": NAME_OF[t.dtype],
                "dims": dict(dims[t.name]),
                "file": files[t.name],
                "crc32": sums[t.name],
            }
            for t in tensors
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_checkpoint(path: Path) -> Checkpoint:
    """One of neocc's own; of its tensors only dtype, shape and place are read.

    Raises:
        CheckpointError: it is none, or a tensor is not there, not whole, or not as the manifest
            says.
    """
    if not is_checkpoint(path):
        raise CheckpointError(f"{path} is no checkpoint of neocc: it has no {MANIFEST}")
    data = read_object(path / MANIFEST, CheckpointError)
    try:
        check(data, schema("checkpoint"))
    except NeoccError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from None
    said: dict[str, Any] = data["tensors"]
    tensors = gather(path, {name: t["file"] for name, t in said.items()})
    for name, t in said.items():
        shape, dtype = tuple(t["dims"].values()), DTYPES[t["dtype"]]
        if (tensors[name].shape, tensors[name].dtype) != (shape, dtype):
            raise CheckpointError(
                f"tensor {name!r} of {path} is {tensors[name]} in {t['file']}; {MANIFEST} says "
                f"{dtype}{list(shape)}"
            )
    model = ModelOf(data["model"]["file"], data["model"]["name"], data["model"]["config"])
    dims = {name: tuple(t["dims"].items()) for name, t in said.items()}
    sums = {name: t["crc32"] for name, t in said.items()}
    return Checkpoint(path, data["neocc"], model, data["step"], tensors, dims, sums)


def gather(folder: Path, files: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors of a folder by name, from the file that each is said to be in.

    Raises:
        CheckpointError: a tensor is in none, or its file is missing or not whole.
    """
    headers: dict[str, dict[str, Stored]] = {}
    found = {}
    for name, file in files.items():
        if Path(file).name != file:
            raise CheckpointError(f"tensor {name!r} of {folder}: {file!r} is no file name")
        if not (folder / file).is_file():
            raise CheckpointError(f"tensor {name!r}: its file {folder / file} is missing")
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise CheckpointError(f"tensor {name!r} is not in {folder / file}, where it should be")
        found[name] = headers[file][name]
    return found
