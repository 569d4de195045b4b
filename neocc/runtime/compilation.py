"""Compile a model: build its step, plan it, set it beside what experts would do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from neocc.cost.choice import STANDARD_ONLY, Collectives
from neocc.cost.hardware import Chip, HardwareError, chip, chip_names
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.lower.audit import Audit
from neocc.passes.layout.rules import Expert, experts
from neocc.passes.overlap import overlapped
from neocc.passes.plan import USABLE, Plan, make_plan
from neocc.passes.rivals import no_slower, restricted_plan
from neocc.passes.search import Searched, meshes_of, parts_of, search
from neocc.passes.simplify import simplify
from neocc.runtime.plan_check import plan_of
from neocc.runtime.plan_file import ModelSource, PlanFile

NEAR = 1.15  # a remedy whose fastest layout needs no more than this is sought a layout that fits
HALVINGS = 6  # batches that are tried when a plan does not fit
T = TypeVar("T")


class Model(Protocol):
    """What is compiled: ``neocc.frontends.model_file.Model``, or the like."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any: ...

    @property
    def builds(self) -> str: ...

    def program(self) -> Program: ...

    def train_step(self) -> Program: ...

    def has(self, field: str) -> bool: ...

    def with_fields(self, **fields: Any) -> Model: ...


@dataclass(frozen=True)
class Timing:
    """Seconds that a stage took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Compared:
    """What an expert's plan costs under the same cost model: its ``plan``, or the ``reason`` why
    it has none; ``fits``: within the memory that the compilation was given."""

    name: str
    plan: Plan | None
    fits: bool
    reason: str = ""


@dataclass(frozen=True)
class Remedy:
    """A change under which the model was planned again and fits: seconds of a step, bytes per
    device, and the arguments of ``neocc compile`` that ask for it, if any do."""

    change: str
    arguments: str
    step: float
    peak: int


@dataclass(frozen=True)
class Compilation:
    """A model planned on a mesh.

    ``built``: the program as the model file made it; ``program``: simplified, before padding.
    ``remedies``: where the plan does not fit, changes under which it would. ``audit``: None where
    it was not asked for. ``searched``: the outer choices that were tried, where they were left to
    neocc. ``best``: the plan that neocc makes, where ``plan`` was given and a
    comparison asked for. ``source``: what the model was loaded from.
    """

    model: Model
    built: Program
    program: Program
    plan: Plan
    rivals: tuple[Compared, ...]
    remedies: tuple[Remedy, ...]
    audit: Audit | None
    timings: tuple[Timing, ...]
    notes: tuple[str, ...] = ()
    best: Plan | None = None
    source: ModelSource | None = None
    searched: Searched | None = None

    @property
    def stages(self) -> dict[str, tuple[Program, Mesh | None]]:
        """The program after each pass, by the pass's name; and the mesh once it is cut."""
        return {
            "build": (self.built, None),
            "simplify": (self.program, None),
            "pad": (self.plan.program, None),
            "partition": (self.plan.partitioned.program, self.plan.mesh),
        }

    @property
    def tokens(self) -> int:
        """Tokens of a step: elements of the largest data input."""
        named = self.program.named_inputs
        return max((v.type.size for i, v in named if i.role == "data"), default=0)

    @property
    def ok(self) -> bool:
        """It fits, and the audit, if there was one, agrees."""
        return self.plan.fits and (self.audit is None or self.audit.ok)


