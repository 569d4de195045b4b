"""A conversion holds a little of a checkpoint at a time, however large it is."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from benchmarks.convert_memory import make, measure
from neocc.frontends.weights.convert import convert
from neocc.runtime import safetensors


def test_arrays_of_a_conversion_are_a_small_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As Python counts them, with chunks of 64 KiB."""
    size = make(tmp_path / "hf", 2e7)
    convert(tmp_path / "hf", tmp_path / "warm", "neocc")  # imports, the model's program
    monkeypatch.setattr(safetensors, "CHUNK", 2**16)
    largest = 4 * 128 * 4 * 128 * 4  # of one layer's matrices: bytes
    for source, target, kind in (("hf", "ours", "neocc"), ("ours", "back", "hf")):
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / target, kind, most=3e6)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(list((tmp_path / target).glob("*.safetensors"))) > 3
        assert peak < min(size / 3, 3 * largest), (kind, peak, size)


@pytest.mark.slow
def test_the_peak_of_a_process_is_bounded(tmp_path: Path):
    """0.4 GB within 0.12 GB above what Python and its libraries take."""
    found = measure(3e8, tmp_path)
    assert found["bytes"] > 4e8
    for way in ("to_neocc", "to_hf"):
        assert found[way]["bytes"] == found["bytes"]
        assert found[way]["peak"] - found["floor"] < 0.12e9, found
