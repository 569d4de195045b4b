"""Calibrating: the devices of this process are measured, and the file is whole or not there."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from neocc.backends import backend
from neocc.backends.tpu.compile import tpu_topology
from neocc.cli import app
from neocc.cost.calibration import chip_of_file, get_field, set_fields
from neocc.cost.collectives import KINDS, collective_time
from neocc.cost.fit import Pass, Product, Transfer
from neocc.cost.hardware import chip, chip_of_row, table_row
from neocc.cost.roofline import elementwise_time, matmul_time
from neocc.cost.topology import topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.lower.hlo import HloFacts, read_hlo
from neocc.runtime import calibrate, measure
from neocc.runtime.calibrate import prepare
from neocc.runtime.measure import Bench, Sweep, Work, product_work, sweep

TINY = Sweep(((8, 16, 24),), (2**12,), (2**13,), call=1e-4, repeats=1)


PRODUCT = """
from neocc import Dim, Graph, einsum
PRESETS = {"one": None}
def train_step(config):
    g = Graph("one")
    w = g.parameter("w", (Dim("embd", 4096), Dim("mlp", 4096)))
    x = g.data("x", (Dim("batch", 4096), Dim("embd", 4096)), "f32")
    return g.build({"y": einsum(x, w, "batch mlp")})
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOCC_DEBUG", raising=False)
    jax.devices()  # as many as conftest asks for, not as many as the first mesh here


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["calibrate", *arguments])


def files() -> list[str]:
    return sorted(p.name for p in Path.cwd().iterdir())


# Measuring.


def test_every_point_of_a_sweep_is_measured_on_real_devices():
    subject = prepare("cpu", Mesh.parse("2x2"))
    bench = Bench(subject.mesh, TINY)
    seen = list(measure.measure(bench, 60.0))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    points = [point for _, _, point in seen]
    assert all(0 < p.seconds < 10 for p in points)
    products = {(p.m, p.n, p.k, p.dtype) for p in points if isinstance(p, Product)}
    assert products == {(8, 16, 24, "bf16"), (8, 16, 24, "f32")}
    passes = {(p.bytes, p.inputs) for p in points if isinstance(p, Pass)}
    assert passes == {((n + 1) * 2**12, n) for n in (1, 2, 3)}
    transfers = {(p.kind, p.axis, p.bytes) for p in points if isinstance(p, Transfer)}
    assert transfers == {(k, a, b) for k in KINDS for a in (0, 1) for b in (2**13,)}


def test_measuring_stops_in_time_at_a_sample_of_everything():
    subject = prepare("cpu", Mesh.parse("4"))
    seen = list(measure.measure(Bench(subject.mesh, TINY), 0.0))
    assert len(seen) == 1
    order = measure.points(Bench(subject.mesh, sweep(64, 2**22)))
    assert len(order) == 32 + 21 + 35


def test_more_work_takes_longer():
    """The loop is not taken apart, nor are products cut to the element that is carried on."""
    subject = prepare("cpu", Mesh.parse("1"))
    bench = Bench(subject.mesh, TINY)
    small = min(measure.product(bench, 64, 64, 64, "f32").seconds for _ in range(5))
    large = min(measure.product(bench, 1024, 1024, 1024, "f32").seconds for _ in range(2))
    assert large > 20 * small  # of 4096 times the FLOPs, on a machine that may be busy


