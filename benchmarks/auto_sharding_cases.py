"""Three models, and each way to lay them out as the requests that the other tools are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from models import gpt
from neocc.cost.hardware import chip
from neocc.cost.topology import Topology, topology
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Op
from neocc.passes.plan import Plan, make_plan

CHIP = "v5e"
VOCAB = 50304  # 50257 is no multiple of anything: XLA cuts no argument unevenly
LAYER = "h0."
Cuts = list[list[str]]  # per dim, the mesh axes that cut it, outermost first
# Dims of GPT-Neo that are models/gpt.py's under another name. embed_sequence, which only the table
# of positions has, is none.
DIMS = {
    "batch": "batch",
    "sequence": "seq",
    "memory_length": "memory",
    "heads": "heads",
    "features_per_head": "head_dim",
    "embd": "embd",
    "intermediate_expanded": "mlp",
    "vocab": "vocab",
}
VALUES = {
    "residual": ("batch", "seq", "embd"),
    "qkv": ("batch", "seq", "heads", "head_dim"),
    "mlp": ("batch", "seq", "mlp"),
    "logits": ("batch", "seq", "vocab"),
}


@dataclass(frozen=True)
class Case:
    """A preset of models/gpt.py on a mesh of v5e chips."""

    preset: str
    mesh: Mesh
    batch: int
    seq: int

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, self.mesh.sizes))
        return f"{self.preset}, {CHIP} {sizes}, batch {self.batch}, seq {self.seq}"

    @property
    def config(self) -> gpt.Config:
        """As a user has it."""
        preset = gpt.PRESETS[self.preset]
        return replace(preset, vocab=VOCAB, batch=self.batch, seq=self.seq)

    @property
    def plain(self) -> gpt.Config:
        """As the plain JAX step computes it: scores are stored, layers computed again."""
        return replace(self.config, attention_kernel="unfused", recompute=True)

    @property
    def laid(self) -> Topology:
        return topology(chip(CHIP), self.mesh.sizes)


CASES = (
    Case("gpt2-small", Mesh.parse("2x4"), 64, 512),
    Case("gpt2-medium", Mesh.parse("4x4"), 128, 1024),
    Case("gpt3-xl", Mesh.parse("4x8"), 128, 2048),
)


def planned(case: Case, config: gpt.Config, layout: str = "") -> Plan:
    return make_plan(gpt.train_step(config), case.mesh, chip(CHIP), layout)


def request(case: Case) -> dict[str, Any]:
    """What every request says: the model and the devices."""
    laid = case.laid
    rank = len(laid.torus_shape)
    places = laid.coordinates().reshape(case.mesh.size, -1)[:, 1 : 1 + rank]
    return {
        "config": asdict(case.plain),
        "slice": laid.name,
        "host": [*(2 if size % 2 == 0 else 1 for size in laid.torus_shape[:2]), 1],
        "axes": [list(axis) for axis in case.mesh.axes],
        "places": places.tolist(),
        "remat": True,
    }


def input_dims(config: gpt.Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every input of the step, and its dims."""
    for name, weight in gpt.weights(config).items():
        for suffix in ("", ".m", ".v"):
            yield name + suffix, tuple(d.name for d in weight.dims)
    yield from (("step", ()), ("tokens", ("batch", "seq")), ("labels", ("batch", "seq")))


def by_rules(case: Case, rules: str) -> dict[str, dict[str, Cuts]]:
    """Of a layout in Mesh TensorFlow's syntax: inputs and values."""
    axes = dict(rule.split(":") for rule in rules.split(";") if rule)
    own = {DIMS[dim]: axis for dim, axis in axes.items() if dim in DIMS}

    def cuts(dims: tuple[str, ...], of: Mapping[str, str] = own) -> Cuts:
        return [[of[d]] if d in of else [] for d in dims]

    inputs = {name: cuts(dims) for name, dims in input_dims(case.plain)}
    places = {"embd": own.get("embd", ""), "seq": axes.get("embed_sequence", "")}
    for name in ("wpe", "wpe.m", "wpe.v"):
        inputs[name] = cuts(("seq", "embd"), {d: axis for d, axis in places.items() if axis})
    return {"inputs": inputs, "values": {name: cuts(dims) for name, dims in VALUES.items()}}


def neocc_rules(rules: str) -> str:
    """Mesh TensorFlow's layout in neocc's dims; of embed_sequence it can say nothing."""
    parts = (rule.split(":") for rule in rules.split(";") if rule)
    return ",".join(f"{DIMS[dim]}:{axis}" for dim, axis in parts if dim in DIMS)


def by_plan(plan: Plan) -> dict[str, dict[str, Cuts]]:
    """Of a plan for a case's plain config: its inputs, and the values of the forward pass that the
    plain step has a name for, as they are first made."""

    def cuts(layout: Layout | None, dims: tuple[str, ...]) -> Cuts:
        assert layout is not None
        return [[plan.mesh.names[axis] for axis in layout.cuts(d)] for d in dims]

    body = plan.partitioned.program.body
    inputs = {v.name: cuts(v.type.layout, v.type.names) for v in body.args}
    forward = next(op for op in body.ops if op.kind == "repeat" and not op.attrs["reverse"])
    inside = forward.regions[0]
    dims = VALUES["residual"]
    values = {"residual": cuts(inside.args[0].type.layout, dims)}
    for name, ops in (("qkv", inside.ops), ("mlp", inside.ops), ("logits", body.ops)):
        made = first(ops, is_product_of(VALUES[name]))
        values[name] = cuts(made.result.type.layout, VALUES[name])
    return {"inputs": inputs, "values": values}


def is_product_of(dims: tuple[str, ...]) -> Callable[[Op], bool]:
    return lambda op: op.kind == "einsum" and set(op.result.type.names) == set(dims)


def first(ops: Any, wanted: Callable[[Op], bool]) -> Op:
    return next(op for op in ops if wanted(op))
