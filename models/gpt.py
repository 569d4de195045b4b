"""The GPT-2, GPT-3 and GPT-Neo family: the model, its training step, its initial values.

Dims: batch, seq (the position that asks), memory (the position that is looked at), heads,
head_dim, embd, mlp, vocab, and layers, along which each layer's weights are stacked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from neocc.frontends import gptneo
from neocc.ir.builder import (
    Graph,
    Tensor,
    einsum,
    fused_attention,
    gather,
    iota,
    random,
    repeat,
    select,
)
from neocc.ir.errors import NeoccError
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.nn import cross_entropy, dropout, gelu, layer_norm, softmax
from neocc.optim import Moments, adam, clip_scale, global_norm, learning_rate, moment_weights
from neocc.passes.autodiff import gradients

ATTENTION = ("global", "local", "none")
KERNELS = ("fused", "unfused")
WTE_SALT, WPE_SALT, ATTN_SALT, RES_SALT, MLP_SALT = range(1000, 1005)  # one per dropout
Pattern = tuple[str, ...]  # attention types of consecutive layers


@dataclass(frozen=True)
class Config:
    """A model and how it is trained. Batch in sequences; dropout as probabilities."""

    name: str
    layers: int
    embd: int
    heads: int
    vocab: int = 50257
    seq: int = 2048
    batch: int = 256
    attention: tuple[tuple[Pattern, int], ...] = ()  # (pattern, times); () is all global
    window: int = 256  # a local layer sees this many positions, its own one included
    scale_scores: bool = True  # by 1 / sqrt(head_dim); GPT-Neo does not
    double_at_none: bool = False  # GPT-Neo adds x to itself in a layer without attention
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    res_dropout: float = 0.0
    z_loss: float = 1e-4
    dtype: str = "bf16"  # of matrix products and the residual stream
    param_dtype: str = "f32"  # of parameters, state, softmax, norms and the loss
    recompute: bool | None = None  # None: the plan says what is computed again going back
    # fused: scores are never held whole, nor all computed. unfused: einsum, softmax, einsum, which
    # dropout of attention weights needs and then gets, whatever is said here.
    attention_kernel: str = "fused"
    # Initial values are normal. GPT-2: std 0.02, what writes to the residual stream scaled by
    # 1 / sqrt(2 layers). GPT-Neo: attention by its fan-in, mlp.proj scaled by 1 / sqrt(layers).
    neo_init: bool = False
    scale_by_depth: bool = True
    scale_by_in: bool = False
    # Optimizer
    lr: float = 6e-4
    lr_decay: str = "cosine"
    warmup: int = 2000
    steps: int = 100_000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    bias_correction: bool = True
    weight_decay: float = 0.1
    clip: float | None = 1.0

    @property
    def pattern(self) -> tuple[tuple[Pattern, int], ...]:
        return self.attention or ((("global",), self.layers),)

    def dims(self) -> tuple[Dim, ...]:
        """batch, seq, heads, head_dim, embd, mlp, vocab."""
        if self.embd % self.heads:
            raise NeoccError(f"{self.name}: embd {self.embd} does not divide by {self.heads} heads")
        sizes = {"batch": self.batch, "seq": self.seq, "heads": self.heads}
        sizes |= {"head_dim": self.embd // self.heads, "embd": self.embd}
        sizes |= {"mlp": 4 * self.embd, "vocab": self.vocab}
        return tuple(Dim(n, s) for n, s in sizes.items())

    def stacks(self) -> list[tuple[Dim, int, Pattern]]:
        """One per repeat: its dim, the number of its first layer, and one period of attention."""
        first, found = 0, []
        for i, (types, times) in enumerate(self.pattern):
            name = "layers" if len(self.pattern) == 1 else f"layers_{i}"
            found.append((Dim(name, times), first, types))
            first += len(types) * times
        for kind in (t for _, _, types in found for t in types):
            if kind not in ATTENTION:
                raise NeoccError(f"{self.name}: attention {kind!r}; one of {', '.join(ATTENTION)}")
        if self.attention_kernel not in KERNELS:
            known = ", ".join(KERNELS)
            raise NeoccError(
                f"{self.name}: attention_kernel {self.attention_kernel!r}; one of {known}"
            )
        if first != self.layers:
            raise NeoccError(f"{self.name}: attention of {first} layers for {self.layers} layers")
        return found


@dataclass(frozen=True)
class Weight:
    """A parameter: its dims, and how it starts: normal with ``std``, or all ``fill``."""

    dims: tuple[Dim, ...]
    std: float = 0.0
    fill: float = 0.0

    @property
    def decays(self) -> bool:
        """Norms and biases, which start constant, are not decayed."""
        return self.std > 0


def weights(c: Config) -> dict[str, Weight]:
    """Every parameter by name; ``h3.attn.q`` is layer 3's and that of those stacked on it."""
    _, seq, heads, head_dim, embd, mlp, vocab = c.dims()
    q = kv = 0.02
    o = proj = 0.02 / math.sqrt(2 * c.layers if c.scale_by_depth else 1)
    if c.neo_init:
        q, kv, o = (c.embd * head_dim.size) ** -0.5, c.embd**-0.5, c.embd**-0.5
        proj = 0.02 / math.sqrt(c.layers if c.scale_by_depth else 1)
    fc_in, proj_in = (c.embd**-0.5, mlp.size**-0.5) if c.scale_by_in else (1.0, 1.0)
    norm = {"g": Weight((embd,), fill=1.0), "b": Weight((embd,))}
    attn = {
        "ln1": norm,
        "attn": {
            "q": Weight((embd, heads, head_dim), q),
            "k": Weight((embd, heads, head_dim), kv),
            "v": Weight((embd, heads, head_dim), kv),
            "o": Weight((heads, head_dim, embd), o),
            "b": Weight((embd,)),
        },
    }
    feed = {
        "ln2": norm,
        "mlp": {
            "fc": Weight((embd, mlp), 0.02 * fc_in),
            "fc_b": Weight((mlp,)),
            "proj": Weight((mlp, embd), proj * proj_in),
            "proj_b": Weight((embd,)),
        },
    }
    found = {"wte": Weight((vocab, embd), 0.02), "wpe": Weight((seq, embd), 0.01)}
    for layers, first, types in c.stacks():
        for i, kind in enumerate(types):
            for group, members in (feed if kind == "none" else attn | feed).items():
                for name, w in members.items():
                    found[f"h{first + i}.{group}.{name}"] = replace(w, dims=(layers, *w.dims))
    return found | {f"ln_f.{name}": w for name, w in norm.items()}


