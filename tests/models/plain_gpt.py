"""The same model written straightforwardly in jax.numpy: layers in a Python loop, no names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from models.gpt import Config


def unstack(c: Config, w: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Attention type and weights of each layer, in order."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for dim, first, types in c.stacks():
        for turn in range(dim.size):
            for i, kind in enumerate(types):
                head = f"h{first + i}."
                own = {n[len(head) :]: x[turn] for n, x in w.items() if n.startswith(head)}
                layers.append((kind, own))
    return layers


def norm(x: Any, w: dict[str, Any], name: str) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * w[f"{name}.g"] + w[f"{name}.b"]


def attend(c: Config, kind: str, x: Any, w: dict[str, Any]) -> Any:
    q, k, v = (jnp.tensordot(x, w[f"attn.{n}"], 1) for n in "qkv")
    scores = jnp.einsum("bihd,bjhd->bhij", q, k)
    if c.scale_scores:
        scores = scores / jnp.sqrt(c.embd // c.heads)
    i, j = jnp.arange(c.seq)[:, None], jnp.arange(c.seq)[None, :]
    seen = (j <= i) & ((i - c.window < j) | (kind == "global"))
    p = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    return jnp.einsum("bhij,bjhd,hde->bie", p, v, w["attn.o"]) + w["attn.b"]


def logits(c: Config, w: dict[str, Any], tokens: Any) -> Any:
    x = w["wte"][tokens] + w["wpe"]
    for kind, own in unstack(c, w):
        if kind != "none":
            x = x + attend(c, kind, norm(x, own, "ln1"), own)
        elif c.double_at_none:
            x = 2 * x
        h = norm(x, own, "ln2") @ own["mlp.fc"] + own["mlp.fc_b"]
        x = x + jax.nn.gelu(h, approximate=True) @ own["mlp.proj"] + own["mlp.proj_b"]
    return norm(x, w, "ln_f") @ w["wte"].T


def loss(c: Config, w: dict[str, Any], tokens: Any, labels: Any) -> Any:
    z = logits(c, w, tokens)
    partition = jax.nn.logsumexp(z, -1)
    chosen = jnp.take_along_axis(z, labels[..., None], -1)[..., 0]
    return (partition - chosen + c.z_loss * partition**2).mean()
