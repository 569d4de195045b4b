"""Generate: a model's prefill, then its decode step again and again, on a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from neocc.backends.here import Here, present
from neocc.cost.hardware import Chip
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Input, Program, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.problem import Rules
from neocc.passes.partition import Partitioned
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.checkpoint import Checkpoint
from neocc.runtime.choose import Choice
from neocc.runtime.state import restore
from neocc.runtime.train import grow


class Samplable(Protocol):
    """A model that can be sampled: ``neocc.frontends.model_file.Model``, or the like."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any: ...

    def train_step(self) -> Program: ...

    def sampling(self, prompt: int, slots: int) -> tuple[Program, Program]: ...

    def with_fields(self, **fields: Any) -> Samplable: ...


@dataclass(frozen=True)
class Token:
    """A new token of a sequence, by the number of its prompt. ``last``: no more come, because it is
    a stop token (``stop``) or the last that was asked for (``length``)."""

    sequence: int
    token: int
    last: str | None


class Sampler:
    """A model on a mesh, ready to continue up to ``batch`` prompts at a time. ``decode`` and
    ``prefill`` are its plans, in which weights and cache lie alike."""

    def __init__(
        self,
        model: Samplable,
        saved: Checkpoint,
        mesh: Mesh,
        target: Chip,
        batch: int,
        prompt: int,
        new: int,
        layout: str = "",
        here: Here | None = None,
    ):
        """Plans and compiles for prompts of at most ``prompt`` tokens and ``new`` ones after them,
        and takes the parameters from a checkpoint.

        Raises:
            NeoccError: they are more than the model's context, the model cannot be sampled, the
                checkpoint is of another one, or there are too few devices.
        """
        if prompt < 1 or new < 1 or batch < 1:
            raise NeoccError(
                f"{batch} prompts of {prompt} tokens and {new} new ones: 1 is the least"
            )
        context = getattr(model.config, "seq", None)
        rotary = getattr(model.config, "positions", None) == "rotary"
        if context is not None and prompt + new > context and not rotary:
            raise NeoccError(
                f"a prompt of {prompt} tokens and {new} new ones: the context of {model.name} is "
                f"{context}"
            )
        self.batch, self.prompt, self.new = batch, prompt, new
        first, later = model.with_fields(batch=batch).sampling(prompt, prompt + new)
        laid = here.topology(target, mesh) if here else None
        self.decode = make_plan(simplify(later), mesh, target, layout, topology=laid)
        self.prefill = plan_prefill(first, self.decode, layout)
        own = here or present()
        on = own.mesh(self.decode)
        self.lowered = {n: own.lower(p, on) for n, p in partitioned(self).items()}
        self.compiled = {n: own.compile(low) for n, low in self.lowered.items()}
        self.names = names_by_role(self.decode.partitioned.program)
        decode = self.lowered["decode"]
        self.parameters = restore(saved, model.train_step(), decode, self.names["parameter"])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        choice: Choice,
        stop: Collection[int] = (),
        first: int = 0,
        ends: Callable[[int, int], bool] = lambda sequence, token: False,
    ) -> Iterator[Token]:
        """New tokens of each prompt as they come, a prompt's in order; up to ``new`` of them, the
        last one a stop token where one comes before, or one of which ``ends`` says that its
        sequence ends with it. ``first``: the number of the first prompt.

        Raises:
            NeoccError: more prompts than ``batch``, or one is empty or longer than ``prompt``.
        """
        for number, tokens in enumerate(prompts, first):
            if not 0 < len(tokens) <= self.prompt:
                raise NeoccError(
                    f"prompt {number} has {len(tokens)} tokens; at least 1 and at most "
                    f"{self.prompt} are right"
                )
        if len(prompts) > self.batch:
            raise NeoccError(f"{len(prompts)} prompts for a batch of {self.batch}")
        # Places that no prompt takes have one token.
        given = [*map(list, prompts), *([0] for _ in range(self.batch - len(prompts)))]
        lengths = np.array([len(tokens) for tokens in given], np.int32)
        padded = [[*tokens, *[0] * (self.prompt - len(tokens))] for tokens in given]
        cache: Mapping[str, jax.Array] = {}
        data: dict[str, Any] = {"tokens": np.array(padded, np.int32), "lengths": lengths}
        made = self.run("prefill", cache, data)
        open_rows = set(range(len(prompts)))
        for number in range(self.new):
            logits = np.asarray(made.pop("logits"))
            chosen = np.zeros((self.batch, 1), np.int32)
            for row in sorted(open_rows):
                token = choice.pick(logits[row, : self.vocab], first + row, number)
                last = "length" if number + 1 == self.new else None
                if token in stop or ends(first + row, token):
                    last = "stop"
                chosen[row] = token
                if last is not None:
                    open_rows.remove(row)
                yield Token(first + row, token, last)
            if not open_rows:
                return
            place = {"at": np.int32(self.prompt + number), "filled": np.int32(self.prompt)}
            made = self.run("decode", made, {"tokens": chosen, "lengths": lengths, **place})

    @property
    def vocab(self) -> int:
        return self.decode.ready.source.output_value("logits").type.dim("vocab").size

    def run(
        self, name: str, cache: Mapping[str, jax.Array], data: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """One program on the mesh; the cache that it is given is used up."""
        lowered = self.lowered[name]
        program = lowered.partitioned.program
        types = {i.name: v.type for i, v in program.named_inputs}
        grown = {n: grow(a, types[n].shape) if a.ndim else a for n, a in data.items()}
        arrays = lowered.place({**self.parameters, **cache, **grown})
        return dict(zip(program.outputs, self.compiled[name](*arrays), strict=True))


def names_by_role(program: Program) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"parameter": [], "state": [], "data": []}
    for info in program.inputs:
        found[info.role].append(info.name)
    return found


