"""Fused attention against einsum, softmax, einsum, by the TPU compiler's own figures.

    python -m benchmarks.fused_attention

Attention of one layer with its gradients, causal, bf16, on one v5e chip: estimated cycles summed
with trip counts (collectives carry none, and there are none here), FLOPs of products, temporaries.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from neocc.backends.base import memory_facts
from neocc.backends.tpu.compile import compile_for_tpu, tpu_topology
from neocc.ir.builder import Graph, einsum, fused_attention, iota, select
from neocc.ir.program import Program
from neocc.ir.reference import run_program
from neocc.ir.types import DTYPES, Dim
from neocc.lower.hlo import read_hlo
from neocc.nn import softmax
from neocc.passes.autodiff import gradients
from neocc.passes.simplify import simplify

RESULTS = Path(__file__).parent / "results/fused_attention.json"
SHAPES = ((4, 2048, 16, 128),)  # batch, seq, heads, head_dim: a gpt3-xl layer, 4 sequences a chip


def program(batch: int, seq: int, heads: int, head_dim: int, fused: bool) -> Program:
    """q, k, v and the output's gradient -> output and the gradients of q, k and v."""
    rows = [Dim("batch", batch), Dim("seq", seq), Dim("heads", heads), Dim("head_dim", head_dim)]
    memory = Dim("memory", seq)
    columns = [memory if d.name == "seq" else d for d in rows]
    g = Graph("attention")
    q = g.parameter("q", rows, "bf16")
    k, v = (g.parameter(n, columns, "bf16") for n in "kv")
    if fused:
        out, _ = fused_attention(q, k, v, "seq", memory, "head_dim", True, None, head_dim**-0.5)
    else:
        scores = einsum(q, k, "batch heads seq memory", dtype="f32") * head_dim**-0.5
        seen = iota(q, memory) <= iota(q, rows[1])
        p = softmax(select(seen, scores, -1e10), memory).cast("bf16")
        out = einsum(p, v, "batch seq heads head_dim")
    loss = (out * g.data("dout", rows, "bf16")).cast("f32").sum(*rows)
    dq, dk, dv = gradients(loss, [q, k, v])
    return simplify(g.build({"out": out, "dq": dq, "dk": dk, "dv": dv}))


def measure(program: Program) -> dict[str, float]:
    _, devices = tpu_topology("v5e", (4,))
    sharding = SingleDeviceSharding(devices.flat[0])
    names = [i.name for i in program.inputs]
    shapes = [
        jax.ShapeDtypeStruct(v.type.shape, DTYPES[v.type.dtype], sharding=sharding)
        for v in program.body.args
    ]
    step = jax.jit(lambda *args: run_program(program, dict(zip(names, args, strict=True))))
    compiled = compile_for_tpu(step, shapes)
    facts = read_hlo(compiled.as_text() or "")
    return {
        "estimated_cycles": facts.estimated_cycles,
        "flops": facts.flops,
        "temporary_bytes": memory_facts(compiled).temp,
    }


def main() -> None:
    rows = []
    for shape in SHAPES:
        for fused in (True, False):
            row = {"shape": shape, "kernel": "fused" if fused else "unfused"}
            rows.append(row | measure(program(*shape, fused)))
            print(json.dumps(rows[-1]), flush=True)
    text = {"device": "TPU v5e, one chip, described; libtpu's estimates", "rows": rows}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