@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_runs_what_is_said_to_be_measured_once_a_run():
    """The programs, compiled for a described slice: whole products, each collective in the loop."""
    mesh = jax.sharding.Mesh(tpu_topology("v5e", (4, 8))[1], ("x", "y"))
    bench = Bench(mesh, sweep(1024, 2**28))

    def compiled(work: Work) -> HloFacts:
        text = bench.lower(work, 7).compile().as_text()
        assert text is not None
        return read_hlo(text)

    for dtype in ("bf16", "f32"):
        found = compiled(product_work(1024, 512, 2048, dtype))
        assert found.flops == 7 * 2 * 1024 * 512 * 2048 and not found.collectives
    for kind in KINDS:
        full = measure.dividing(2**20, 8)
        found = compiled(measure.transfer_work(kind, "y", 8, full))
        (c,) = found.collectives
        name = "collective_permute" if kind == "permute" else kind
        assert (c.kind.replace("-", "_"), c.trip_count) == (name, 7)
        assert c.operand_bytes == (full // 8 if kind == "all_gather" else full)


def test_sizes_are_those_of_an_accelerator_where_there_is_one():
    wide = sweep(1024, 2**28)
    assert (8192, 8192, 8192) in wide.products and (4096, 64, 4096) in wide.products
    assert max(wide.passes) == 2**30
    assert (min(wide.transfers), max(wide.transfers)) == (2**10, 2**28)


# The command, on real devices. How fast a busy machine is, is not known; that what it says
# holds together, is.


def test_calibrating_the_processor_ends_in_a_file_or_in_reasons():
    result = run("--chip", "cpu", "--mesh", "4", "--quick", "--largest", "1MiB", "--residual", "50")
    assert "measuring 4 x cpu as a mesh of 4" in result.stdout
    if result.exit_code == 1:
        assert files() == []
        *reasons, last = result.stderr.strip().splitlines()
        assert reasons and last == "neocc: nothing was written"
        assert all(line.startswith("neocc: ") for line in reasons), result.stderr
        return
    assert result.exit_code == 0, result.output
    assert files() == ["cpu.calibrated.json"]
    found = chip_of_file(Path("cpu.calibrated.json"))
    assert str(found.calibration).startswith("calibrated on 4 x cpu, 20")
    assert 0 < found.matmul_efficiency <= 1.05 and 0 < found.hbm_efficiency <= 1.05
    assert found.switch and found.switch.size == 4
    document = json.loads(Path("cpu.calibrated.json").read_text())
    assert {fit["of"] for fit in document["fits"]} >= {"memory passes", "collectives"}
    assert len(document["points"]) == 12 + 9 + 20


# The command, on devices whose figures are known: the clock is replaced, nothing else.


def figures(name: str, **fields: float) -> dict[str, Any]:
    return set_fields(table_row(name), {k.replace("__", "."): v for k, v in fields.items()})


def clock(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> None:
    """Every point takes what the formulas say for a device with this row."""
    made = chip_of_row("h100", row)
    gap = row.get("kernel_overhead", 0.0)

    def product(bench: Bench, m: int, n: int, k: int, dtype: str) -> Product:
        return Product(m, n, k, dtype, matmul_time(made, 1, m, n, k, dtype) + gap)

    def memory_pass(bench: Bench, size: int, inputs: int) -> Pass:
        moved = (inputs + 1) * size
        return Pass(moved, inputs, elementwise_time(made, moved) + gap)

    def transfer(bench: Bench, kind: str, axis: int, full: int) -> Transfer:
        links = topology(made, bench.mesh.devices.shape).links()
        return Transfer(kind, axis, full, collective_time(kind, full, links[axis]))

    for stand_in in (product, memory_pass, transfer):
        monkeypatch.setattr(measure, stand_in.__name__, stand_in)
    monkeypatch.setattr(calibrate, "UNIT", {})
    monkeypatch.setattr(calibrate, "LARGEST", {})


def test_what_was_measured_is_what_a_plan_is_costed_with(monkeypatch: pytest.MonkeyPatch):
    true = {"matmul_efficiency": 0.5, "nvlink__link__efficiency": 0.6, "hbm_efficiency": 0.75}
    clock(monkeypatch, figures("h100", **true))
    result = run("--chip", "h100", "--mesh", "4")
    assert result.exit_code == 0, result.output
    assert "0.500 (494.5 TFLOP/s)" in result.stdout and "0.600 (270 GB/s)" in result.stdout
    assert files() == ["h100.calibrated.json"]
    found = chip_of_file(Path("h100.calibrated.json"))
    assert found.matmul_efficiency == pytest.approx(0.5, rel=1e-3)
    assert found.switch and found.switch.link.efficiency == pytest.approx(0.6, rel=1e-3)
    assert found.calibration and found.calibration.devices == 4

    Path("product.py").write_text(PRODUCT)
    arguments = ("compile", "product.py", "--mesh", "2x2", "--no-compare")
    plain, fitted = (
        CliRunner().invoke(app, [*arguments, *more, "--json"])
        for more in (("--target", "h100"), ("--hardware", "h100.calibrated.json"))
    )
    assert fitted.exit_code == 0, fitted.output
    before, after = json.loads(plain.stdout)["plan"], json.loads(fitted.stdout)["plan"]
    assert before["chip"]["calibration"] is None
    assert after["chip"]["name"] == "h100"
    assert after["chip"]["calibration"]["device"] == "cpu"  # these devices only seem to be H100s
    assert after["compute"] != before["compute"]
    shown = CliRunner().invoke(app, [*arguments, "--hardware", "h100.calibrated.json"])
    assert "calibrated on 4 x cpu, 20" in shown.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"matmul_efficiency": 1.3}, "matmul_efficiency would be 1.3"),
        ({"nvlink__link__efficiency": 1.2}, "nvlink.link.efficiency would be 1.2"),
    ],
)
def test_nonsense_is_refused_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, float], said: str
):
    clock(monkeypatch, figures("h100", **fields))
    result = run("--chip", "h100", "--mesh", "4")
    assert result.exit_code == 1
    assert said in result.stderr and "nothing was written" in result.stderr
    assert files() == []


