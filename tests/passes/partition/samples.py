"""Small programs that between them have every op, used by the partitioning tests."""

from __future__ import annotations

import numpy as np

from neocc.ir.builder import (
    Graph,
    concat,
    dot,
    einsum,
    exp,
    gather,
    iota,
    log,
    random,
    repeat,
    rsqrt,
    scatter_add,
    select,
)
from neocc.ir.program import Program
from neocc.ir.types import Dim


def block_program() -> Program:
    """A tiny language model's forward pass: embedding, attention and mlp in a repeat, loss."""
    batch, seq, memory, embd = Dim("batch", 4), Dim("seq", 4), Dim("memory", 4), Dim("embd", 8)
    heads, head, mlp = Dim("heads", 4), Dim("head", 2), Dim("mlp", 8)
    layers, vocab = Dim("layers", 3), Dim("vocab", 16)
    g = Graph("block")
    tokens = g.data("tokens", (batch, seq))
    labels = g.data("labels", (batch, seq))
    wte = g.parameter("wte", (vocab, embd), "f64")
    shared = g.parameter("shared", (embd,), "f64")
    stack = {
        "qkv": g.parameter("qkv", (layers, embd, heads, head), "f64"),
        "out": g.parameter("out", (layers, heads, head, embd), "f64"),
        "up": g.parameter("up", (layers, embd, mlp), "f64"),
        "down": g.parameter("down", (layers, mlp, embd), "f64"),
    }

    def body(x, w):
        scale = rsqrt((x * x).mean("embd") + 1e-3)
        normed = x * scale * shared
        q = dot(normed, w["qkv"], "embd")
        k = dot(normed, w["qkv"] * 0.5, "embd").rename(seq="memory")
        scores = einsum(q, k, ("batch", "heads", "seq", "memory"))
        causal = iota(x, memory) <= iota(x, seq)
        scores = select(causal, scores, -1e9)
        weights = exp(scores - scores.max("memory"))
        weights = weights / weights.sum("memory")
        mixed = einsum(weights, k, ("batch", "seq", "heads", "head"))
        x = x + dot(mixed, w["out"], "heads", "head")
        return x + dot(exp(dot(x, w["up"], "embd") * 0.1), w["down"], "mlp")

    x = repeat(layers, body, gather(wte, tokens, "vocab"), stack)
    logits = dot(x, wte, "embd")
    top = logits.max("vocab")
    lse = log(exp(logits - top).sum("vocab")) + top
    right = (logits * iota(logits, vocab).equals(labels).cast("f64")).sum("vocab")
    loss = (lse - right).mean("batch", "seq")
    return g.build({"loss": loss, "logits": logits, "wte": wte * 0.5})


def moves_program() -> Program:
    """Ops that move elements, and those that know the global index."""
    a, b, rows = Dim("a", 8), Dim("b", 4), Dim("rows", 8)
    g = Graph("moves")
    seed = g.data("seed", (), "u32")
    ids = g.data("ids", (a,))
    x = g.data("x", (a, b), "f64")
    noise = random(seed, (a, b), 7, "normal", "f64")
    y = x + noise
    table = scatter_add(y, ids, rows)
    y = y.shift("a", 1) + y.cumsum("a")
    parts = y.split("a", Dim("hi", 4), Dim("lo", 2)).sum("lo")
    both = concat([parts, parts], ["hi", "hi"], Dim("two", 8))
    merged = both.merge("two", "b", "flat")
    cut = merged.slice("flat", 3, Dim("some", 16)).pad("some", 2, Dim("more", 24))
    return g.build({"table": table, "cut": cut, "low": y.reduce("min", "a"), "y": y})


def inputs_for(program: Program, seed: int = 0, high: int = 8) -> dict[str, np.ndarray]:
    """Random inputs: floats of mixed sign, ids in [0, high) with a few out of range."""
    rng = np.random.default_rng(seed)
    found = {}
    for info, value in program.named_inputs:
        shape, dtype = value.type.shape, value.type.dtype
        if value.type.is_float:
            found[info.name] = rng.standard_normal(shape)
        elif dtype == "u32":
            found[info.name] = rng.integers(0, 2**32, shape, dtype=np.uint32)
        else:
            found[info.name] = rng.integers(-1, high + 1, shape, dtype=np.int32)
    return found