Parameters = dict[str, Tensor]


def part(w: Parameters, prefix: str) -> Parameters:
    """Those whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def attention(c: Config, kind: str, x: Tensor, w: Parameters, seed: Tensor | None) -> Tensor:
    """Causal self-attention: x[batch, seq, embd] -> [batch, seq, embd]."""
    _, seq, _, head_dim, *_ = c.dims()
    memory = Dim("memory", c.seq)
    w = {name: t.cast(c.dtype) for name, t in w.items()}
    q = einsum(x, w["q"], "batch seq heads head_dim")
    k = einsum(x, w["k"], "batch seq heads head_dim").rename(seq="memory")
    v = einsum(x, w["v"], "batch seq heads head_dim").rename(seq="memory")
    scale = head_dim.size**-0.5 if c.scale_scores else 1.0
    window = c.window if kind == "local" else None
    if c.attention_kernel == "fused" and (seed is None or not c.attn_dropout):
        mixed, _ = fused_attention(q, k, v, seq, memory, head_dim, True, window, scale)
    else:
        scores = einsum(q, k, "batch heads seq memory", dtype=c.param_dtype) * scale
        i, j = iota(x, seq), iota(x, memory)
        seen = j <= i
        if window is not None:
            seen = seen & (i < j + window)
        p = softmax(select(seen, scores, -1e10), memory)
        p = dropout(p, c.attn_dropout, seed, ATTN_SALT).cast(c.dtype)
        mixed = einsum(p, v, "batch seq heads head_dim")
    return einsum(mixed, w["o"], "batch seq embd") + w["b"]


def feed_forward(c: Config, x: Tensor, w: Parameters) -> Tensor:
    """x[batch, seq, embd] -> [batch, seq, embd] through mlp."""
    w = {name: t.cast(c.dtype) for name, t in w.items()}
    h = gelu(einsum(x, w["fc"], "batch seq mlp") + w["fc_b"])
    return einsum(h, w["proj"], "batch seq embd") + w["proj_b"]


def layer(c: Config, kind: str, x: Tensor, w: Parameters, seed: Tensor | None) -> Tensor:
    """One pre-norm block. Weights are cast inside it, so that they travel as ``dtype``."""

    def norm(x: Tensor, name: str) -> Tensor:
        gain, bias = w[f"{name}.g"], w[f"{name}.b"]
        return layer_norm(x, gain, bias, x.dim("embd")).cast(c.dtype)

    if kind != "none":
        a = attention(c, kind, norm(x, "ln1"), part(w, "attn."), seed)
        x = x + dropout(a, c.res_dropout, seed, RES_SALT)
    elif c.double_at_none:
        x = x + x
    h = feed_forward(c, norm(x, "ln2"), part(w, "mlp."))
    return x + dropout(h, c.res_dropout, seed, MLP_SALT)


def model(c: Config, w: Parameters, tokens: Tensor, seed: Tensor | None) -> Tensor:
    """tokens[batch, seq] -> logits[batch, seq, vocab] in ``param_dtype``.

    ``seed``: for dropout, a u32 scalar to which each layer adds its number; None is for none.

    The embedding is looked up in the parameter's own dtype, so that its gradient, which sums
    as many terms as a token occurs, is summed in it too: bf16 stops growing at some 256 terms.
    """
    x = dropout(gather(w["wte"], tokens, "vocab"), c.embed_dropout, seed, WTE_SALT)
    x = (x + dropout(w["wpe"], c.embed_dropout, seed, WPE_SALT)).cast(c.dtype)
    for layers, first, types in c.stacks():

        def period(x: Tensor, slices: dict, first: int = first, types: Pattern = types) -> Tensor:
            for i, kind in enumerate(types):
                own = None if seed is None else seed + (slices["period"] * len(types) + (first + i))
                x = layer(c, kind, x, part(slices, f"h{first + i}."), own)
            return x

        stacked = {n: t for n, t in w.items() if layers in t.dims}
        if seed is not None:
            stacked["period"] = iota(x, layers, "u32")
        x = repeat(layers, period, x, stacked, c.recompute)
    h = layer_norm(x, w["ln_f.g"], w["ln_f.b"], x.dim("embd")).cast(c.dtype)
    wte = w["wte"].cast(c.dtype)
    return einsum(h, wte, "batch seq vocab", dtype=c.param_dtype)


def losses(c: Config, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over all positions, and loss[batch, seq] of each."""
    each = cross_entropy(logits, labels, logits.dim("vocab"), c.z_loss)
    return each.mean("batch", "seq"), each