def test_a_row_of_its_own_is_kept_in_the_file(monkeypatch: pytest.MonkeyPatch):
    row = {**table_row("h100"), "title": "a board"}
    Path("board.json").write_text(json.dumps(row))
    clock(monkeypatch, set_fields(row, {"hbm_efficiency": 0.5}))
    result = run("--chip", "board.json", "--mesh", "2", "--out", "fitted.json")
    assert result.exit_code == 0, result.output
    found = chip_of_file(Path("fitted.json"))
    assert (found.name, found.title) == ("board", "a board")
    assert found.hbm_efficiency == pytest.approx(0.5, rel=1e-3)
    assert get_field(json.loads(Path("fitted.json").read_text())["row"], "hbm_bandwidth") == 3.35e12


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--chip", "h101"), "unknown chip 'h101'"),
        (("--chip", "none.json"), "cannot read none.json"),
        (("--mesh", "4x"), "4x"),
        (("--chip", "cpu", "--mesh", "4000"), "a mesh of 4000 devices, and JAX has"),
        (("--largest", "much"), "--largest 'much' is no amount of memory"),
        (("--largest", "1KiB"), "less than 128 KiB"),
        (("--chip", "cpu", "--mesh", "1", "--out", "nowhere/x.json"), "no folder nowhere"),
    ],
)
def test_bad_arguments_are_told(arguments: tuple[str, ...], said: str):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert files() == []


def test_a_file_of_another_chip_is_refused(monkeypatch: pytest.MonkeyPatch):
    clock(monkeypatch, figures("h100"))
    assert run("--chip", "h100", "--mesh", "2").exit_code == 0
    Path("product.py").write_text(PRODUCT)
    arguments = ("compile", "product.py", "--mesh", "2", "--hardware")
    result = CliRunner().invoke(app, [*arguments, "h100.calibrated.json", "--target", "v5e"])
    assert result.exit_code == 2
    assert "calibrates h100, not v5e" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "none.json"])
    assert result.exit_code == 2 and "cannot read none.json" in result.stderr


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch):
    clock(monkeypatch, figures("h100"))
    assert run("--chip", "h100", "--mesh", "2").exit_code == 0
    before = Path("h100.calibrated.json").read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("--chip", "h100", "--mesh", "2")
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert files() == ["h100.calibrated.json"]
    assert Path("h100.calibrated.json").read_text() == before


# Devices in their places.


def test_tpus_stand_where_the_topology_has_them():
    devices = [
        SimpleNamespace(
            platform="tpu", device_kind="TPU v5 lite", coords=(i, j, 0), core_on_chip=0, id=9 - i
        )
        for j in range(4)
        for i in range(2)
    ]
    assert backend("tpu").slice_shape(devices) == (2, 4)
    laid = topology(chip("v5e"), (4, 2), (2, 4))
    made = backend("tpu").placed(laid, devices)
    where = laid.coordinates()
    for index in np.ndindex(4, 2):
        assert made[index].coords[:2] == tuple(where[index][1:3])


def test_gpus_of_a_node_are_those_of_one_process():
    devices = [
        SimpleNamespace(platform="gpu", process_index=n % 2, id=n) for n in reversed(range(16))
    ]
    made = backend("gpu").placed(topology(chip("h100"), (2, 8)), devices)
    assert [[d.process_index for d in row] for row in made] == [[0] * 8, [1] * 8]
    assert [d.id for d in made[1]] == [1, 3, 5, 7, 9, 11, 13, 15]
    with pytest.raises(NeoccError, match="--mesh of whole nodes"):
        backend("gpu").placed(topology(chip("h100"), (2, 8)), devices[:12])


def test_one_process_simulates_several_nodes():
    made = backend("gpu").placed(topology(chip("h100"), (2, 8)), [
        SimpleNamespace(platform="cpu", process_index=0, id=n) for n in range(16)
    ])  # fmt: skip
    assert [d.id for d in made.flat] == list(range(16))
