"""A step on devices of several processes, as on a cluster's hosts: the same losses and the same
checkpoint as on those of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models import gpt
from neocc.cost.hardware import chip
from neocc.ir.mesh import Mesh
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.checkpoint import ModelOf, read_checkpoint
from neocc.runtime.train import Run

CONFIG = gpt.PRESETS["tiny"]
MODEL = ModelOf("gpt.py", "tiny", {})
ROOT = Path(__file__).parents[2]


def trained(path: Path) -> list[float]:
    """Two steps on 2x2, saved; their losses."""
    step, layout = simplify(gpt.train_step(CONFIG)), "batch:x,heads:y,mlp:y,vocab:y"
    run = Run(make_plan(step, Mesh.parse("2x2"), chip("v5e"), layout), gpt.init(CONFIG), 5)
    numbers, shape = np.random.default_rng(5), (CONFIG.batch, CONFIG.seq)
    tokens = numbers.integers(CONFIG.vocab, size=(2, *shape), dtype=np.int32)
    losses = [run.step({"tokens": t, "labels": t[::-1]})["loss"] for t in tokens]
    run.save(path, MODEL, 2)
    return losses


def test_two_processes_train_and_save_as_one_does(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, f"localhost:{port}", str(tmp_path / "two")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    both = [subprocess.Popen([*command, str(i)], env=env) for i in range(2)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    expected = trained(tmp_path / "one")
    for i in range(2):
        losses = json.loads((tmp_path / f"two.{i}").read_text())
        assert losses == pytest.approx(expected, rel=1e-6)
    one, two = (read_checkpoint(tmp_path / n).tensors for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name].mapped(), tensor.mapped(), atol=1e-6)


if __name__ == "__main__":
    address, out, number = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number))
    Path(f"{out}.{number}").write_text(json.dumps(trained(Path(out))))
