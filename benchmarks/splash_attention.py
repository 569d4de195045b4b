"""Splash attention against neocc's loop over tiles, by the TPU compiler's own figures.

    python -m benchmarks.splash_attention

Attention of one layer with its gradients, causal, bf16, on one chip's share of a described slice:
estimated cycles summed with trip counts, and temporaries. The compiler gives no cycles of a kernel,
so those of splash attention are of what is around its kernels; the kernels are counted.
"""

from __future__ import annotations

import json
from pathlib import Path

from neocc.backends import chip
from neocc.backends.target import lower_for_target
from neocc.backends.tpu import BACKEND
from neocc.backends.tpu.attention import SPLASH
from neocc.ir.builder import Graph, fused_attention
from neocc.ir.mesh import Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.lower.hlo import read_hlo
from neocc.passes.autodiff import gradients
from neocc.passes.plan import make_plan
from neocc.passes.simplify import simplify

RESULTS = Path(__file__).parent / "results/splash_attention.json"
CHIPS = 4
SHAPES = ((2048, 16, 128, None), (2048, 16, 128, 256), (8192, 16, 128, None))
KERNEL = 'custom_call_target="tpu_custom_call"'


def program(seq: int, heads: int, head_dim: int, window: int | None) -> Program:
    """q, k, v and the output's gradient -> output and the gradients of q, k and v."""
    batch = Dim("batch", 4 * CHIPS)
    rows = [batch, Dim("seq", seq), Dim("heads", heads), Dim("head_dim", head_dim)]
    memory = Dim("memory", seq)
    columns = [memory if d.name == "seq" else d for d in rows]
    g = Graph("attention")
    q = g.parameter("q", rows, "bf16")
    k, v = (g.parameter(n, columns, "bf16") for n in "kv")
    out, _ = fused_attention(q, k, v, "seq", memory, "head_dim", True, window, head_dim**-0.5)
    loss = (out * g.data("dout", rows, "bf16")).cast("f32").sum(*rows)
    dq, dk, dv = gradients(loss, [q, k, v])
    return simplify(g.build({"out": out, "dq": dq, "dk": dk, "dv": dv}))


def measure(name: str, splash: bool, *shape: int | None) -> dict[str, object]:
    step = program(*shape)  # type: ignore[arg-type]
    plan = make_plan(step, Mesh.parse(f"x:{CHIPS}"), chip(name), layout="batch:x")
    lowered = lower_for_target(plan, kernels=SPLASH if splash else None)
    compiled = BACKEND.compile(lowered.stage, BACKEND.compiler_options())
    text = compiled.as_text() or ""
    facts = read_hlo(text)
    return {
        "chip": name,
        "seq, heads, head_dim, window": shape,
        "form": "splash" if splash else "loop",
        "kernels": text.count(KERNEL),
        "estimated_cycles_outside_kernels": facts.estimated_cycles,
        "temporary_bytes": BACKEND.memory(compiled).temp,
    }


def main() -> None:
    rows = []
    for name in ("v5e", "v5p"):
        for shape in SHAPES:
            for splash in (False, True):
                rows.append(measure(name, splash, *shape))
                print(json.dumps(rows[-1]), flush=True)
    text = {"device": "TPU v5e and v5p, 4 chips, described; libtpu's estimates", "rows": rows}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
