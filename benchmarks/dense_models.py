"""Dense transformers as neocc programs: one layer, and what stands at the two ends, each with its
gradients, for a microbatch. Published runs are priced on these (``benchmarks.stage_cost``).

Dims: batch, seq, memory, kv_heads, groups (query heads of one key/value head), head_dim, embd,
mlp, vocab. Weights are named q, k, v, o, gate, up, down: that tells their products apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from neocc.ir.builder import (
    Graph,
    Tensor,
    einsum,
    exp,
    fused_attention,
    gather,
    iota,
    repeat,
    rsqrt,
    select,
)
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.nn import cross_entropy, gelu, layer_norm, softmax
from neocc.passes.autodiff import gradients

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Dense:
    """A decoder. ``gated``: SwiGLU, three matrices. ``rms``: RMSNorm, and no biases. ``rope``:
    rotated queries and keys, else learned positions. ``parallel``: attention and feed-forward side
    by side. ``window``: positions that a local layer sees, of which there are ``local_share``."""

    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    seq: int
    gated: bool = False
    rms: bool = False
    rope: bool = False
    tied: bool = True
    parallel: bool = False
    window: int = 0
    local_share: float = 0.0

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's matrices."""
        attention = self.embd * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.embd * self.mlp

    @property
    def parameters(self) -> int:
        """Of all matrices, the embedding counted once if tied; norms and biases left out."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.embd

    @property
    def attended(self) -> float:
        """Mean share of the seq x seq scores that a causal mask (and a window) leaves."""
        full = (self.seq + 1) / (2 * self.seq)
        if not self.window:
            return full
        w = min(self.window, self.seq)
        local = (w * self.seq - w * (w - 1) / 2) / self.seq**2
        return (1 - self.local_share) * full + self.local_share * local


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + exp(-x))


def norm(m: Dense, g: Graph, name: str, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    if m.rms:
        y = x.cast("f32")
        scale = rsqrt((y * y).mean("embd") + 1e-5)
        return (y * scale * w[name]).cast(x.dtype)
    return layer_norm(x.cast("f32"), w[name], w[f"{name}_b"], x.dim("embd")).cast(x.dtype)


def dims(m: Dense, batch: int, seq: int) -> dict[str, Dim]:
    sizes = {"batch": batch, "seq": seq, "memory": seq, "kv_heads": m.kv_heads}
    sizes |= {"groups": m.heads // m.kv_heads, "head_dim": m.head_dim}
    sizes |= {"embd": m.embd, "mlp": m.mlp, "vocab": m.vocab, "layers": 1}
    return {n: Dim(n, s) for n, s in sizes.items()}


def attention(m: Dense, d: dict[str, Dim], x: Tensor, w: dict[str, Tensor], fused: bool) -> Tensor:
    q_dims = "batch seq kv_heads groups head_dim"
    q = einsum(x, w["q"], q_dims)
    k = einsum(x, w["k"], "batch seq kv_heads head_dim")
    v = einsum(x, w["v"], "batch seq kv_heads head_dim")
    if m.rope:  # one pass over each, as a fused rotation makes
        q, k = q * w["angles"], k * w["angles"]
    k, v = k.rename(seq="memory"), v.rename(seq="memory")
    if fused:
        mixed, _ = fused_attention(q, k, v, d["seq"], d["memory"], d["head_dim"], causal=True)
        return einsum(mixed, w["o"], "batch seq embd")
    scores = einsum(q, k, "batch kv_heads groups seq memory")
    seen = iota(scores, d["memory"]) <= iota(scores, d["seq"])
    p = softmax(select(seen, scores, -1e4), d["memory"])
    return einsum(einsum(p, v, q_dims), w["o"], "batch seq embd")


def feed_forward(m: Dense, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = einsum(x, w["up"], "batch seq mlp")
    if m.gated:
        h = silu(einsum(x, w["gate"], "batch seq mlp")) * h
    else:
        h = gelu(h if m.rms else h + w["up_b"])
    return einsum(h, w["down"], "batch seq embd")


def weight_dims(m: Dense, d: dict[str, Dim]) -> dict[str, tuple[Dim, ...]]:
    names = {"q": "embd kv_heads groups head_dim", "k": "embd kv_heads head_dim"}
    names |= {"v": "embd kv_heads head_dim", "o": "kv_heads groups head_dim embd"}
    names |= {"up": "embd mlp", "down": "mlp embd", "norm1": "embd"}
    if m.gated:
        names["gate"] = "embd mlp"
    if not m.parallel:
        names["norm2"] = "embd"
    if not m.rms:
        names |= {"norm1_b": "embd", "norm2_b": "embd", "o_b": "embd", "down_b": "embd"}
        names["up_b"] = "mlp"
    return {n: tuple(d[x] for x in dims_.split()) for n, dims_ in names.items()}


def layer(m: Dense, batch: int, seq: int, dtype: str = "bf16", fused: bool = True) -> Program:
    """One layer, in a repeat of one so that the forward and the backward pass are regions:
    x[batch, seq, embd] and its gradient dy -> gradients of x and of every weight.

    Where ``seq`` is cut, keys and values are gathered along it. ``fused``: attention is one op;
    else its scores are values of the program.
    """
    g, d = Graph("layer"), dims(m, batch, seq)
    weights = {
        n: g.parameter(n, (d["layers"], *ds), "f32" if n.startswith("norm") else dtype)
        for n, ds in weight_dims(m, d).items()
    }
    x = g.data("x", (d["batch"], d["seq"], d["embd"]), dtype)
    dy = g.data("dy", (d["batch"], d["seq"], d["embd"]), dtype)
    constant = {}
    if m.rope:
        constant["angles"] = g.data("angles", (d["seq"], d["head_dim"]), dtype)

    def body(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        w = {**w, **constant}
        h = norm(m, g, "norm1", x, w)
        a = attention(m, d, h, w, fused)
        if m.parallel:
            return x + a + feed_forward(m, h, w)
        x = x + (a if m.rms else a + w["o_b"])
        f = feed_forward(m, norm(m, g, "norm2", x, w), w)
        return x + (f if m.rms else f + w["down_b"])

    y = repeat(d["layers"], body, x, weights)
    loss = (y * dy).cast("f32").sum("batch", "seq", "embd")
    found = gradients(loss, [x, *weights.values()])
    return g.build({f"d_{n}": t for n, t in zip(("x", *weights), found, strict=True)})


def head(m: Dense, batch: int, seq: int, dtype: str = "bf16") -> Program:
    """Last norm, logits and loss of h[batch, seq, embd], with their gradients."""
    g, d = Graph("head"), dims(m, batch, seq)
    table = g.parameter("table", (d["vocab"], d["embd"]), dtype)
    w = {"norm1": g.parameter("norm1", (d["embd"],), "f32")}
    if not m.rms:
        w["norm1_b"] = g.parameter("norm1_b", (d["embd"],), "f32")
    h = g.data("h", (d["batch"], d["seq"], d["embd"]), dtype)
    labels = g.data("labels", (d["batch"], d["seq"]))
    logits = einsum(norm(m, g, "norm1", h, w), table, "batch seq vocab", dtype="f32")
    loss = cross_entropy(logits, labels, d["vocab"]).mean("batch", "seq")
    found = gradients(loss, [h, table, *w.values()])
    return g.build({f"d_{n}": t for n, t in zip(("h", "table", *w), found, strict=True)})


def embedding(m: Dense, batch: int, seq: int, dtype: str = "bf16") -> Program:
    """Looking tokens[batch, seq] up, and the gradient of the table."""
    g, d = Graph("embedding"), dims(m, batch, seq)
    table = g.parameter("table", (d["vocab"], d["embd"]), dtype)
    tokens = g.data("tokens", (d["batch"], d["seq"]))
    dy = g.data("dy", (d["batch"], d["seq"], d["embd"]), dtype)
    loss = (gather(table, tokens, "vocab") * dy).cast("f32").sum("batch", "seq", "embd")
    return g.build({"d_table": gradients(loss, [table])[0]})
