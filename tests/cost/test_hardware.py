"""The table's figures arrive in a Chip as they were published, per device."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from neocc.cost.hardware import HardwareError, chip, chip_names

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "hardware.json"
ROWS = {
    "v3": "tpu_v3",
    "v4": "tpu_v4",
    "v5e": "tpu_v5e",
    "v5p": "tpu_v5p",
    "v6e": "tpu_v6e",
    "tpu7x": "tpu7x_ironwood",
    "v100": "v100_sxm2_32gb",
    "a100-40gb": "a100_sxm_40gb",
    "a100-80gb": "a100_sxm_80gb",
    "h100": "h100_sxm_80gb",
    "h100-500w": "h100_grand_teton_96gb",
    "h200": "h200_sxm",
    "b200": "b200_hgx",
    "gb200": "gb200_nvl72",
}


def test_figures_are_si_and_per_device():
    v5p, v3, h100 = chip("v5p"), chip("v3"), chip("h100")
    assert v5p.flops("bf16") == 459e12
    assert v5p.hbm_bandwidth == 2765e9
    assert v5p.hbm_bytes == pytest.approx(95.74 * 2**30, abs=1)
    assert v5p.torus and v5p.torus.link.bandwidth == 90e9
    # A v3 device is one of the two cores of a chip.
    assert v3.devices_per_chip == 2
    assert v3.flops("bf16") == 123e12 / 2
    assert v3.torus and v3.torus.link.bandwidth == 100e9 / 2
    assert h100.switch and (h100.switch.size, h100.switch.link.bandwidth) == (8, 450e9)
    assert h100.network.bandwidth == 50e9


def test_aliases_name_the_same_chip():
    assert chip("a100").name == "a100-80gb"
    assert chip("Trillium") == chip("v6e")


def test_an_unknown_chip_names_the_nearest():
    with pytest.raises(HardwareError, match=r"unknown chip 'h10'; did you mean .*h100.*known: v3"):
        chip("h10")
    with pytest.raises(HardwareError, match=r"unknown chip 'abacus'; known: v3"):
        chip("abacus")


def test_a_dtype_without_a_rate_is_refused_by_name():
    with pytest.raises(HardwareError, match=r"v5p has no matrix-product rate for 'bool'"):
        chip("v5p").flops("bool")


@pytest.mark.parametrize("name", chip_names())
def test_every_row_is_sane(name: str):
    c = chip(name)
    assert c.sources
    assert all(0 < e <= 1 for e in (c.matmul_efficiency, c.hbm_efficiency, c.network.efficiency))
    assert 10e9 < c.hbm_bytes < 300e9
    assert 100e9 < c.hbm_bandwidth < 10e12
    assert 1e13 < c.flops("bf16") < 1e16
    assert c.flops("f64") < c.flops("bf16")
    assert (c.torus is None) == (c.kind == "gpu")
    for link in (c.network, *(part.link for part in (c.torus, c.switch) if part)):
        assert 1e9 < link.rate < 1e12
        assert 0 < link.latency < 1e-3
    assert hash(c) == hash(chip(name))


@pytest.mark.parametrize("name", chip_names())
def test_assumptions_name_fields_of_the_row(name: str):
    row = json.loads(resources.files("neocc.cost").joinpath("hardware.json").read_text())
    for path in chip(name).assumptions:
        node = row["chips"][name]
        for key in path.split("."):
            assert key in node, f"{name}: an assumption speaks of {path}, which is no field"
            node = node[key]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the collected figures are not beside the repo")
@pytest.mark.parametrize("name", ROWS)
def test_the_table_agrees_with_the_collected_figures(name: str):
    row = json.loads(PUBLISHED.read_text())[ROWS[name]]
    c = chip(name)
    per_chip = c.devices_per_chip
    for dtype, key in (("bf16", "bf16"), ("f16", "fp16"), ("f8", "fp8"), ("f4", "fp4")):
        if row.get(f"peak_{key}_tflops"):
            assert c.flops(dtype) * per_chip == pytest.approx(row[f"peak_{key}_tflops"] * 1e12)
    assert c.hbm_bandwidth * per_chip == pytest.approx(row["hbm_gbps"] * 1e9)
    assert c.hbm_bytes * per_chip <= row["hbm_gb"] * 2**30 * 1.01
    if c.torus:
        assert c.torus.link.bandwidth * per_chip == pytest.approx(row["ici_link_oneway_gbps"] * 1e9)
        assert len(c.torus.max_shape) == row["torus_dims"]
    elif c.switch:
        assert c.switch.link.bandwidth == row["nvlink_oneway_gbps"] * 1e9
        assert c.switch.size == row["nvlink_domain"]
        if row["nic_oneway_gbps_per_gpu"]:
            assert c.network.bandwidth == row["nic_oneway_gbps_per_gpu"] * 1e9
