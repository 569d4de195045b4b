"""The same model written straightforwardly in jax.numpy: layers in a Python loop, no names.

Options are as in GPT-Neo's models/gpt2/gpt2.py and models/layers.py: keys concatenated, states of
linear attention held for every position, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from models.gpt import Config


def unstack(c: Config, w: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Attention type and weights of each layer, in order; those of experts or those of an mlp."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for dim, first, types in c.stacks():
        for turn in range(dim.size):
            for i, kind in enumerate(types):
                head = "h." if c.share else f"h{first + i}."
                own = {n[len(head) :]: x for n, x in w.items() if n.startswith(head)}
                other = "mlp." if len(layers) in c.moe_layers else "moe."
                own = {n: x for n, x in own.items() if not n.startswith(other)}
                layers.append((kind, own if c.share else {n: x[turn] for n, x in own.items()}))
    return layers


def standard(x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def norm(x: Any, w: dict[str, Any], name: str) -> Any:
    return standard(x) * w[f"{name}.g"] + w[f"{name}.b"]


def rotated(c: Config, x: Any) -> Any:
    """x[batch, seq, heads, head_dim]; NeoX's pairing."""
    d = x.shape[-1]
    rate = 1 / 10000 ** (jnp.arange(0, d, 2) / d)
    angle = jnp.concatenate([jnp.arange(c.seq)[:, None] * rate] * 2, -1)[None, :, None]
    half = jnp.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * jnp.cos(angle) + half * jnp.sin(angle)


def linear(c: Config, q: Any, k: Any, v: Any) -> Any:
    q = jax.nn.softmax(q, -1)
    if c.masking is not None:
        context = jnp.einsum("bjhd,bjhe->bhde", jax.nn.softmax(k, 1), v)
        return jnp.einsum("bihd,bhde->bihe", q, context)
    k = jnp.exp(k)
    context = jnp.cumsum(jnp.einsum("bjhd,bjhe->bjhde", k, v), 1)
    total = jnp.einsum("bihd,bihd->bih", q, jnp.cumsum(k, 1)) + 1e-6
    return jnp.einsum("bihd,bihde->bihe", q, context) / total[..., None]


def attend(c: Config, kind: str, x: Any, w: dict[str, Any]) -> Any:
    q, k, v = (jnp.tensordot(x, w[f"attn.{n}"], 1) for n in "qkv")
    if c.positions == "rotary":
        q, k = rotated(c, q), rotated(c, k)
    if kind == "linear":
        return jnp.einsum("bihd,hde->bie", linear(c, q, k, v), w["attn.o"]) + w["attn.b"]
    i, j = jnp.arange(c.seq)[:, None], jnp.arange(c.seq)[None, :]
    seen = jnp.ones((c.seq, c.seq), bool) if c.masking is not None else j <= i
    if kind == "local":
        seen &= abs(i - j) < c.window
    if kind == "global" and c.mem_kv:
        own = (jnp.broadcast_to(w[f"attn.mem_{n}"], (len(x), *w["attn.mem_k"].shape)) for n in "kv")
        k, v = (jnp.concatenate(pair, 1) for pair in zip(own, (k, v), strict=True))
        seen = jnp.concatenate([jnp.ones((c.seq, c.mem_kv), bool), seen], 1)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k)
    if c.scale_scores:
        scores = scores / jnp.sqrt(c.embd // c.heads)
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    return jnp.einsum("bhij,bjhd,hde->bie", p, v, w["attn.o"]) + w["attn.b"]


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "selu": jax.nn.selu,
    "softmax": lambda x: jax.nn.softmax(x, -1),
}


def feed(c: Config, x: Any, w: dict[str, Any], group: str) -> Any:
    h = x @ w[f"{group}.fc"] + w[f"{group}.fc_b"]
    act = ACTIVATIONS[c.activation]
    h = h * act(x @ w[f"{group}.gate"] + w[f"{group}.gate_b"]) if c.glu else act(h)
    return h @ w[f"{group}.proj"] + w[f"{group}.proj_b"]