class Clock:
    """Collects how long the stages take."""

    def __init__(self) -> None:
        self.timings: list[Timing] = []

    def time(self, stage: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.timings.append(Timing(stage, time.perf_counter() - start))


def compile_model(
    model: Model,
    mesh: Mesh | int,
    target: Chip,
    layout: str = "",
    memory: float | None = None,
    compare: bool = True,
    audit: bool = False,
    notes: tuple[str, ...] = (),
    given: PlanFile | None = None,
    source: ModelSource | None = None,
    microbatches: int | None = 1,
    offload: bool = False,
    collectives: Collectives = STANDARD_ONLY,
) -> Compilation:
    """Builds a model's program and plans it on a mesh of ``target`` chips; ``mesh`` may be a
    number of devices, for the best of all their meshes.

    ``layout``: in Mesh TensorFlow's syntax, a constraint. ``memory``: bytes per device that the
    plan may hold, what the chip has by default. ``compare``: plan what experts would do as well.
    ``audit``: compile for the target and hold the plan against the result. ``given``: a plan to
    check and cost in place of making one. ``source``: what the model was loaded from.
    ``microbatches``: parts that the batch is run in; None for the best number. ``offload``: what
    is kept for the backward pass may lie in the hosts' memory. ``collectives``: what may run them.

    Raises:
        NeoccError: the model, mesh, layout or target is not right; or, with ``audit``, there is no
            compiler for the target here.
        HardwareError: no slice of the chip has as many devices.
    """
    clock = Clock()
    built = clock.time("build", model.program)
    program = clock.time("simplify", lambda: simplify(built))
    best = searched = None
    if given is not None:
        at = mesh if isinstance(mesh, Mesh) else given.mesh
        checked = clock.time("recost", lambda: plan_of(given, program, at, target, memory))
        plan, notes = checked.plan, (*notes, *checked.notes)
        if compare:
            best = clock.time("plan", lambda: best_like(plan))
    elif isinstance(mesh, Mesh) and microbatches is not None:
        plan = clock.time(
            "plan",
            lambda: overlapped(
                no_slower(
                    make_plan(
                        program,
                        mesh,
                        target,
                        layout,
                        memory_limit=memory,
                        microbatches=microbatches,
                        offload=offload,
                        collectives=collectives,
                    ),
                    [microbatches],
                )
            ),
        )
    else:
        meshes = [mesh] if isinstance(mesh, Mesh) else meshes_of(target, mesh)
        parts = parts_of(program) if microbatches is None else [microbatches]
        searched = clock.time(
            "search",
            lambda: search(
                program,
                target,
                meshes,
                parts,
                layout,
                memory,
                offload=offload,
                collectives=collectives,
            ),
        )
        if searched.best is None:
            raise NeoccError(searched.tried[0].reason)
        plan = searched.best
    rivals: tuple[Compared, ...] = ()
    if compare:
        rivals = clock.time("compare", lambda: tuple(compare_experts(plan)))
    remedies: tuple[Remedy, ...] = ()
    if not plan.fits and given is None:
        count = plan.ready.microbatches
        again = Again(model, plan.mesh, target, layout, memory, count, offload, collectives)
        remedies = clock.time("remedies", lambda: tuple(again.remedies()))
    audited = None
    if audit and plan.fits:
        # JAX takes a second to import: only what needs it does.
        from neocc.backends.target import audit_for_target

        audited = clock.time("audit", lambda: audit_for_target(plan))
    return Compilation(
        model,
        built,
        program,
        plan,
        rivals,
        remedies,
        audited,
        tuple(clock.timings),
        notes,
        best,
        source,
        searched,
    )


def best_like(plan: Plan) -> Plan:
    """The plan that neocc makes where another was given."""
    ready = plan.ready
    return make_plan(
        ready.source,
        plan.mesh,
        plan.chip,
        memory_limit=plan.memory_limit,
        topology=plan.topology,
        microbatches=ready.microbatches,
        offload=ready.cost.offload,
        collectives=ready.cost.collectives,
    )


def rival_plan(plan: Plan, name: str) -> Plan:
    """What neocc (``neocc``) or an expert, by the start of its name, does in a plan's place; the
    best of an expert's plans where it has several.

    Raises:
        NeoccError: no expert is called like that, or the expert has no such plan.
    """
    if name.lower() == "neocc":
        return best_like(plan)
    known = experts(plan.mesh, plan.ready.source.dims)
    chosen = [e for e in known if e.name.lower().startswith(name.lower())]
    if not name or not chosen:
        names = ", ".join(repr(e.name) for e in known)
        raise NeoccError(f"{name!r} is no file, and no one to compare with: neocc, {names}")
    found = min((compared(plan, e) for e in chosen), key=rank)
    if found.plan is None:
        raise NeoccError(f"{found.name} has no plan here: {found.reason}")
    return found.plan


def compare_experts(plan: Plan) -> Iterator[Compared]:
    """Each expert's plan on the same mesh; where one has several, one per mesh axis, the best."""
    if plan.mesh.size == 1:
        return
    found: dict[str, list[Compared]] = {}
    for e in experts(plan.mesh, plan.ready.source.dims):
        found.setdefault(e.name.split(" on ")[0], []).append(compared(plan, e))
    for plans in found.values():
        yield min(plans, key=rank)


def rank(c: Compared) -> tuple[bool, float]:
    """Those that fit first, and the fastest of them."""
    return (not c.fits, c.plan.timeline.step if c.plan else math.inf)


def compared(plan: Plan, expert: Expert) -> Compared:
    """An expert's plan with the whole batch at once or in as many parts as the plan has."""
    try:
        found = restricted_plan(plan, sorted({1, plan.ready.microbatches}), expert.rules)
    except NeoccError as error:
        return Compared(expert.name, None, False, error.message)
    return Compared(expert.name, found, found.fits)


@dataclass(frozen=True)
class Again:
    """A request that did not fit, to be planned again with one thing changed."""

    model: Model
    mesh: Mesh
    target: Chip
    layout: str
    memory: float | None
    microbatches: int = 1
    offload: bool = False
    collectives: Collectives = STANDARD_ONLY

    def plan(self) -> Plan:
        """The fastest plan; where it nearly fits, the fastest that does. The search for that takes
        many solves, so one that is far off is given up."""
        program = simplify(self.model.program())

        def planned(memory: float) -> Plan:
            made = make_plan(
                program,
                self.mesh,
                self.target,
                self.layout,
                None,
                memory,
                microbatches=self.microbatches,
                offload=self.offload,
                collectives=self.collectives,
            )
            return replace(made, memory_limit=limit)

        limit = USABLE * self.target.hbm_bytes if self.memory is None else self.memory
        found = planned(math.inf)
        near = limit < found.memory.peak <= NEAR * limit
        return planned(limit) if near else found

    def remedies(self) -> Iterator[Remedy]:
        """The smallest change of each kind that was found to make it fit."""
        kinds = (
            self.recompute,
            self.to_hosts,
            self.more_parts,
            self.smaller_batches,
            self.larger_meshes,
            self.larger_chips,
        )
        for kind in kinds:
            for change, arguments, changed in kind():
                try:
                    plan = changed.plan()
                except (NeoccError, HardwareError):
                    continue
                if plan.fits:
                    yield Remedy(change, arguments, plan.timeline.step, plan.memory.peak)
                    break

    def recompute(self) -> Iterator[tuple[str, str, Again]]:
        if self.model.has("recompute") and self.model.config.recompute is False:
            changed = replace(self, model=self.model.with_fields(recompute=None))
            yield "recompute = none in the config: the plan runs again what must be", "", changed

    def to_hosts(self) -> Iterator[tuple[str, str, Again]]:
        if self.target.host is not None and not self.offload:
            words = "what is kept for the backward pass may lie in the hosts' memory"
            yield words, "--offload", replace(self, offload=True)

    def more_parts(self) -> Iterator[tuple[str, str, Again]]:
        for count in parts_of(self.model.program()):
            if count > self.microbatches:
                changed = replace(self, microbatches=count)
                yield f"{count} microbatches", f"--microbatches {count}", changed

    def smaller_batches(self) -> Iterator[tuple[str, str, Again]]:
        if not self.model.has("batch"):
            return
        batch = self.model.config.batch
        for _ in range(HALVINGS):
            if batch % 2:
                return
            batch //= 2
            changed = replace(self, model=self.model.with_fields(batch=batch))
            yield f"a batch of {batch} sequences", f"--batch {batch}", changed

    def larger_meshes(self) -> Iterator[tuple[str, str, Again]]:
        for factor in (2, 4, 8):
            for i, (name, size) in enumerate(self.mesh.axes):
                axes = (*self.mesh.axes[:i], (name, factor * size), *self.mesh.axes[i + 1 :])
                mesh = Mesh(axes)
                yield f"{mesh.size} devices", f"--mesh {mesh}", replace(self, mesh=mesh)

    def larger_chips(self) -> Iterator[tuple[str, str, Again]]:
        if self.memory is not None:
            return
        others = (chip(name) for name in chip_names())
        larger = [
            c for c in others if c.kind == self.target.kind and c.hbm_bytes > self.target.hbm_bytes
        ]
        for c in sorted(larger, key=lambda c: c.hbm_bytes):
            words = f"{c.title}, {c.hbm_bytes / 2**30:.4g} GiB a device"
            yield words, f"--target {c.name}", replace(self, target=c)
