"""Backends: those of neocc and one that another package adds through an entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from neocc import backends
from neocc.backends import BUILT_IN, backend
from neocc.backends.base import BackendError
from neocc.backends.here import here
from neocc.backends.target import compile_for_target
from neocc.cli import app
from neocc.cost.hardware import HardwareError, chip
from neocc.cost.topology import topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.lower.hlo import axes_of, read_hlo
from neocc.passes.plan import make_plan

ROOT = Path(__file__).parent.parent.parent
ABACUS = """
import jax
from neocc.backends.base import Backend, Option, compile_lowered

FRAME = {"bandwidth": 1e9, "efficiency": 0.5, "latency": 1e-6}
ROW = {
    "kind": "abacus",
    "title": "Abacus",
    "device": "one frame",
    "devices_per_chip": 1,
    "peak_flops": {"bf16": 1e12, "f32": 1e12},
    "matmul_tile": [8, 8, 8],
    "matmul_efficiency": 0.9,
    "hbm_bytes_per_device": 1e10,
    "hbm_bandwidth": 1e11,
    "hbm_efficiency": 0.9,
    "collective_overhead": 1e-6,
    "host": {"size": 4, "link": FRAME},
    "network": FRAME,
    "sources": ["a test"],
    "assumptions": {},
}
seen = {"options": [], "ops": []}


def compiled(lowered, options):
    seen["options"].append(dict(options))
    return compile_lowered(lowered, options)


def counted(op, operands, ctx):
    seen["ops"].append(op.kind)
    return None  # left to the op's own meaning


BACKEND = Backend(
    kind="abacus",
    describe=lambda laid: jax.devices("cpu"),
    start=lambda count: jax.devices("cpu")[:count],
    rows={"abacus-1": ROW},
    device_kinds={"Abacus One": "abacus-1"},
    options=(Option("xla_embed_ir_in_executable", False, "beads carry no IR"),),
    compile=compiled,
    kernels={"einsum": counted},
)
"""


@pytest.fixture
def abacus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package that is installed as pip would leave it: a module, and metadata that names it."""
    (tmp_path / "abacus_backend.py").write_text(ABACUS)
    info = tmp_path / "abacus_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[neocc.backends]\nabacus = abacus_backend:BACKEND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield info
    sys.modules.pop("abacus_backend", None)


def test_a_plan_is_made_and_compiled_for_a_backend_of_another_package(abacus, tmp_path: Path):
    out = tmp_path / "out"
    model = str(ROOT / "models" / "gpt.py")
    arguments = ["compile", model, "--preset", "tiny", "--mesh", "2x4", "--no-compare"]
    arguments += ["--target", "abacus-1", "--layout", "batch:x,heads:y"]
    result = CliRunner().invoke(app, [*arguments, "--emit", "hlo,plan", str(out)])
    assert result.exit_code == 0, result.output
    assert "8 x Abacus" in result.output
    facts = read_hlo((out / "step.hlo.txt").read_text())
    assert facts.devices == 8
    assert {axes_of(c.groups, (2, 4)) for c in facts.collectives} & {(0,), (1,)}
    seen = sys.modules["abacus_backend"].seen
    assert seen["options"] == [{"xla_embed_ir_in_executable": False}]
    assert "einsum" in seen["ops"]
    again = CliRunner().invoke(app, ["compile", "--plan", str(out / "plan.json"), "--no-compare"])
    assert again.exit_code == 0, again.output