def begin(c: Config, name: str) -> tuple[Graph, Parameters, Tensor, Tensor]:
    """A graph with its parameters, tokens[batch, seq] and labels[batch, seq]."""
    g = Graph(f"{c.name}_{name}".replace("-", "_").replace(".", "_"))
    w = {n: g.parameter(n, p.dims, c.param_dtype) for n, p in weights(c).items()}
    batch, seq, *_ = c.dims()
    return g, w, g.data("tokens", (batch, seq)), g.data("labels", (batch, seq))


def mask_seed(c: Config, step: Tensor) -> Tensor | None:
    """Of a step's dropout masks: each layer adds its number, so steps are ``layers`` apart."""
    rates = (c.embed_dropout, c.attn_dropout, c.res_dropout)
    return step.cast("u32") * c.layers if any(rates) else None


def forward(c: Config) -> Program:
    """Parameters, tokens, labels -> logits, loss, loss_batch; without dropout."""
    g, w, tokens, labels = begin(c, "forward")
    c = replace(c, embed_dropout=0.0, attn_dropout=0.0, res_dropout=0.0)
    logits = model(c, w, tokens, None)
    loss, each = losses(c, logits, labels)
    return g.build({"logits": logits, "loss": loss, "loss_batch": each})


def train_step(c: Config) -> Program:
    """Parameters, their moments ``NAME.m`` and ``NAME.v``, step, tokens, labels -> the same
    parameters and state after one step of Adam, and loss, grad_norm (before clipping), lr."""
    g, w, tokens, labels = begin(c, "train_step")
    moments = {
        n: Moments(*(g.state(f"{n}.{m}", t.dims, c.param_dtype) for m in "mv"))
        for n, t in w.items()
    }
    step = g.state("step", (), "i32")
    loss, _ = losses(c, model(c, w, tokens, mask_seed(c, step)), labels)
    grads = dict(zip(w, gradients(loss, list(w.values())), strict=True))

    norm = global_norm(list(grads.values()))
    time = step.cast(c.param_dtype)
    lr = learning_rate(time, c.lr, c.warmup, c.lr_decay, c.steps)
    scale = None if c.clip is None else clip_scale(norm, c.clip)
    correct = moment_weights(time + 1.0, c.beta1, c.beta2) if c.bias_correction else None
    after = {"step": step + 1}
    for n, p in weights(c).items():
        grad = grads[n] if scale is None else grads[n] * scale
        update, (m, v) = adam(grad, moments[n], c.beta1, c.beta2, c.epsilon, correct)
        if p.decays and c.weight_decay:
            update = update + c.weight_decay * w[n]
        after |= {n: w[n] - lr * update, f"{n}.m": m, f"{n}.v": v}
    return g.build(after | {"loss": loss, "grad_norm": norm, "lr": lr})


