"""The training step of ``models/gpt.py`` in plain JAX, partitioned by XLA: by its own
auto-sharding, or from the layouts that it is given. Run by the Python of another environment
(jax 0.6.2 is the last series with auto-sharding), so nothing of neocc is imported.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python auto_sharding_step.py REQUEST.json FOLDER

REQUEST has ``config`` (the fields of ``models.gpt.Config``), ``slice`` and ``host`` (a TPU slice
and a host's chips in it), ``axes`` ([name, size] of the mesh), ``places`` (the chip of each
device, in mesh order), ``remat`` (whether a layer is computed again going back), ``options`` of the
compiler, ``auto``, and, unless that is true, ``inputs`` and ``values``: per dim, the mesh axes that
cut it. The optimised HLO goes to FOLDER/hlo.txt; a JSON object of seconds, bytes and chosen layouts
is printed last.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Arrays = dict[str, jax.Array]
Pin = Callable[[str, jax.Array], jax.Array]  # lays a named value out, where the request says how
LAYER = "h0."  # of the weights that are stacked along layers
ONLY = {
    "attention": (),
    "mem_kv": 0,
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu",
    "glu": False,
    "macaron": False,
    "share": False,
    "tied": True,
    "scale_scores": True,
    "embed_dropout": 0.0,
    "attn_dropout": 0.0,
    "res_dropout": 0.0,
    "entmax": False,
    "masking": None,
    "param_dtype": "f32",
    "optimizer": "adam",
    "lr_decay": "cosine",
    "bias_correction": True,
}  # what is written here of models/gpt.py: GPT-2's and GPT-3's training


def shapes(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter by its name in ``models/gpt.py``."""
    embd, heads, vocab, seq = c["embd"], c["heads"], c["vocab"], c["seq"]
    layers, head, mlp = c["layers"], embd // heads, 4 * embd
    stacked = {
        "ln1.g": (embd,),
        "ln1.b": (embd,),
        "attn.q": (embd, heads, head),
        "attn.k": (embd, heads, head),
        "attn.v": (embd, heads, head),
        "attn.o": (heads, head, embd),
        "attn.b": (embd,),
        "ln2.g": (embd,),
        "ln2.b": (embd,),
        "mlp.fc": (embd, mlp),
        "mlp.fc_b": (mlp,),
        "mlp.proj": (mlp, embd),
        "mlp.proj_b": (embd,),
    }
    found = {"wte": (vocab, embd), "wpe": (seq, embd)}
    found |= {LAYER + n: (layers, *s) for n, s in stacked.items()}
    return found | {"ln_f.g": (embd,), "ln_f.b": (embd,)}


def check(c: Mapping[str, Any]) -> None:
    """Refuses what this step does not compute."""
    for field, only in ONLY.items():
        value = c[field]
        if (tuple(value) if isinstance(value, list) else value) != only:
            raise SystemExit(f"{c['name']}: {field} {value!r}; the plain step has {only!r} only")


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    x = x.astype(gain.dtype)
    x = x - x.mean(-1, keepdims=True)
    return (x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + bias).astype(dtype)


def gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def layer(dtype: Any, pin: Pin, x: jax.Array, w: Arrays) -> jax.Array:
    """One pre-norm block, x[batch, seq, embd] -> the same; scores are stored."""
    wide = w["ln1.g"].dtype
    cast = {n: a.astype(dtype) for n, a in w.items()}
    h = layer_norm(x, w["ln1.g"], w["ln1.b"], dtype)
    q, k, v = (pin("qkv", jnp.einsum("bse,ehd->bshd", h, cast[f"attn.{n}"])) for n in "qkv")
    scores = jnp.einsum("bshd,bmhd->bhsm", q, k, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    places = jnp.arange(x.shape[1])
    scores = jnp.where(places[None, :] <= places[:, None], scores, -1e10)
    e = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    p = (e / e.sum(-1, keepdims=True)).astype(dtype)
    mixed = pin("qkv", jnp.einsum("bhsm,bmhd->bshd", p, v))
    x = pin("residual", x + jnp.einsum("bshd,hde->bse", mixed, cast["attn.o"]) + cast["attn.b"])
    h = layer_norm(x, w["ln2.g"], w["ln2.b"], dtype)
    h = pin("mlp", gelu(jnp.einsum("bse,em->bsm", h, cast["mlp.fc"]) + cast["mlp.fc_b"]))
    out = jnp.einsum("bsm,me->bse", h, cast["mlp.proj"]) + cast["mlp.proj_b"]
    return pin("residual", x + out)


def loss_of(
    c: Mapping[str, Any], remat: bool, pin: Pin, w: Arrays, tokens: jax.Array, labels: jax.Array
) -> jax.Array:
    """Mean cross entropy of labels[batch, seq], with the z-loss."""
    dtype = {"bf16": jnp.bfloat16, "f32": jnp.float32}[c["dtype"]]
    block = partial(layer, dtype, pin)
    block = jax.checkpoint(block) if remat else block
    x = pin("residual", (w["wte"][tokens] + w["wpe"]).astype(dtype))
    stacked = {n.removeprefix(LAYER): a for n, a in w.items() if n.startswith(LAYER)}
    x, _ = lax.scan(lambda x, own: (block(x, own), None), x, stacked)
    h = layer_norm(x, w["ln_f.g"], w["ln_f.b"], dtype)
    wte = w["wte"].astype(dtype)
    logits = pin("logits", jnp.einsum("bse,ve->bsv", h, wte, preferred_element_type=jnp.float32))
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    partition = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = jnp.arange(c["vocab"]) == labels[..., None]
    each = partition - jnp.where(chosen, logits, 0.0).sum(-1)
    return (each + c["z_loss"] * partition * partition).mean()


def train_step(
    c: Mapping[str, Any], remat: bool, pin: Pin, state: Arrays, tokens: jax.Array, labels: jax.Array
) -> tuple[Arrays, Arrays]:
    """State (parameters, their moments ``NAME.m`` and ``NAME.v``, step) after one step of Adam; and
    loss, grad_norm and lr."""
    w = {n: state[n] for n in shapes(c)}
    loss, grads = jax.value_and_grad(partial(loss_of, c, remat, pin))(w, tokens, labels)
    norm = jnp.sqrt(sum((g * g).sum() for g in grads.values()))
    scale = 1.0 if c["clip"] is None else c["clip"] / jnp.maximum(norm, c["clip"])
    t = state["step"].astype(jnp.float32)
    done = jnp.minimum(t / c["steps"], 1.0)
    lr = c["lr"] * (0.55 + 0.45 * jnp.cos(math.pi * done)) * jnp.minimum(t / c["warmup"], 1.0)
    b1, b2 = c["beta1"], c["beta2"]
    after: Arrays = {"step": state["step"] + 1}
    for n, p in w.items():
        g = grads[n] * scale
        m = b1 * state[f"{n}.m"] + (1.0 - b1) * g
        v = b2 * state[f"{n}.v"] + (1.0 - b2) * (g * g)
        direction = jnp.sqrt(v / (1.0 - b2 ** (t + 1.0))) + c["epsilon"]
        update = m / (1.0 - b1 ** (t + 1.0)) / direction
        decays = not n.endswith(("_b", ".b", ".g"))
        update = update + c["weight_decay"] * p if decays else update
        after |= {n: p - lr * update, f"{n}.m": m, f"{n}.v": v}
    return after, {"loss": loss, "grad_norm": norm, "lr": lr}


def arguments(c: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Shapes and dtypes of ``train_step``'s state, tokens and labels."""
    wide = jnp.float32
    state = {
        n + suffix: jax.ShapeDtypeStruct(s, wide)
        for n, s in shapes(c).items()
        for suffix in ("", ".m", ".v")
    }
    ids = jax.ShapeDtypeStruct((c["batch"], c["seq"]), jnp.int32)
    return state | {"step": jax.ShapeDtypeStruct((), jnp.int32)}, ids, ids


def spec(cuts: list[list[str]]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axes) if axes else None for axes in cuts))


def described_mesh(request: Mapping[str, Any]) -> Mesh:
    """The slice's devices, laid out as the request places them."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        topology_name=request["slice"], platform="tpu", chips_per_host_bounds=request["host"]
    )
    by_place = {tuple(d.coords)[: len(request["places"][0])]: d for d in found.devices}
    names, sizes = zip(*request["axes"], strict=True)
    devices = np.empty(len(request["places"]), dtype=object)
    for i, place in enumerate(request["places"]):
        devices[i] = by_place[tuple(place)]
    return Mesh(devices.reshape(sizes), names)


def compiled_step(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    c, mesh = request["config"], described_mesh(request)
    state, tokens, labels = arguments(c)
    none: Pin = lambda name, x: x  # noqa: E731
    if request["auto"]:
        from jax.experimental.pjit import AUTO

        auto = AUTO(mesh)
        pin, given, results = none, (auto, auto, auto), auto
    else:
        laid = {n: NamedSharding(mesh, spec(cuts)) for n, cuts in request["inputs"].items()}
        values = {n: NamedSharding(mesh, spec(cuts)) for n, cuts in request["values"].items()}
        whole = NamedSharding(mesh, PartitionSpec())

        def pin(name: str, x: jax.Array) -> jax.Array:
            return lax.with_sharding_constraint(x, values[name]) if name in values else x

        own = {n: laid[n] for n in state}
        given = (own, laid["tokens"], laid["labels"])
        results = (own, dict.fromkeys(("loss", "grad_norm", "lr"), whole))
    step = partial(train_step, c, request["remat"], pin)
    jitted = jax.jit(step, in_shardings=given, out_shardings=results, donate_argnums=0)
    begin = time.perf_counter()
    lowered = jitted.lower(state, tokens, labels)
    traced, busy = time.perf_counter(), time.process_time()
    compiled = lowered.compile(compiler_options=request["options"])
    end, after = time.perf_counter(), time.process_time()
    (folder / "hlo.txt").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    chosen, own_tokens, own_labels = compiled.input_shardings[0]
    layouts = {n: str(s.spec) for n, s in chosen.items() if hasattr(s, "spec")}
    return {
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
        "trace_seconds": round(traced - begin, 2),
        "compile_seconds": round(end - traced, 1),
        "compile_processor_seconds": round(after - busy, 1),
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "peak": getattr(memory, "peak_memory_in_bytes", 0),
        "layouts": layouts | {"tokens": str(own_tokens.spec), "labels": str(own_labels.spec)},
    }


def main() -> None:
    request, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    check(request["config"])
    print(json.dumps(compiled_step(request, folder)), flush=True)
    os._exit(0)  # libtpu may not end by itself


if __name__ == "__main__":
    main()