def test_its_chips_and_devices_are_known(abacus):
    assert backends.chip("abacus-1").hbm_bytes == 10**10
    assert backends.device_chip("Abacus One") == "abacus-1"
    assert backends.chip("a100").name == "a100-80gb"
    with pytest.raises(HardwareError, match=r"unknown chip 'abacus-2'.*abacus-1"):
        backends.chip("abacus-2")
    with pytest.raises(NeoccError, match=r"kind 'slide rule'; there are .*abacus"):
        backend("slide rule")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("abacus = abacus_backend:MISSING", "does not load"),
        ("abacus = abacus_backend:ROW", "is a dict"),
        ("one = abacus_backend:BACKEND\ntwo = abacus_backend:BACKEND", "is taken"),
    ],
)
def test_an_entry_point_that_is_no_backend_is_named(abacus: Path, entry: str, words: str):
    (abacus / "entry_points.txt").write_text(f"[neocc.backends]\n{entry}\n")
    with pytest.raises(NeoccError, match=words):
        backends.chip("abacus-1")


@pytest.mark.parametrize("kind", BUILT_IN)
def test_each_backend_gives_a_reason_for_each_of_its_options(kind: str):
    made = backend(kind)
    assert made.kind == kind
    assert all(option.why for option in made.options)
    assert made.compiler_options({"more": 1}) == made.compiler_options() | {"more": 1}


def test_a_processor_compiles_a_plan_for_its_simulated_devices(tmp_path: Path):
    """The same path as an accelerator's: devices in mesh order, lowered, compiled, read."""
    from models import gpt

    row = {**backends.row("h100")[1], "kind": "cpu"}
    made = make_plan(
        gpt.train_step(gpt.PRESETS["tiny"]),
        Mesh.parse("2x4"),
        backends.chip_of_row("desk", row),
        "batch:x,heads:y",
    )
    target = compile_for_target(made)
    planned = {(c.kind.replace("_", "-"), c.axis) for c in made.collectives if c.kind != "slice"}
    found = {
        (c.kind, "xy"[axes[0]])
        for c in read_hlo(target.hlo).collectives
        if (axes := axes_of(c.groups, (2, 4))) and len(axes) == 1
    }
    assert found and found <= planned
    assert 0 < target.peak <= target.reserved


def test_devices_that_are_not_whole_nodes_are_refused():
    devices = [SimpleNamespace(process_index=n // 8, id=n) for n in range(12)]
    with pytest.raises(BackendError, match="--mesh of whole nodes"):
        backend("gpu").placed(topology(chip("h100"), (2, 8)), devices)


def test_an_nvlink_domain_may_span_hosts():
    """72 GPUs of GB200 in one domain are 18 hosts of 4."""
    devices = [SimpleNamespace(process_index=n // 4, id=n) for n in reversed(range(144))]
    placed = backend("gpu").placed(topology(chip("gb200"), (2, 72)), devices)
    assert np.array_equal(np.vectorize(lambda d: d.id)(placed), np.arange(144).reshape(2, 72))


def test_a_model_trains_on_the_devices_of_its_target(abacus, tmp_path: Path):
    """Placed, lowered and compiled as the plan is audited: with the backend's kernels, options and
    own way to compile."""
    text = tmp_path / "text.txt"
    text.write_text("one frame after the other, " * 40)
    arguments = ["train", "gpt.py", "--preset", "tiny", "--mesh", "2x2", "--text", str(text)]
    arguments += ["--steps", "1", "--set", "layers=1", "--layout", "batch:x,heads:y"]
    losses = []
    for more in (["--target", "abacus-1", "--devices", "target"], ["--target", "abacus-1"]):
        log = tmp_path / f"{len(losses)}.jsonl"
        result = CliRunner().invoke(app, [*arguments, *more, "--log", str(log)])
        assert result.exit_code == 0, result.output
        losses.append(json.loads(log.read_text())["loss"])
        seen = sys.modules["abacus_backend"].seen
        assert seen["options"] == [{"xla_embed_ir_in_executable": False}]
        assert "einsum" in seen["ops"]
    assert losses[0] == losses[1]


def test_devices_that_are_not_here_are_an_error():
    with pytest.raises(NeoccError, match="devices are simulated or target, not 'real'"):
        here("real", backends.chip("h100"), 4)
    with pytest.raises(NeoccError, match=r"JAX finds no .*here"):
        here("target", backends.chip("h100"), 4)
