"""Every mapping of a mesh's axes onto a torus: its cost, and the rings that the TPU compiler runs.

    python -m benchmarks.axis_mappings [--out FILE] [--only v5e]

Of each case one GPT is planned, neocc choosing the mapping. Then the communication of that plan is
priced on every mapping, and for each the real TPU compiler compiles an all-reduce along each axis.
Its ``collective_algorithm_config`` names the strategy: as many *phases* as there are rings at a
time, in ``colors`` directions or orders.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from models import gpt
from neocc.backends import backend
from neocc.backends.tpu.compile import compile_for_tpu
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import chip
from neocc.cost.mappings import candidates
from neocc.cost.topology import Topology
from neocc.ir.mesh import Mesh
from neocc.passes.plan import Plan
from neocc.passes.search import search
from neocc.passes.simplify import simplify

CASES = (
    ("v5e", (8, 16), (8, 16)),
    ("v5p", (8, 16), (4, 4, 8)),
    ("v4", (4, 16), (4, 4, 4)),
    ("v4", (8, 8), (4, 4, 4)),
)
PRESET = "gpt3-xl"
ROWS, COLUMNS = 4096, 2048  # bf16: large enough for the bandwidth to count
STRATEGY = re.compile(r"\\n(\w*Strategy\w*)\{colors:(\d+) phases:(\d+)")


@dataclass(frozen=True)
class Rings:
    """What the compiler runs along one axis, and the rings at a time of the cost model."""

    strategy: str
    colors: int
    phases: int
    modelled: int


@dataclass(frozen=True)
class Row:
    """One mapping. parts: per mesh axis (torus axis, size, stride); seconds: of a step's
    communication, hidden or not."""

    parts: list[list[tuple[int, int, int]]]
    links: list[str]
    seconds: float
    rings: list[Rings]
    chosen: bool

    @property
    def agrees(self) -> bool:
        return all(r.phases == r.modelled for r in self.rings)


def chosen_plan(name: str, mesh: Mesh) -> Plan:
    """The plan with the mapping that neocc chooses for this mesh."""
    program = simplify(gpt.train_step(gpt.PRESETS[PRESET]))
    found = search(program, chip(name), [mesh], [1], "", None)
    assert found.best is not None
    return found.best


def communication(plan: Plan, laid: Topology) -> float:
    """Seconds of a step in the plan's collectives, on the wires of another mapping."""
    links = laid.links()
    return sum(
        c.count
        * collective_time(c.kind, max(c.bytes, c.result_bytes), links[plan.mesh.index(c.axis)])
        for c in plan.collectives
        if c.kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    )


def every_mapping(name: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> list[Topology]:
    """All ways to lay a mesh on one slice; those that differ in places of devices, once."""
    found: dict[object, Topology] = {}
    for laid in candidates(chip(name), sizes, shape, False):
        found.setdefault(laid.parts, laid)
    return list(found.values())


def compiled_rings(laid: Topology) -> list[Rings]:
    """What the TPU compiler runs for an all-reduce along each mesh axis."""
    names = tuple("xyz"[: len(laid.mesh_sizes)])
    mesh = jax.sharding.Mesh(backend("tpu").devices(laid), names)
    whole = NamedSharding(mesh, PartitionSpec())
    value = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16, sharding=whole)
    rings = []
    for name, link in zip(names, laid.links(), strict=True):
        mapped = jax.shard_map(
            lambda x, axis=name: lax.psum(x, axis),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        text = compile_for_tpu(jax.jit(mapped), [value]).as_text() or ""
        line = next(t for t in text.splitlines() if "collective_algorithm_config" in t)
        found = STRATEGY.search(line)
        assert found is not None, line
        (level,) = link.levels
        modelled = 1 if level.one else len(level.rings)
        rings.append(Rings(found[1], int(found[2]), int(found[3]), modelled))
    return rings


def rows(name: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Row]:
    plan = chosen_plan(name, Mesh(tuple(zip("xy", sizes, strict=True))))
    # Torus axes of one length may be named in any order: what is chosen is known by its links.
    chosen = plan.topology
    for laid in every_mapping(name, sizes, shape):
        yield Row(
            [[(p.axis, p.size, p.stride) for p in parts] for parts in laid.parts],
            [str(link) for link in laid.links()],
            communication(plan, laid),
            compiled_rings(laid),
            laid.parts == chosen.parts,
        )


@dataclass(frozen=True)
class Case:
    """All mappings of one mesh on one slice, those with the fastest communication first."""

    slice: str
    mesh: str
    rows: list[Row]

    @property
    def place(self) -> int:
        """Which one by seconds the chosen mapping is, from 1."""
        (chosen,) = (row for row in self.rows if row.chosen)
        return 1 + sum(row.seconds < chosen.seconds for row in self.rows)

    def lines(self) -> Iterator[str]:
        agree = sum(row.agrees for row in self.rows)
        yield (
            f"{self.slice}, mesh {self.mesh}: {len(self.rows)} mappings; the chosen one is number "
            f"{self.place} by seconds; the compiler's rings are the model's on {agree}"
        )
        for row in self.rows:
            rings = ", ".join(f"{r.strategy} {r.colors}x{r.phases}" for r in row.rings)
            mark = "*" if row.chosen else " "
            yield f"{mark} {row.seconds:7.4f} s  {' | '.join(row.links)}  -> {rings}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="a chip")
    arguments = parser.parse_args()
    found = []
    for name, sizes, shape in CASES:
        if arguments.only in (None, name):
            ordered = sorted(rows(name, sizes, shape), key=lambda row: row.seconds)
            mesh = "x".join(map(str, sizes))
            found.append(Case(f"{name}:{'x'.join(map(str, shape))}", mesh, ordered))
            print(*found[-1].lines(), sep="\n")
    if arguments.out is not None:
        cases = [asdict(one) | {"place": one.place} for one in found]
        text = json.dumps({"preset": PRESET, "cases": cases}, separators=(",", ":"))
        arguments.out.write_text(text.replace('{"parts"', '\n{"parts"') + "\n")


if __name__ == "__main__":
    main()