def send(c: Config, x: Any, w: dict[str, Any]) -> tuple[Any, Any]:
    """One group's tokens[token, embd] through their experts, one token after the other; and the
    balancing loss. Without what is drawn at random."""
    assert c.experts is not None
    e, (tokens, _) = c.experts, x.shape
    up, down = (jnp.asarray(w[f"moe.{n}"]) for n in ("up", "down"))
    how = e.routing
    room = max(min(tokens, int(tokens * how.capacity / e.count)), e.least)
    logits = x @ w["moe.gate"]
    p = jax.nn.softmax(logits, -1)
    order = jnp.argsort(-p, -1)[:, : e.choices]
    gates = jnp.take_along_axis(p, order, -1)
    if e.choices > 1:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-9)
    taken, out = jnp.zeros(e.count, int), jnp.zeros_like(x)
    for n in range(e.choices):
        for t in range(tokens):
            to, gate = order[t, n], gates[t, n]
            wanted = n == 0 or how.policy == "all" or gate > how.threshold
            fits = jnp.logical_and(wanted, taken[to] < room)
            y = jax.nn.relu(x[t] @ up[to]) @ down[to]
            out = out.at[t].add(jnp.where(fits, gate * y, 0.0))
            taken = taken.at[to].add(fits)
    first = jax.nn.one_hot(order[:, 0], e.count)
    balance = (first.mean(0) * p.mean(0)).mean() * e.count**2
    z = (jax.nn.logsumexp(logits, -1) ** 2).mean()
    return out, e.loss * (balance + e.z_loss * z)


def mixture(c: Config, x: Any, w: dict[str, Any]) -> tuple[Any, Any]:
    assert c.experts is not None
    size = max(n for n in range(1, c.experts.group + 1) if c.seq % n == 0)
    out, loss = jax.vmap(lambda group: send(c, group, w))(x.reshape(-1, size, c.embd))
    return out.reshape(x.shape), loss.mean()


def block(c: Config, kind: str, x: Any, own: dict[str, Any]) -> tuple[Any, Any]:
    before = {
        "layer": lambda x, name: norm(x, own, name),
        "scale": lambda x, name: standard(x) * own[f"{name}.g"],
        "rezero": lambda x, name: x,
    }[c.norm]
    gains = [own.get(f"rezero{i}.g", 1.0) for i in (1, 2)]
    part = 1.0
    if c.macaron:
        part = 0.5
        x = x + part * feed(c, x, own, "macaron")
    if kind != "none":
        x = x + gains[0] * attend(c, kind, before(x, "ln1"), own)
    elif c.double_at_none:
        x = x + gains[0] * x
    if "moe.gate" in own:
        y, balance = mixture(c, before(x, "ln2"), own)
    else:
        y, balance = feed(c, before(x, "ln2"), own, "mlp"), 0.0
    return x + gains[1] * part * y, balance


def logits(c: Config, w: dict[str, Any], tokens: Any) -> tuple[Any, Any]:
    """And the balancing losses of all layers."""
    x = w["wte"][tokens]
    if c.positions == "learned":
        x = x + w["wpe"]
    if c.positions == "axial":
        table = (w["wpe_1"][:, None] + w["wpe_2"][None]) / 2
        x = x + table.reshape(-1, c.embd)[: c.seq]
    balance = 0.0
    for kind, own in unstack(c, w):
        x, more = block(c, kind, x, own)
        balance = balance + more
    if not c.tied:
        return x @ w["head.w"] + w["head.b"], balance
    return norm(x, w, "ln_f") @ w["wte"].T, balance


@jax.custom_vjp
def entmax(z: Any) -> Any:
    """1.3-entmax by bisection: GPT-Neo's models/utils.py, in one dim."""
    x = 0.3 * z
    top = x.max(-1, keepdims=True)

    def halve(_: int, bounds: Any) -> Any:
        low, high = bounds
        middle = (low + high) / 2
        enough = (jnp.maximum(x - middle, 0) ** (1 / 0.3)).sum(-1, keepdims=True) >= 1
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 80, halve, (top - 1.0, top))
    p = jnp.maximum(x - low, 0) ** (1 / 0.3)
    return p / p.sum(-1, keepdims=True)


def entmax_forward(z: Any) -> Any:
    p = entmax(z)
    return p, p


def entmax_backward(p: Any, g: Any) -> Any:
    """GPT-Neo's own rule: the Jacobian of entmax, through which the loss's gradient must come out
    as p - onehot although the loss of neocc takes p as a constant."""
    s = jnp.where(p > 0, p**0.7, 0)
    return (s * g - s * (s * g).sum(-1, keepdims=True) / s.sum(-1, keepdims=True),)


entmax.defvjp(entmax_forward, entmax_backward)


def loss(c: Config, w: dict[str, Any], tokens: Any, labels: Any) -> Any:
    if c.moe_layers and c.experts is not None:
        c = replace(c, experts=c.experts.evaluation)
    z, balance = logits(c, w, tokens)
    chosen = jnp.take_along_axis(z, labels[..., None], -1)[..., 0]
    if c.entmax:
        p = entmax(z)
        each = (p * z).sum(-1) - chosen + (p - p**1.3).sum(-1) / (1.3 * 0.3)
    else:
        partition = jax.nn.logsumexp(z, -1)
        each = partition - chosen + c.z_loss * partition**2
    if c.masking is not None:
        each = jnp.where(labels == c.masking.padding, 0.0, each)
    return each.mean() + balance
