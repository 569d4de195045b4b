"""A plan file against what it has to be a plan of: checked, and costed again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neocc.cost.hardware import Chip
from neocc.cost.topology import Topology
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.passes.plan import Plan, prepare
from neocc.passes.recost import recost
from neocc.runtime.plan_file import PlanFile, figures, fingerprint, hardware_hash
from neocc.version import VERSION

CLOSE = 1e-9  # figures that differ by less, as a share, are the same


@dataclass(frozen=True)
class Checked:
    """A plan file's plan, costed anew, and what its reader should know."""

    plan: Plan
    notes: tuple[str, ...]


def plan_of(
    file: PlanFile,
    program: Program,
    mesh: Mesh | None,
    target: Chip,
    memory_limit: float | None = None,
) -> Checked:
    """The plan that a file describes, for the program, mesh and chip that it has to be for.

    Raises:
        NeoccError: it is for others, or decides what is not legal; with what, and why.
    """
    path = file.path
    if mesh is not None and mesh != file.mesh:
        raise NeoccError(
            f"{path} is a plan for the mesh {file.mesh}, not for {mesh}: plan again, or --mesh "
            f"{file.mesh}"
        )
    if target.name != file.chip:
        raise NeoccError(
            f"{path} is a plan for {file.chip}, not for {target.name}: plan again, or --target "
            f"{file.chip}"
        )
    if fingerprint(program) != file.fingerprint:
        raise NeoccError(f"{path} is a plan for another model: {difference(file, program)}")
    notes = []
    if file.neocc != VERSION:
        notes.append(f"{path} was written by neocc {file.neocc}; this is {VERSION}")
    limit = file.memory_limit if memory_limit is None else memory_limit
    try:
        given = file.decisions
        wires = topology_of(file, target)
        parts = given.microbatches
        ready = prepare(
            program,
            file.mesh,
            target,
            file.layout,
            wires,
            parts,
            given.offload,
            collectives=file.collectives,
        )
        if given.zigzag is not None:
            ordered = ready.in_zigzag(given.zigzag)
            if ordered is None:
                raise NeoccError(
                    f"zigzag: {given.zigzag}: the program has no sequences in the order of a ring "
                    f"of so many devices: leave it out, and plan again"
                )
            ready = ordered
        found = recost(ready, given, limit)
    except NeoccError as error:
        raise NeoccError(f"{path}: {error.message}") from None
    if found.rerouted:
        few = ", ".join(found.rerouted[:3])
        more = f" and {len(found.rerouted) - 3} more" if len(found.rerouted) > 3 else ""
        notes.append(f"moves found anew, as the changes ask for others: {few}{more}")
    notes += drift(file, found.plan)
    return Checked(found.plan, tuple(notes))


def topology_of(file: PlanFile, target: Chip) -> Topology:
    """Where the file has its mesh lie.

    Raises:
        NeoccError: no devices lie like that, or not each mesh position has one of its own.
    """
    given = file.devices
    laid = Topology(target, given.shape, given.parts)
    if laid.mesh_sizes != file.mesh.sizes:
        sizes = "x".join(map(str, laid.mesh_sizes))
        raise NeoccError(f"devices: the parts make a mesh of {sizes}; it is {file.mesh}")
    rank = 2 if target.torus is None else len(target.torus.max_shape) + 2
    shape = "x".join(map(str, given.shape))
    if len(given.shape) != rank or math.prod(given.shape) != file.mesh.size:
        raise NeoccError(
            f"devices: the shape {shape} has no {file.mesh.size} devices of {target.name}, which "
            f"lie along {rank} axes"
        )
    if any(not 0 <= part.axis < rank for parts in given.parts for part in parts):
        raise NeoccError(f"devices: a part lies on an axis that the shape {shape} does not have")
    inner = given.shape[-1]
    most = target.switch.size if target.switch else 1
    torus = () if target.torus is None else sorted(laid.torus_shape)
    limits = () if target.torus is None else sorted(target.torus.max_shape)
    if inner > most or any(n > limit for n, limit in zip(torus, limits, strict=True)):
        raise NeoccError(f"devices: {target.name} is not built in the shape {shape}")
    where = laid.coordinates().reshape(-1, rank)
    inside = (where < np.array(given.shape)).all()
    if not inside or len(np.unique(where, axis=0)) != file.mesh.size:
        raise NeoccError(
            f"devices: the parts do not put each position of {file.mesh} on a device of its own"
        )
    return laid


def difference(file: PlanFile, program: Program) -> str:
    """How a program is another one than that of a file."""
    ours = {d.name: d.size for d in program.dims.values()}
    for name, size in file.dims.items():
        if name not in ours:
            return f"that has a dim {name!r}, {program.name!r} has none"
        if ours[name] != size:
            return f"{name} is {size} there and {ours[name]} here"
    if program.parameter_count != file.parameters:
        return f"{file.parameters:,} parameters there, {program.parameter_count:,} here"
    return f"the ops of {program.name!r} are not those of {file.program!r} that was planned"


def drift(file: PlanFile, plan: Plan) -> list[str]:
    """Says why the figures are others than those in the file, if they are."""
    now, then = figures(plan), file.predicted
    changed = [
        f"{words} {then[name]:.6g} to {now[name]:.6g} {unit}"
        for name, words, unit in (("step", "step", "s"), ("peak_memory", "memory", "bytes"))
        if not math.isclose(then[name], now[name], rel_tol=CLOSE)
    ]
    if file.edited:
        return [f"edited by hand since neocc wrote it: {', '.join(changed) or 'at equal cost'}"]
    if not changed:
        return []
    why = (
        f"the figures of {file.chip} have changed"
        if file.hardware != hardware_hash(plan.chip)
        else "the cost model has changed, or the file's figures were"
    )
    return [f"{', '.join(changed)} since the plan was written: {why}"]
