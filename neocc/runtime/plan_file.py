"""A plan as a file: written, changed by hand, read back, checked and costed again.

The file says of what it is a plan (model, mesh, chip), what it decides, and what neocc predicted.
Reading trusts none of it: the model is built again and compared by a fingerprint, every decision
is checked by the layout algebra, and the figures are computed anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neocc.cost.algorithms import STANDARD
from neocc.cost.choice import AUTO, STANDARD_ONLY, Collectives
from neocc.cost.hardware import Chip
from neocc.cost.topology import Part, Topology
from neocc.ir.errors import NeoccError
from neocc.ir.json_object import read_object
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Op, Program, Region
from neocc.ir.text import print_program
from neocc.passes.alternatives import closed
from neocc.passes.decisions import Algorithms, Decisions, Moves, RegionDecisions, decisions
from neocc.passes.layout.notation import (
    cuts_text,
    layout_text,
    move_text,
    parse_layout_text,
    parse_move_text,
    parse_strategy_text,
)
from neocc.passes.plan import Plan
from neocc.runtime.schema import check, schema
from neocc.version import VERSION

KIND, SCHEMA = "neocc plan", 1


@dataclass(frozen=True)
class ModelSource:
    """Where a program came from: a file, one of its presets or a GPT-Neo config, the fields of
    its config that were set, and the function of the file that made it."""

    file: str
    preset: str | None = None
    config: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    program: str = "train_step"


@dataclass(frozen=True)
class Devices:
    """Where a mesh lies: the ``shape`` of the physical devices, and of each mesh axis the ``parts``
    that it takes of them: (physical axis, devices, stride)."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class PlanFile:
    """A plan file, read but for its program. ``hardware``, ``digest``: see ``document``; ``dims``
    and ``parameters``: of the program, to say how another one differs."""

    path: Path
    neocc: str
    source: ModelSource | None
    program: str
    fingerprint: str
    parameters: int
    dims: Mapping[str, int]
    mesh: Mesh
    chip: str
    hardware: str
    devices: Devices
    layout: str
    memory_limit: float
    collectives: Collectives
    decisions: Decisions
    digest: str
    predicted: Mapping[str, Any]

    @property
    def edited(self) -> bool:
        """Whether a decision was changed since neocc wrote the file."""
        return digest(decision_texts(self.decisions, self.mesh)) != self.digest


def document(plan: Plan, source: ModelSource | None = None) -> dict[str, Any]:
    """A plan as plain dicts, lists, strings and numbers.

    What is predicted is that of the program in which what is kept is decided, as reading it back
    gives: the same but for rounding, since the problem that left it open adds up in another order.
    """
    program = plan.ready.source
    decided = decision_texts(decisions(plan), plan.mesh)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "neocc": VERSION,
        "model": None if source is None else dataclasses.asdict(source),
        "program": {
            "name": program.name,
            "fingerprint": fingerprint(program),
            "parameters": program.parameter_count,
            "dims": {d.name: d.size for d in program.dims.values()},
        },
        "mesh": str(plan.mesh),
        "chip": plan.chip.name,
        "hardware": hardware_hash(plan.chip),
        "devices": topology_texts(plan.topology, plan.mesh),
        "layout": plan.ready.layout,
        "memory_limit": None if math.isinf(plan.memory_limit) else plan.memory_limit,
        "collectives": collectives_texts(plan.ready.cost.collectives),
        **decided,
        "digest": digest(decided),
        "predicted": figures(closed(plan) if plan.saved and not plan.given else plan),
    }


def figures(plan: Plan) -> dict[str, Any]:
    """What is predicted of a plan: seconds of a step, bytes a device."""
    t = plan.timeline
    return {
        "step": t.step,
        "compute": t.compute,
        "exposed": t.exposed,
        "hidden": t.hidden,
        "mfu": plan.mfu,
        "peak_memory": plan.memory.peak,
        "memory": dict(plan.memory.by_kind),
    }


def collectives_texts(given: Collectives) -> dict[str, Any]:
    return {"choose": AUTO if given.auto else STANDARD, "forced": dict(given.forced)}


def topology_texts(laid: Topology, mesh: Mesh) -> dict[str, Any]:
    axes = {
        name: [[p.axis, p.size, p.stride] for p in parts]
        for name, parts in zip(mesh.names, laid.parts, strict=True)
    }
    return {"shape": list(laid.shape), "axes": axes}


def decision_texts(given: Decisions, mesh: Mesh) -> dict[str, Any]:
    def texts(layouts: Mapping[str, Layout]) -> dict[str, str]:
        return {name: layout_text(layout, mesh) for name, layout in layouts.items()}

    def region(r: RegionDecisions) -> dict[str, Any]:
        return {
            "name": r.name,
            "ops": list(r.ops),
            "arguments": texts(r.arguments),
            "outputs": texts(r.outputs),
            "strategies": {name: cuts_text(s.axes, mesh) for name, s in r.strategies.items()},
            "moves": {
                name: sorted(move_text(a, b, mesh) for a, b in moves)
                for name, moves in r.moves.items()
            },
            **({"algorithms": algorithms(r)} if r.algorithms else {}),
        }

    def algorithms(r: RegionDecisions) -> dict[str, dict[str, str]]:
        return {
            name: {move_text(a, b, mesh): by for (a, b), by in chosen.items()}
            for name, chosen in r.algorithms.items()
        }

    return {
        "microbatches": given.microbatches,
        **({"zigzag": given.zigzag} if given.zigzag else {}),
        "saved": dict(given.saved),
        "stored": texts(given.stored),
        "outputs": texts(given.outputs),
        "regions": [region(r) for r in given.regions],
    }


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def fingerprint(program: Program) -> str:
    """Of a program's text, without the lines of its source and without the values of constants:
    neither a comment nor a learning rate makes another layout problem of it."""
    return digest(print_program(replace(program, body=without_constants(program.body)), locs=False))


