"""Hardware files: read back as they were written, checked, and refused where they do not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neocc.cost.calibration import chip_of_file, read_row
from neocc.cost.hardware import HardwareError, chip, chip_names, device_chip, table_row

FILE: dict[str, Any] = {
    "schema": 1,
    "chip": "h100",
    "device": {"kind": "NVIDIA H100 80GB HBM3", "count": 8},
    "date": "2026-11-25",
    "fields": {"matmul_efficiency": 0.61, "nvlink.link.latency": 4e-6, "peak_flops.f32": 4e14},
    "nominal": {"peak_flops.bf16": 989e12},
    "row": None,
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "h100.calibrated.json"
    path.write_text(json.dumps({**FILE, **changes}))
    return path


def test_a_file_changes_the_fields_that_it_has_and_no_others(tmp_path: Path):
    found, table = chip_of_file(written(tmp_path)), chip("h100")
    assert found.matmul_efficiency == 0.61
    assert found.switch and found.switch.link.latency == 4e-6
    assert found.flops("f32") == 4e14
    assert found.flops("bf16") == table.flops("bf16")
    assert (found.network, found.hbm_efficiency) == (table.network, table.hbm_efficiency)
    assert str(found.calibration) == "calibrated on 8 x NVIDIA H100 80GB HBM3, 2026-11-25"
    assert table.calibration is None
    assert "matmul_efficiency" in table.assumptions
    assert "matmul_efficiency" not in found.assumptions


def test_a_row_of_its_own_needs_no_table(tmp_path: Path):
    row = {**table_row("h100"), "title": "a board"}
    found = chip_of_file(written(tmp_path, chip="board", row=row))
    assert (found.name, found.title, found.matmul_efficiency) == ("board", "a board", 0.61)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "no hardware file of schema 1"),
        ({"chip": "h101"}, "unknown chip 'h101'"),
        ({"fields": {"matmul_eficiency": 0.5}}, "no field 'matmul_eficiency'"),
        ({"fields": {"nvlink.domain": 16}}, "sets nvlink.domain, which no calibration fits"),
        ({"fields": {"matmul_efficiency": 1.2}}, "1.2, which is out of range"),
        ({"fields": {"matmul_efficiency": "high"}}, "'high', which is out of range"),
        ({"fields": {"matmul_efficiency": True}}, "out of range"),
        ({"fields": {"collective_overhead": -1e-6}}, "-1e-06, which is out of range"),
        ({"nominal": {"hbm_bandwidth": 2e12}}, "hbm_bandwidth = 2e+12, and h100 has 3.35e+12"),
        ({"device": None}, "is not whole"),
        ({"fields": 7}, "is not whole"),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(HardwareError) as caught:
        chip_of_file(written(tmp_path, **changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_what_is_no_file(tmp_path: Path, text: str, said: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(HardwareError, match=said):
        chip_of_file(tmp_path / "x.json")
    with pytest.raises(HardwareError, match="cannot read"):
        chip_of_file(tmp_path / "none.json")


def test_a_nominal_row_is_read_and_checked(tmp_path: Path):
    path = tmp_path / "l40.json"
    row = table_row("h100")
    path.write_text(json.dumps(row))
    assert read_row(path) == ("l40", row)
    path.write_text(json.dumps({**row, "name": "L40S"}))
    assert read_row(path)[0] == "L40S"
    del row["hbm_bandwidth"]
    path.write_text(json.dumps(row))
    with pytest.raises(HardwareError, match="the row of l40 lacks the field 'hbm_bandwidth'"):
        read_row(path)
    path.write_text(json.dumps({**table_row("h100"), "matmul_tile": 7}))
    with pytest.raises(HardwareError, match="the row of l40 is not right"):
        read_row(path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_devices_are_known_by_the_name_that_jax_gives_them(kind: str, name: str):
    assert device_chip(kind) == name
    assert name in chip_names()


def test_another_device_is_not_taken_for_one_that_is_known():
    with pytest.raises(HardwareError, match=r"'NVIDIA H100 PCIe'.*--chip .*a file with a row"):
        device_chip("NVIDIA H100 PCIe")
