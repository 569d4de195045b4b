"""The forward pass of a checkpoint's model on a mesh of simulated devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neocc.cost.hardware import chip
from neocc.frontends.weights.convert import open_source
from neocc.ir.mesh import Mesh
from neocc.lower.jax import lower
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify
from neocc.runtime import read_checkpoint
from neocc.runtime.state import restore
from neocc.runtime.train import grow

LAYOUTS = {"1x1": "", "2x4": "batch:x,heads:y,mlp:y,vocab:y"}


def logits(path: Path, tokens: np.ndarray, mesh: str, **fields: Any) -> np.ndarray:
    """tokens[batch, seq] -> logits[batch, seq, vocab] of neocc's checkpoint; seq is all of it."""
    source = open_source(path)
    config = replace(source.model.config, batch=len(tokens), **fields)
    program = simplify(source.model.module.forward(config))
    plan = make_plan(program, Mesh.parse(mesh), chip("v5e"), LAYOUTS[mesh])
    lowered = lower(plan.partitioned)
    types = {i.name: v.type for i, v in plan.partitioned.program.named_inputs}
    names = [i.name for i in program.inputs if i.role == "parameter"]
    inputs = restore(read_checkpoint(path), program, lowered, names)
    data = {"tokens": tokens.astype(np.int32), "labels": np.zeros_like(tokens, np.int32)}
    inputs |= {n: grow(a, types[n].shape) for n, a in data.items()}
    made = np.asarray(lowered(inputs)["logits"])
    return made[: len(tokens), : tokens.shape[1], : config.vocab]
