"""The safetensors format: against the library of that name, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from neocc.runtime import safetensors as own
from neocc.runtime.safetensors import CODES, CheckpointError, Planned, read_header, write_file

NAMES = st.text("abch.0é", min_size=1, max_size=8)


def drawn(shape: tuple[int, ...], code: str, seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * CODES[code].itemsize)
    if code == "BOOL":
        data = bytes(b % 2 for b in data)
    return np.frombuffer(data, CODES[code]).reshape(shape)


def write(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    planned = [Planned(n, a.dtype, a.shape) for n, a in arrays.items()]
    return write_file(path, planned, lambda t: iter([arrays[t.name]]), {"format": "pt"})


@given(
    st.dictionaries(
        NAMES,
        st.tuples(array_shapes(min_dims=0, min_side=0, max_side=5), st.sampled_from([*CODES])),
        max_size=4,
    ),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: dict[str, tuple[tuple[int, ...], str]],
    chunk: int,
    seed: int,
):
    """Also in chunks of a few bytes, and by rows."""
    arrays = {n: drawn(shape, code, seed) for n, (shape, code) in kinds.items()}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "CHUNK", chunk)
        sums = write(path, arrays)
        found = read_header(path)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            stored = found[name]
            assert (stored.dtype, stored.shape) == (array.dtype, array.shape)
            assert stored.read().tobytes() == array.tobytes()
            assert stored.mapped().tobytes() == array.tobytes()
            assert stored.checksum() == sums[name]
            assert b"".join(c.tobytes() for c in stored.chunks()) == array.tobytes()
            if array.ndim and len(array) > 1:
                assert stored.read(1, 2).tobytes() == array[1:2].tobytes()


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((2, 0)).astype(np.float16),
        "c": np.array(7, np.int64),
        "d": rng.standard_normal(11).astype(ml_dtypes.bfloat16),
        "e": np.array([True, False]),
        "f": rng.standard_normal((4, 6)).T,
    }
    write(tmp_path / "ours", arrays)
    theirs = library.load_file(tmp_path / "ours")
    plain = {n: np.array(a, order="C") for n, a in arrays.items()}
    library.save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    ours = {n: t.read() for n, t in read_header(tmp_path / "theirs").items()}
    for name, array in arrays.items():
        for read in (theirs[name], ours[name]):
            assert (read.shape, read.tobytes()) == (array.shape, array.tobytes()), name


@pytest.mark.parametrize("part", range(0, 100, 9))
def test_a_file_cut_anywhere_is_refused(part: int, tmp_path: Path):
    path = tmp_path / "x"
    write(path, {"a": np.arange(4.0), "b": np.arange(6, dtype=np.int32).reshape(2, 3)})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * part // 100])
    with pytest.raises(CheckpointError, match=r"start of one|no JSON|'[ab]'.*truncated"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "no JSON object"),
        ({"a": 3}, "tensor 'a' of .*: its header is 3"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'a' .* 8 bytes; .* 4"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "'a' .* dtype 'F99'"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, r"'a' .* \[-2\]"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "'a' .* begins at byte"),
        (
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"},
            "'b' of .* begins at byte",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "by its header it should"),
    ],
)
def test_a_header_that_is_not_right_is_refused(header: object, message: str, tmp_path: Path):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "x")


def test_a_tensor_that_is_produced_wrong_is_an_error(tmp_path: Path):
    planned = [Planned("a", np.dtype(np.float32), (3,))]
    with pytest.raises(ValueError, match="a is float32, produced as float64"):
        write_file(tmp_path / "x", planned, lambda t: iter([np.zeros(3)]))
    with pytest.raises(ValueError, match="a has 12 bytes, produced with 8"):
        write_file(tmp_path / "x", planned, lambda t: iter([np.zeros(2, np.float32)]))
