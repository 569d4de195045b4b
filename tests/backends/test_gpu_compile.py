"""The real GPU compiler, run without a GPU; and what is true of it where it is not installed."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace

import pytest

from models import gpt
from neocc.backends import backend
from neocc.backends.gpu import compile as gpu
from neocc.backends.gpu.compile import PLUGINS, GpuCompileError, describe
from neocc.backends.gpu.devices import DESCRIPTIONS
from neocc.backends.target import compile_for_target
from neocc.cost.hardware import chip, chip_names
from neocc.cost.topology import topology
from neocc.ir.mesh import Mesh
from neocc.lower.audit import audit, summary
from neocc.passes.plan import make_plan

needs_plugin = pytest.mark.skipif(
    not any(importlib.util.find_spec(plugin) for plugin in PLUGINS),
    reason="JAX's CUDA plugin is not installed",
)


def test_a_missing_compiler_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GpuCompileError, match=r"pip install 'neocc\[gpu\]'"):
        describe(topology(chip("h100"), (8,)))


def test_every_gpu_of_the_table_is_described_as_the_table_has_it():
    gpus = [chip(name) for name in chip_names() if chip(name).kind == "gpu"]
    # CUDA 13 compiles for none of Volta; the other is a board of one published run.
    assert {c.name for c in gpus} == {"v100", "h100-500w", *DESCRIPTIONS}
    with pytest.raises(GpuCompileError, match="v100 is no GPU that can be compiled for"):
        describe(topology(chip("v100"), (8,)))
    for c in (c for c in gpus if c.name in DESCRIPTIONS):
        described = DESCRIPTIONS[c.name]
        assert c.sm is not None and c.sm.count == pytest.approx(described.cores, rel=0.07)
        assert described.bandwidth == pytest.approx(c.hbm_bandwidth, rel=0.05)
        assert c.hbm_bytes <= described.memory <= 1.12 * c.hbm_bytes  # less is what a user has
        assert f'"{described.name}"' in described.text()


@needs_plugin
def test_a_mesh_gets_nodes_of_eight_with_one_axis_inside():
    laid = topology(chip("h100"), (16, 8))
    placed = backend("gpu").devices(laid)
    assert placed.shape == (16, 8)
    assert [{d.process_index for d in row} for row in placed] == [{n} for n in range(16)]


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_a_step_compiles_for_gpus_and_does_what_its_plan_says(name: str):
    small = replace(gpt.PRESETS["tiny"], embd=64, batch=8, vocab=100, dtype="bf16", layers=3)
    small = replace(small, recompute=False)
    layout = "batch:x,heads:y,mlp:y,vocab:y"
    plan = make_plan(gpt.train_step(small), Mesh.parse("2x4"), chip(name), layout)
    target = compile_for_target(plan)
    found = audit(plan, target.hlo, target.peak, target.reserved)
    assert found.collectives_ok, [f for f in found.findings if not f.ok]
    assert found.flops_equal
    verdicts = Counter(summary(found.findings))
    assert verdicts.total() == len(found.findings)
