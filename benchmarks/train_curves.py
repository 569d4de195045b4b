"""Trains one small GPT on the same text on many meshes and layouts, and compares the losses.

    python -m benchmarks.train_curves            # from the repository's root; some six minutes

Writes benchmarks/results/train_curves.json.

What has to hold: the loss falls, and no curve leaves that of one device by more than rounding.
For so small a model the best plan cuts nothing (on a real chip's links every transfer costs more
than the work it saves), so each mesh is also planned for a chip whose links cost nothing: that
plan cuts all it can, with every kind of collective.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from models import gpt
from neocc.backends.cpu.host import host_devices
from neocc.cost.hardware import Chip, Link, chip
from neocc.data import Batches
from neocc.data.text import byte_tokens
from neocc.ir.mesh import Mesh
from neocc.ir.reference import run_program
from neocc.passes.plan import Plan, make_plan
from neocc.passes.simplify import simplify
from neocc.runtime.train import Run

RESULTS = Path(__file__).parent / "results"
# Modules of the standard library whose sources make the text.
MODULES = "argparse ast collections dataclasses difflib enum functools inspect pathlib typing"
CONFIG = gpt.Config(
    "small", 2, 64, 4, vocab=256, seq=64, batch=8, dtype="f32", lr=3e-3, warmup=20, steps=200
)
MESHES = ("1x1", "2x4", "4x2", "8x1")
LAYOUTS = (
    ("2x4", "batch:x,heads:y"),
    ("2x4", "vocab:y,batch:x"),
    ("2x4", "batch:x,heads:y,mlp:y,vocab:y"),
    ("2x4", "batch:x,seq:y"),
    ("2x4", "batch:x,memory:y"),
    ("2x4", "batch:x,batch:y"),
    ("4x2", "embd:y,batch:x"),
    ("4x2", "seq:x,heads:y,vocab:y"),
    ("4x2", "mlp:x,head_dim:x,vocab:y"),
    ("8x1", "heads:x"),  # 4 heads on 8 devices: padded
    ("2x2x2", "batch:x,heads:y,mlp:y,seq:z"),
)


def stdlib_text() -> bytes:
    """Sources of the standard library, which are there wherever Python is."""
    specs = (importlib.util.find_spec(name) for name in MODULES.split())
    return b"".join(Path(s.origin).read_bytes() for s in specs if s is not None and s.origin)


def free_links(base: Chip) -> Chip:
    """The chip with links on which a transfer takes no time."""
    assert base.torus is not None
    link = Link(bandwidth=1e18, efficiency=1.0, latency=0.0)
    return replace(base, collective_overhead=0.0, torus=replace(base.torus, link=link))


@dataclass(frozen=True)
class Curve:
    """The loss of every step on a mesh, and how many seconds the steps took."""

    mesh: str
    layout: str
    plan: Plan
    losses: np.ndarray
    seconds: float

    def off(self, base: np.ndarray) -> float:
        """The largest distance from another curve, relative, at any step."""
        return float(np.max(np.abs(self.losses / base[: len(self.losses)] - 1)))

    def row(self, base: np.ndarray) -> dict[str, object]:
        kinds: Counter[str] = Counter()
        for c in self.plan.collectives:
            kinds[c.kind] += c.count
        return {
            "mesh": self.mesh,
            "layout": self.layout,
            "collectives": dict(sorted(kinds.items())),
            "padding": [str(p) for p in self.plan.paddings],
            "steps": len(self.losses),
            "first": float(self.losses[0]),
            "last": float(self.losses[-1]),
            "off": self.off(base),
            "seconds": round(self.seconds, 1),
        }


def curve(
    config: gpt.Config, mesh: str, steps: int, target: Chip, layout: str = "", seed: int = 0
) -> Curve:
    """Plans and trains on a mesh of this process's devices."""
    plan = make_plan(simplify(gpt.train_step(config)), Mesh.parse(mesh), target, layout)
    run = Run(plan, gpt.init(config), seed)
    begun = time.perf_counter()
    records = list(run.train(batches(config, seed), steps))
    losses = np.array([r.loss for r in records])
    return Curve(mesh, layout, plan, losses, time.perf_counter() - begun)


def batches(config: gpt.Config, seed: int = 0) -> Batches:
    return Batches(byte_tokens(stdlib_text(), None).tokens, config.batch, config.seq, seed)


def reference(config: gpt.Config, steps: int, seed: int = 0) -> np.ndarray:
    """The losses by the reference executor, which knows nothing of plans and meshes."""
    state = dict(run_program(gpt.init(config), {"seed": np.uint32(seed)}))
    program = gpt.train_step(config)
    step = jax.jit(lambda inputs: run_program(program, inputs))
    losses, source = [], batches(config, seed)
    for number in range(steps):
        out = step({**state, **source.at(number)})
        state = {n: out[n] for n in state}
        losses.append(float(out["loss"]))
    return np.array(losses)


def wide(config: gpt.Config) -> gpt.Config:
    return replace(config, dtype="f64", param_dtype="f64")


def all_curves(steps: int, some: int) -> Iterator[tuple[str, Curve, np.ndarray]]:
    """A kind, a curve and the one-device losses that it has to follow."""
    v5e = chip("v5e")
    single = reference(CONFIG, steps)
    for mesh in MESHES:
        yield "planned for v5e", curve(CONFIG, mesh, steps, v5e), single
    for mesh in MESHES[1:]:
        yield "planned for free links", curve(CONFIG, mesh, steps, free_links(v5e)), single
    for mesh, layout in LAYOUTS:
        yield "hand layout", curve(CONFIG, mesh, some, v5e, layout), single
    odd = replace(CONFIG, vocab=259)
    single = reference(odd, some)
    for mesh, layout in (("8x1", "vocab:x"), ("2x4", "batch:x,vocab:y")):
        yield "vocab 259", curve(odd, mesh, some, v5e, layout), single
    drops = replace(CONFIG, embed_dropout=0.1, attn_dropout=0.1, res_dropout=0.1)
    single = reference(drops, some)
    for mesh in MESHES[1:]:
        yield "dropout 0.1", curve(drops, mesh, some, free_links(v5e)), single
    with jax.enable_x64(True):
        single = reference(wide(CONFIG), some)
        for mesh in MESHES[1:]:
            yield "f64, free links", curve(wide(CONFIG), mesh, some, free_links(v5e)), single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--some", type=int, default=30, help="steps of the other comparisons")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_curves.json")
    args = parser.parse_args()
    host_devices(8)
    rows, curves, ok = [], {}, True
    for kind, found, base in all_curves(args.steps, min(args.some, args.steps)):
        row = {"kind": kind, **found.row(base)}
        limit = 1e-9 if kind.startswith("f64") else 1e-4
        ok = ok and found.off(base) <= limit
        rows.append(row)
        if kind.startswith("planned"):
            curves[f"{found.mesh}, {kind}"] = [round(x, 7) for x in found.losses.tolist()]
        moved = sum(c.count for c in found.plan.collectives)
        print(
            f"{kind:24} {found.mesh:6} {found.layout:32} loss {found.losses[0]:.4f} -> "
            f"{found.losses[-1]:.4f}  off {found.off(base):.1e}  {moved:4} transfers  "
            f"{found.seconds:.0f} s",
            flush=True,
        )
    text = stdlib_text()
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "text": {
            "modules": MODULES,
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "config": str(CONFIG),
        "off": "largest relative distance, at any step, from the reference executor's losses",
        "runs": rows,
        "losses": curves,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    if not ok:
        sys.exit("curves differ by more than rounding")


if __name__ == "__main__":
    main()
