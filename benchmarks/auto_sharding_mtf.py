"""The layout that Mesh TensorFlow's auto layout picks for a GPT. Run by the Python of another
environment (mesh-tensorflow 0.1.21, tensorflow 2.12, ortools 9.9), so nothing of neocc is imported.

    python auto_sharding_mtf.py REQUEST.json

REQUEST has ``config`` (the fields of ``models.gpt.Config``) and ``axes`` ([name, size] of the
mesh). The graph is GPT-Neo's, in its dims, up to the loss: that is what GPT-Neo hands to the auto
layout, before gradients are asked for. Printed is a JSON object: the layout, its seconds, the
graph's size, the bytes a device that it minimised.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import mesh_tensorflow as mtf
import tensorflow.compat.v1 as tf
from mesh_tensorflow.auto_mtf import layout_optimizer, memory_estimator

DTYPES = {"bf16": tf.bfloat16, "f32": tf.float32}


class Gpt:
    """Builds the graph: the residual stream has dims batch, sequence, embd."""

    def __init__(self, c: dict[str, Any]) -> None:
        self.c, self.graph = c, mtf.Graph()
        self.mesh = mtf.Mesh(self.graph, "mesh")
        head = c["embd"] // c["heads"]
        self.batch, self.seq = (
            mtf.Dimension("batch", c["batch"]),
            mtf.Dimension("sequence", c["seq"]),
        )
        self.embd, self.heads = mtf.Dimension("embd", c["embd"]), mtf.Dimension("heads", c["heads"])
        self.head_dim = mtf.Dimension("features_per_head", head)
        self.mlp = mtf.Dimension("intermediate_expanded", 4 * c["embd"])
        self.vocab = mtf.Dimension("vocab", c["vocab"])
        self.memory = mtf.Dimension("memory_length", c["seq"])
        self.dtype = DTYPES[c["dtype"]]

    def weight(self, name: str, *dims: Any) -> Any:
        """A parameter, held in ``param_dtype`` and read in ``dtype``."""
        held = mtf.VariableDType(
            DTYPES[self.c["param_dtype"]], DTYPES[self.c["param_dtype"]], self.dtype
        )
        return mtf.get_variable(self.mesh, name, mtf.Shape(dims), dtype=held)

    def norm(self, x: Any, name: str) -> Any:
        gain, bias = self.weight(f"{name}/g", self.embd), self.weight(f"{name}/b", self.embd)
        x -= mtf.reduce_mean(x, reduced_dim=self.embd)
        variance = mtf.reduce_mean(mtf.square(x), reduced_dim=self.embd)
        return x * mtf.rsqrt(variance + 1e-5) * gain + bias

    def attention(self, x: Any, name: str) -> Any:
        projected = [
            mtf.einsum(
                [x, self.weight(f"{name}/{n}", self.embd, self.heads, self.head_dim)],
                [self.batch, self.seq, self.heads, self.head_dim],
            )
            for n in "qkv"
        ]
        q, k, v = projected
        k, v = (mtf.rename_dimension(t, "sequence", "memory_length") for t in (k, v))
        scores = mtf.einsum([q, k], [self.batch, self.heads, self.seq, self.memory])
        scores *= self.head_dim.size**-0.5
        i = mtf.range(self.mesh, self.seq, tf.int32)
        j = mtf.range(self.mesh, self.memory, tf.int32)
        hidden = mtf.cast(mtf.less(i, j), self.dtype) * -1e10
        p = mtf.softmax(scores + hidden, self.memory)
        mixed = mtf.einsum([p, v], [self.batch, self.seq, self.heads, self.head_dim])
        out = self.weight(f"{name}/o", self.heads, self.head_dim, self.embd)
        return mtf.einsum([mixed, out], [self.batch, self.seq, self.embd]) + self.weight(
            f"{name}/b", self.embd
        )

    def feed_forward(self, x: Any, name: str) -> Any:
        h = mtf.einsum(
            [x, self.weight(f"{name}/fc", self.embd, self.mlp)], [self.batch, self.seq, self.mlp]
        )
        h = mtf.gelu(h + self.weight(f"{name}/fc_b", self.mlp))
        proj = self.weight(f"{name}/proj", self.mlp, self.embd)
        return mtf.einsum([h, proj], [self.batch, self.seq, self.embd]) + self.weight(
            f"{name}/proj_b", self.embd
        )

    def outputs(self) -> list[Any]:
        """Logits and loss."""
        ids = tf.zeros([self.c["batch"], self.c["seq"]], tf.int32)
        shape = mtf.Shape([self.batch, self.seq])
        tokens, labels = (mtf.import_tf_tensor(self.mesh, ids, shape) for _ in range(2))
        wte = self.weight("wte", self.vocab, self.embd)
        places = mtf.Dimension("embed_sequence", self.c["seq"])
        wpe = self.weight("wpe", places, self.embd)
        x = mtf.gather(wte, tokens, self.vocab)
        x += mtf.gather(wpe, mtf.range(self.mesh, self.seq, tf.int32), places)
        for i in range(self.c["layers"]):
            x += self.attention(self.norm(x, f"h{i}/ln1"), f"h{i}/attn")
            x += self.feed_forward(self.norm(x, f"h{i}/ln2"), f"h{i}/mlp")
        logits = mtf.einsum([self.norm(x, "ln_f"), wte], [self.batch, self.seq, self.vocab])
        logits = mtf.cast(logits, tf.float32)
        loss = mtf.layers.softmax_cross_entropy_with_logits(
            logits, labels, self.vocab, z_loss=self.c["z_loss"]
        )
        return [logits, mtf.reduce_mean(loss)]


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    tf.disable_v2_behavior()
    mesh_shape = mtf.convert_to_shape(";".join(f"{n}:{s}" for n, s in request["axes"]))
    begin = time.perf_counter()
    gpt = Gpt(request["config"])
    outputs = gpt.outputs()
    built, busy = time.perf_counter(), time.process_time()
    estimator = memory_estimator.MemoryEstimator(gpt.graph, mesh_shape, outputs)
    optimizer = layout_optimizer.LayoutOptimizer(estimator)
    layout = optimizer.solve()
    end, after = time.perf_counter(), time.process_time()
    found = {
        "layout": layout,
        "graph_seconds": round(built - begin, 2),
        "seconds": round(end - built, 1),
        "processor_seconds": round(after - busy, 1),
        "operations": len(gpt.graph.operations),
        "bytes": math.ceil(optimizer.evaluate_layout(layout)),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