def partitioned(sampler: Sampler) -> dict[str, Partitioned]:
    """The two programs as they are lowered: prefill reads no cache."""
    decode, prefill = sampler.decode.partitioned, sampler.prefill.partitioned
    states = {i.name for i in prefill.program.inputs if i.role == "state"}
    kept = [(i, v) for i, v in prefill.program.named_inputs if i.name not in states]
    inputs, args = tuple(i for i, _ in kept), tuple(v for _, v in kept)
    body = replace(prefill.program.body, args=args)
    program = replace(prefill.program, inputs=inputs, body=body)
    return {"decode": decode, "prefill": Partitioned(program, prefill.mesh)}


def plan_prefill(program: Program, decode: Plan, layout: str = "") -> Plan:
    """Prefill planned so that parameters lie as the decode step stores them, and the cache comes
    out as that takes it: padded alike, cut alike, zeros in its padding.

    Raises:
        NeoccError: the programs do not go together.
    """
    stored = {
        i.name: v.type for i, v in decode.partitioned.program.named_inputs if i.role != "data"
    }
    cache = [i.name for i in decode.ready.source.inputs if i.role == "state"]
    if missing := sorted(set(cache) - set(program.outputs)):
        raise NeoccError(f"program {program.name!r} makes no {missing[0]!r} for the decode step")
    # Seen as a program that replaces the cache, its outputs have to lie as the cache does.
    old = tuple(Value(program.output_value(n).type, n) for n in cache)
    update = replace(
        program,
        inputs=(*program.inputs, *(Input(n, "state") for n in cache)),
        body=replace(program.body, args=(*program.body.args, *old)),
    )
    dims = update.dims
    sizes = {d.name: d.size for t in stored.values() for d in t.dims if d.name in dims}

    def as_stored(info: Input, type: TensorType, layout: Layout) -> bool:
        return info.name not in stored or layout == stored[info.name].layout

    rules, wires = Rules(stored=as_stored), decode.topology
    plan = make_plan(
        simplify(update), decode.mesh, decode.chip, layout, rules, None, wires, sizes=sizes
    )
    for info, value in plan.partitioned.program.named_inputs:
        if info.name in stored and value.type != stored[info.name]:
            raise NeoccError(
                f"{info.name!r} is {value.type} for {program.name!r} and {stored[info.name]} for "
                f"{decode.ready.source.name!r}"
            )
    return plan
