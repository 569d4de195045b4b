"""Train: a plan's step, run again and again on a mesh of devices."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from neocc.backends.here import Here, present
from neocc.data.batches import Batches
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Layout
from neocc.ir.program import Input, Program, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.build import build
from neocc.passes.layout.problem import Rules
from neocc.passes.layout.solve import solve
from neocc.passes.microbatch import LOOP
from neocc.passes.pad import pad_program
from neocc.passes.partition import Partitioned, apply
from neocc.passes.plan import Plan
from neocc.runtime.checkpoint import Checkpoint, ModelOf
from neocc.runtime.state import restore, save


class Diverged(NeoccError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Record:
    """One step of a run, counted from 1: what the program said of it (loss before the update,
    gradient norm, ...), its tokens, its seconds."""

    step: int
    metrics: Mapping[str, float]
    tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        return self.metrics["loss"]

    def as_json(self) -> dict[str, float | None]:
        """For ``json.dumps``: JSON has no NaN, so numbers that are not finite are null."""
        own = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        values = {**own, **self.metrics}
        return {n: x if math.isfinite(x) else None for n, x in values.items()}


def partition_init(init: Program, plan: Plan) -> Partitioned:
    """The program of the initial values, partitioned so that each lies as the plan's step stores
    it, with zeros in its padding.

    Raises:
        NeoccError: it makes other values than the step takes.
    """
    step = plan.partitioned.program
    stored = {i.name: v.type for i, v in step.named_inputs if i.role != "data"}
    if missing := sorted(stored.keys() ^ set(init.outputs)):
        raise NeoccError(
            f"programs {init.name!r} and {step.name!r} do not go together: only one of them "
            f"knows {', '.join(missing)}"
        )
    # Seen as a program that replaces the state, its outputs have to lie as the state does, and
    # their padding is zero. It reads none of the old state: those inputs go again at the end.
    old = tuple(Value(init.output_value(n).type, n) for n in stored)
    update = replace(
        init,
        inputs=(*init.inputs, *(Input(n, "state") for n in stored)),
        body=replace(init.body, args=(*init.body.args, *old)),
    )
    dims = update.dims
    padded, _ = pad_program(update, {p.dim: p.padded for p in plan.paddings if p.dim in dims})
    for info, value in padded.named_inputs:
        if info.name in stored and value.type != stored[info.name].with_layout(None):
            raise NeoccError(
                f"program {init.name!r} makes {info.name!r} as {value.type}; {step.name!r} takes "
                f"{stored[info.name].with_layout(None)}"
            )

    def as_stored(info: Input, type: TensorType, layout: Layout) -> bool:
        return info.name not in stored or layout == stored[info.name].layout

    problem = build(padded, plan.mesh, plan.problem.cost, Rules(stored=as_stored))
    made = apply(padded, plan.mesh, solve(problem).assignment).program
    own = len(init.inputs)
    body = replace(made.body, args=made.body.args[:own])
    return Partitioned(replace(made, inputs=init.inputs, body=body), plan.mesh)


class Run:
    """A model in training on a mesh. ``state``: every parameter and optimizer state by name, as
    the plan's step stores it (padded); a step uses its arrays up and puts new ones in place."""

    state: dict[str, jax.Array]

    def __init__(
        self,
        plan: Plan,
        init: Program,
        seed: int = 0,
        here: Here | None = None,
    ):
        """Compiles the step and makes the initial state; ``init`` takes the seed, a u32 scalar.
        ``here``: what to run on, by default JAX's devices in order.

        Raises:
            NeoccError: too few devices, or ``init`` and the plan's step do not go together.
        """
        self.here = here or present()
        mesh = self.here.mesh(plan)
        program = plan.partitioned.program
        if "loss" not in program.outputs:
            raise NeoccError(f"program {program.name!r} has no output 'loss' to train on")
        self.program = program
        self.source = plan.ready.source
        self.lowered = self.here.lower(plan.partitioned, mesh)
        self.compiled = self.here.compile(self.lowered)
        start = self.here.lower(partition_init(init, plan), mesh)
        self.state = start({i.name: np.uint32(seed) for i in init.inputs})

    def restore(self, saved: Checkpoint, parameters_only: bool = False) -> None:
        """Takes parameters and state from a checkpoint, or the parameters alone.

        Raises:
            CheckpointError: a tensor is not there, or is another one; nothing is taken then.
        """
        roles = ("parameter",) if parameters_only else ("parameter", "state")
        names = [i.name for i in self.program.inputs if i.role in roles]
        self.state |= restore(saved, self.source, self.lowered, names)

    def save(self, path: Path, model: ModelOf, step: int) -> None:
        """Writes parameters and state after ``step`` steps as the checkpoint ``path``.

        Raises:
            CheckpointError: ``path`` is there already, or cannot be written.
        """
        save(path, model, self.source, self.state, step)

    def step(self, data: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Trains on one batch, given with true shapes; what the program says of it."""
        types = {i.name: v.type for i, v in self.program.named_inputs}
        parts = {n: split(a, types[n]) for n, a in data.items() if n in types}
        grown = {n: grow(a, types[n].shape) for n, a in parts.items()}
        arrays = self.lowered.place({**self.state, **grown})
        outputs = dict(zip(self.program.outputs, self.compiled(*arrays), strict=True))
        self.state = {n: outputs.pop(n) for n in self.state}
        return {n: float(x) for n, x in outputs.items() if x.ndim == 0}

    def train(self, batches: Batches, steps: int, first: int = 0) -> Iterator[Record]:
        """Trains on the batches number ``first`` and on, ``steps`` of them.

        Raises:
            Diverged: the loss of a step is not finite.
        """
        for number in range(first, first + steps):
            begun = time.perf_counter()
            data = batches.at(number)
            metrics = self.step(data)
            seconds = time.perf_counter() - begun
            record = Record(number + 1, metrics, data["tokens"].size, seconds)
            yield record
            if not math.isfinite(record.loss):
                raise Diverged(
                    f"step {record.step}: the loss is {record.loss}; try a lower learning rate"
                )


def split(array: np.ndarray, type: TensorType) -> np.ndarray:
    """A batch in the parts that the step takes one after the other, if it takes parts."""
    if not type.has(LOOP) or array.ndim != len(type.dims) - 1:
        return array
    count = type.dim(LOOP).size
    return array.reshape(count, -1, *array.shape[1:]) if len(array) % count == 0 else array


def grow(array: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Zeros at the end of each dim; a shape that does not fit is left for ``place`` to refuse."""
    if array.ndim != len(shape) or any(n > m for n, m in zip(array.shape, shape, strict=True)):
        return array
    return np.pad(array, [(0, m - n) for n, m in zip(array.shape, shape, strict=True)])
