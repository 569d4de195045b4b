"""Train a model on a text: what `neocc train` puts together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from neocc.backends.here import Here
from neocc.cost.choice import STANDARD_ONLY, Collectives
from neocc.cost.hardware import Chip
from neocc.data import Batches, Text
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.compilation import Model
from neocc.runtime.train import Run


class Trainable(Model, Protocol):
    """A model that also says how its parameters and state start."""

    def init(self) -> Program: ...

    def with_fields(self, **fields: Any) -> Trainable: ...


@dataclass(frozen=True, eq=False)
class TextRun:
    """A run on a text: the plan that it follows, and its batches."""

    plan: Plan
    run: Run
    batches: Batches


def configure(model: Trainable, steps: int, given: Mapping[str, Any]) -> Trainable:
    """The model with the fields ``given``. Its learning rate is scheduled for a run of ``steps``,
    a tenth of it warm-up at most, unless ``given`` has ``steps`` and ``warmup``."""
    schedule: dict[str, Any] = {}
    if model.has("steps"):
        schedule["steps"] = steps
    if model.has("warmup"):
        schedule["warmup"] = min(model.config.warmup, max(1, steps // 10))
    return model.with_fields(**{**schedule, **given})


def prepare(
    model: Trainable,
    mesh: Mesh,
    target: Chip,
    text: Text,
    layout: str = "",
    seed: int = 0,
    here: Here | None = None,
    microbatches: int = 1,
    collectives: Collectives = STANDARD_ONLY,
) -> TextRun:
    """Plans the model's step for a mesh of ``target`` chips, compiles it for the devices
    ``here`` and makes the initial state. ``seed``: of that state and of the batches.
    ``microbatches``: parts that the batch is run in. ``collectives``: what may run them.

    Raises:
        NeoccError: the model does not train on text, its vocab is smaller than the text's, the
            text is shorter than a batch, there are too few devices; or as ``make_plan``.
    """
    if not 0 <= seed < 2**32:
        raise NeoccError(f"seed {seed} is not between 0 and {2**32 - 1}")
    program = simplify(model.train_step())
    batch, seq = text_dims(program)
    vocab = program.dims.get("vocab")
    if vocab is not None and vocab.size < text.vocab:
        raise NeoccError(
            f"the text has {text.vocab} different tokens; {model.name}'s vocab is {vocab.size}: "
            f"--vocab {text.vocab}"
        )
    batches = Batches(text.tokens, batch, seq, seed)
    plan = make_plan(
        program,
        mesh,
        target,
        layout,
        topology=here.topology(target, mesh) if here else None,
        microbatches=microbatches,
        collectives=collectives,
    )
    return TextRun(plan, Run(plan, model.init(), seed, here), batches)


def text_dims(program: Program) -> tuple[int, int]:
    """Sizes of the two dims of the program's tokens, and of its labels if it has any.

    Raises:
        NeoccError: it takes other data.
    """
    data = {i.name: v.type for i, v in program.named_inputs if i.role == "data"}
    types = set(data.values())
    if data.keys() in ({"tokens", "labels"}, {"tokens"}) and len(types) == 1:
        (type,) = types
        if len(type.dims) == 2 and type.dtype == "i32":
            return type.shape[0], type.shape[1]
    taken = ", ".join(f"{n}: {t}" for n, t in data.items()) or "none"
    raise NeoccError(
        f"program {program.name!r} does not train on text, which is tokens, and labels or "
        f"none, of i32[batch, seq]; the data that it takes: {taken}"
    )


def describe(run: TextRun) -> list[str]:
    """The run in a few lines, with what a user may not expect: padding, a plan that cuts nothing,
    or one that the target could not hold."""
    plan, batches = run.plan, run.batches
    count = plan.mesh.size
    devices = f"{count} {run.run.here.kind} device{'s' if count > 1 else ''}"
    lines = [
        f"{plan.program.name} on {plan.mesh} ({devices}), planned for {plan.chip.name}",
        f"{len(batches.tokens):,} tokens of text, {batches.batch} x {batches.seq} a step",
    ]
    kinds: Counter[str] = Counter()
    for c in plan.collectives:
        if c.kind != "slice":
            kinds[c.kind.replace("_", "-")] += c.count
    if kinds:
        words = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        lines.append(f"collectives of a step: {words}")
    elif count > 1:
        lines.append(
            "no collective: by the plan every device does the whole step, which is fastest for so "
            "small a model on that chip; --layout batch:AXIS cuts it"
        )
    lines += [f"padded {padding}" for padding in plan.paddings]
    if not plan.fits:
        need, limit = plan.memory.peak / 2**30, plan.memory_limit / 2**30
        lines.append(f"{plan.chip.name} could not hold this: {need:.3g} of {limit:.3g} GiB")
    return lines