def init(c: Config) -> Program:
    """seed (u32) -> every parameter and state of ``train_step`` at step 0."""
    g = Graph(f"{c.name}_init".replace("-", "_").replace(".", "_"))
    seed = g.data("seed", (), "u32")
    start = {"step": g.constant(0, "i32")}
    for salt, (n, p) in enumerate(weights(c).items()):
        wide = "f64" if c.param_dtype == "f64" else "f32"
        if p.std:
            start[n] = (random(seed, p.dims, salt, "normal", wide) * p.std).cast(c.param_dtype)
        else:
            start[n] = g.constant(p.fill, c.param_dtype).broadcast(*p.dims)
        for moment in "mv":
            start[f"{n}.{moment}"] = g.constant(0, c.param_dtype).broadcast(*p.dims)
    return g.build(start)


def config_from_gptneo(data: dict, name: str = "gpt-neo") -> Config:
    """A GPT-Neo model config (parsed JSON) as a ``Config``; see ``frontends.gptneo``."""
    return Config(name=name, **gptneo.read(data).settings)


def gpt2(name: str, layers: int, embd: int, heads: int, lr: float) -> Config:
    """Radford et al. 2019, table 2. The learning rates are GPT-3's for the nearest size."""
    return Config(name, layers, embd, heads, seq=1024, batch=512, lr=lr)


def gpt3(name: str, layers: int, embd: int, heads: int, batch: int, lr: float) -> Config:
    """Brown et al. 2020, table 2.1, with every layer dense. Batches in tokens are divided by 2048;
    300e9 tokens in all, 375e6 of them warm-up, and the rate decays over 260e9."""
    warmup, steps = 375 * 10**6 // (batch * 2048), 260 * 10**9 // (batch * 2048)
    return Config(name, layers, embd, heads, batch=batch, lr=lr, warmup=warmup, steps=steps)


TINY = Config("tiny", 2, 32, 4, vocab=64, seq=16, batch=4, dtype="f32", warmup=10, steps=100)
# The paper's XL has 24 heads of 128, which is not its embd of 2048, and its 13B an embd of 5140,
# which is not its 40 heads of 128: here 16 heads and 5120. Its 175B has batches of 1536 sequences;
# here 512, as many as 128 chips of 96 GB hold at a time.
PRESETS: dict[str, Config] = {
    c.name: c
    for c in (
        TINY,
        gpt2("gpt2-small", 12, 768, 12, 6e-4),
        gpt2("gpt2-medium", 24, 1024, 16, 3e-4),
        gpt2("gpt2-large", 36, 1280, 20, 2.5e-4),
        gpt2("gpt2-xl", 48, 1600, 25, 2e-4),
        gpt3("gpt3-small", 12, 768, 12, 256, 6e-4),
        gpt3("gpt3-medium", 24, 1024, 16, 256, 3e-4),
        gpt3("gpt3-large", 24, 1536, 16, 256, 2.5e-4),
        gpt3("gpt3-xl", 24, 2048, 16, 512, 2e-4),
        gpt3("gpt3-2.7b", 32, 2560, 32, 512, 1.6e-4),
        gpt3("gpt3-6.7b", 32, 4096, 32, 1024, 1.2e-4),
        gpt3("gpt3-13b", 40, 5120, 40, 1024, 1e-4),
        gpt3("gpt3-175b", 96, 12288, 96, 512, 0.6e-4),
    )
}
DEFAULT = "gpt3-xl"
