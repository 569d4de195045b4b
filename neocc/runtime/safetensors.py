"""Files in the safetensors format, read by rows and written as a stream: never held whole.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte
offsets of each tensor by name), and the tensors' bytes one after the other, row-major and
little-endian (format: https://github.com/huggingface/safetensors). The library of that name holds
all tensors of a file that it writes, and has no bf16 without PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neocc.ir.errors import NeoccError

CODES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
LONGEST_HEADER = 100 * 2**20  # as the format's own library allows
CHUNK = 32 * 2**20  # bytes that are read or written at a time


class CheckpointError(NeoccError):
    """A checkpoint is not whole, not right, or of another model."""


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Stored(Planned):
    """A tensor in a file, from byte ``start`` of it on."""

    path: Path
    start: int

    @property
    def rows(self) -> int:
        """Along the first dim; a scalar has one."""
        return self.shape[0] if self.shape else 1

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows ``first`` to ``last`` in an array of their own; a scalar whole.

        Raises:
            CheckpointError: the file has fewer bytes than its header said.
        """
        last = self.rows if last is None else last
        row = self.nbytes // self.rows if self.rows else 0
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        array = np.empty(shape, self.dtype)
        into = array.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * row)
            done = 0
            while done < len(into):
                count = file.readinto(into[done : done + CHUNK])
                if not count:
                    raise CheckpointError(f"tensor {self.name!r}: {self.path} ends within it")
                done += count
        return array

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]:
        """Rows ``first`` to ``last``, as many at a time as make a chunk."""
        last = self.rows if last is None else last
        row = self.nbytes // self.rows if self.rows else 0
        step = max(1, CHUNK // max(row, 1))
        for at in range(first, last, step):
            yield self.read(at, min(at + step, last))

    def mapped(self) -> np.ndarray:
        """The tensor as the file's own pages, read as they are touched; not to be written."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.start, self.shape)

    def checksum(self) -> int:
        crc = 0
        for chunk in self.chunks():
            crc = zlib.crc32(as_bytes(chunk), crc)
        return crc


def as_bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, none of them read yet.

    Raises:
        CheckpointError: it is not a safetensors file, or not a whole one; with the name of the
            first tensor that is not right.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or only the start of one")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    found = {name: entry(path, name, said, 8 + length, size) for name, said in header.items()}
    end = 8 + length
    for stored in sorted(found.values(), key=lambda s: (s.start, s.nbytes)):
        if stored.start != end:
            raise CheckpointError(
                f"tensor {stored.name!r} of {path} begins at byte {stored.start}; the one before "
                f"ends at {end}"
            )
        end += stored.nbytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes; by its header it should have {end}")
    return found


def entry(path: Path, name: str, said: Any, base: int, size: int) -> Stored:
    match said:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise CheckpointError(f"tensor {name!r} of {path}: its header is {said!r}")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"tensor {name!r} of {path} has the shape {shape}")
    if code not in CODES:
        raise CheckpointError(f"tensor {name!r} of {path} has the unknown dtype {code!r}")
    stored = Stored(name, CODES[code], tuple(shape), path, base + start)
    if stop - start != stored.nbytes:
        raise CheckpointError(
            f"tensor {name!r} of {path} is {stored}, {stored.nbytes} bytes; its header gives it "
            f"{stop - start}"
        )
    if base + stop > size:
        raise CheckpointError(
            f"tensor {name!r} ends at byte {base + stop} of {path}, which has {size}: the file is "
            "truncated"
        )
    return stored


Produce = Callable[[Planned], Iterable[np.ndarray]]


def write_file(
    path: Path,
    tensors: Sequence[Planned],
    produce: Produce,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes the tensors in this order, each from the arrays of ``produce(tensor)``, whose elements
    one after the other are the tensor's; the CRC-32 of each one's bytes.

    Raises:
        ValueError: a tensor is produced in another dtype or with another number of elements.
        OSError: as of any file.
    """
    header: dict[str, Any] = {} if not metadata else {"__metadata__": dict(metadata)}
    at = 0
    for t in tensors:
        offsets = [at, at + t.nbytes]
        header[t.name] = {
            "dtype": CODE_OF[t.dtype],
            "shape": list(t.shape),
            "data_offsets": offsets,
        }
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            crc = count = 0
            for array in produce(t):
                if array.dtype != t.dtype:
                    raise ValueError(f"{t.name} is {t.dtype}, produced as {array.dtype}")
                count += array.nbytes
                for block in blocks(array):
                    data = as_bytes(block)
                    crc = zlib.crc32(data, crc)
                    file.write(data)
            if count != t.nbytes:
                raise ValueError(f"{t.name} has {t.nbytes} bytes, produced with {count}")
            sums[t.name] = crc
        file.flush()
        os.fsync(file.fileno())
    return sums


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array by rows, a chunk at a time: a transposed one is not copied as a whole."""
    if array.nbytes <= CHUNK or array.ndim == 0:
        yield array
        return
    step = max(1, CHUNK // (array.nbytes // len(array)))
    for at in range(0, len(array), step):
        yield array[at : at + step]