def without_constants(region: Region) -> Region:
    def plain(op: Op) -> Op:
        attrs = {**op.attrs, "value": 0} if op.kind == "constant" else op.attrs
        regions = [without_constants(r) for r in op.regions]
        return Op(op.kind, op.operands, op.results, attrs, regions, op.loc)

    return Region(region.args, tuple(plain(op) for op in region.ops), region.outputs)


def hardware_hash(chip: Chip) -> str:
    """Of every figure of a chip that costs come from."""
    row = dataclasses.asdict(chip)
    return digest({k: v for k, v in row.items() if k not in ("title", "sources", "assumptions")})


def read(path: Path) -> PlanFile:
    """A plan file, its form checked; its program is not built yet.

    Raises:
        NeoccError: it is not there, not JSON, no plan, of another schema, or not of its form.
    """
    data = read_object(path)
    if data.get("kind") != KIND:
        raise NeoccError(f"{path} is no plan: its 'kind' is not {KIND!r}; --emit plan writes one")
    if data.get("schema") != SCHEMA:
        raise NeoccError(
            f"{path} is of schema {data.get('schema')!r}, written by neocc {data.get('neocc')!r}; "
            f"neocc {VERSION} reads schema {SCHEMA}: make the plan again"
        )
    try:
        check(data, schema("plan"))
        return parsed(path, data)
    except NeoccError as error:
        raise NeoccError(f"{path}: {error.message}") from None


def parsed(path: Path, data: Mapping[str, Any]) -> PlanFile:
    mesh = Mesh.parse(data["mesh"])
    limit, program = data["memory_limit"], data["program"]
    return PlanFile(
        path=path,
        neocc=data["neocc"],
        source=ModelSource(**data["model"]) if data["model"] else None,
        program=program["name"],
        fingerprint=program["fingerprint"],
        parameters=program["parameters"],
        dims=program["dims"],
        mesh=mesh,
        chip=data["chip"],
        hardware=data["hardware"],
        devices=devices_in(data["devices"], mesh),
        layout=data["layout"],
        memory_limit=math.inf if limit is None else limit,
        collectives=collectives_in(data.get("collectives")),
        decisions=Decisions(
            layouts_in("stored", data["stored"], mesh),
            layouts_in("outputs", data["outputs"], mesh),
            tuple(region_in(r, mesh) for r in data["regions"]),
            data["saved"],
            data["microbatches"],
            data.get("zigzag"),
        ),
        digest=data["digest"],
        predicted=data["predicted"],
    )


def devices_in(data: Mapping[str, Any], mesh: Mesh) -> Devices:
    axes = data["axes"]
    if list(axes) != list(mesh.names):
        raise NeoccError(f"devices.axes has {', '.join(axes)}; the mesh is {mesh}")
    for name, parts in axes.items():
        for part in parts:
            if len(part) != 3:
                raise NeoccError(
                    f"devices.axes.{name}: {part} is no part; one is [physical axis, size, stride]"
                )
    return Devices(
        tuple(data["shape"]), tuple(tuple(Part(*p) for p in parts) for parts in axes.values())
    )


def collectives_in(data: Mapping[str, Any] | None) -> Collectives:
    if data is None:
        return STANDARD_ONLY
    with named("collectives"):
        forced = (f"{kind}={name}" for kind, name in data["forced"].items())
        return Collectives.asked(data["choose"], forced)


def region_in(data: Mapping[str, Any], mesh: Mesh) -> RegionDecisions:
    name = data["name"]

    def moves(entry: str, texts: Iterable[str]) -> Moves:
        with named(f"{name}: moves of {entry!r}"):
            return frozenset(parse_move_text(text, mesh) for text in texts)

    def algorithms(entry: str, by: Mapping[str, str]) -> Algorithms:
        with named(f"{name}: algorithms of {entry!r}"):
            return {parse_move_text(text, mesh): chosen for text, chosen in by.items()}

    strategies = {}
    for entry, text in data["strategies"].items():
        with named(f"{name}: {entry!r}"):
            strategies[entry] = parse_strategy_text(text, mesh)
    return RegionDecisions(
        name,
        tuple(data["ops"]),
        layouts_in(f"{name}: arguments", data["arguments"], mesh),
        layouts_in(f"{name}: outputs", data["outputs"], mesh),
        strategies,
        {entry: moves(entry, texts) for entry, texts in data["moves"].items()},
        {entry: algorithms(entry, by) for entry, by in data.get("algorithms", {}).items()},
    )


def layouts_in(where: str, texts: Mapping[str, str], mesh: Mesh) -> dict[str, Layout]:
    found = {}
    for name, text in texts.items():
        with named(f"{where}: {name!r}"):
            found[name] = parse_layout_text(text, mesh)
    return found


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Puts where it happened in front of a message."""
    try:
        yield
    except NeoccError as error:
        raise NeoccError(f"{where}: {error.message}") from None
