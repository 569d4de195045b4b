"""Hand-made programs that between them have every shape of flow, small enough to search."""

from __future__ import annotations

from neocc.ir.builder import (
    Block,
    Graph,
    Tensor,
    close_repeat,
    dot,
    einsum,
    exp,
    gather,
    repeat,
    tanh,
)
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.passes.autodiff import gradients

BATCH, EMBD, MLP, LAYERS = Dim("batch", 8), Dim("embd", 12), Dim("mlp", 24), Dim("layers", 3)


def mlp() -> Program:
    g = Graph("mlp")
    x = g.data("x", (BATCH, EMBD), "f32")
    up, down = g.parameter("up", (EMBD, MLP)), g.parameter("down", (MLP, EMBD))
    return g.build({"y": dot(tanh(dot(x, up, "embd")), down, "mlp")})


def shared_input() -> Program:
    """q, k and v read one tensor; a residual adds it again."""
    g = Graph("shared_input")
    h = tanh(g.data("x", (BATCH, EMBD), "f32"))
    w = [g.parameter(n, (EMBD, MLP)) for n in "qkv"]
    q, k, v = (dot(h, p, "embd") for p in w)
    return g.build({"y": q * tanh(k) + v, "h": h + 1.0})


def residual() -> Program:
    g = Graph("residual")
    x = g.data("x", (BATCH, EMBD), "f32")
    up = g.parameter("up", (EMBD, MLP))
    y = x + einsum(tanh(dot(x, up, "embd")), up, ("batch", "embd"))
    return g.build({"y": y * y.sum("embd")})


def layer(x: Tensor, w: Tensor) -> Tensor:
    return x + einsum(tanh(dot(x, w, "embd")), w, ("batch", "embd"))


def layers() -> Program:
    """A repeat with a carry and weights."""
    g = Graph("layers")
    x = g.data("x", (BATCH, EMBD), "f32")
    return g.build({"y": repeat(LAYERS, layer, x, g.parameter("w", (LAYERS, EMBD, MLP)))})


def two_stacks() -> Program:
    """Two repeats over one dim."""
    g = Graph("two_stacks")
    x = g.data("x", (BATCH, EMBD), "f32")
    w, v = (g.parameter(n, (LAYERS, EMBD, MLP)) for n in "wv")
    return g.build({"y": repeat(LAYERS, layer, tanh(repeat(LAYERS, layer, x, w)), v)})


def side_output() -> Program:
    """A loop that keeps a product of what it carries: no later step waits for that."""
    g = Graph("side_output")
    x, w = g.data("x", (BATCH, EMBD), "f32"), g.parameter("w", (LAYERS, EMBD, MLP))
    block = Block(g)
    carry = block.add_arg(x.type, "x")
    weight = block.add_arg(w.type.without(["layers"]), "w")
    h = dot(carry, weight, "embd")
    kept = einsum(h, weight, ("batch", "embd"))
    step = tanh(h).sum("mlp") + carry
    attrs = {"dim": LAYERS, "carries": 1, "stacked": 1, "reverse": False, "recompute": False}
    y, stack = close_repeat(block, [x, w], [block.use(step), block.use(kept)], attrs, None)
    return g.build({"y": y, "stack": stack})


def trained(recompute: bool | None = False) -> Program:
    """A gradient through a repeat, and an update."""
    g = Graph("trained")
    x = g.data("x", (BATCH, EMBD), "f32")
    w = g.parameter("w", (LAYERS, EMBD, MLP))
    y = repeat(LAYERS, layer, x, w, recompute)
    loss = (y * y).sum("batch", "embd")
    return g.build({"w": w - gradients(loss, [w])[0] * 0.1, "loss": loss})


def kept_or_not() -> Program:
    """The same, and for each product in the loop the plan says whether it is kept."""
    return trained(None)


def embedding() -> Program:
    g = Graph("embedding")
    table = g.parameter("table", (MLP, EMBD))
    x = gather(table, g.data("ids", (BATCH,)), "mlp")
    logits = dot(exp(x), table, "embd")
    return g.build({"loss": (logits - logits.max("mlp")).sum("batch", "mlp")})
