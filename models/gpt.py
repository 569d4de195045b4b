"""The GPT-2, GPT-3 and GPT-Neo family: the model, its training step, its initial values.

Dims: batch, seq (the position that asks), memory (the position that is looked at), heads,
head_dim, embd, mlp, vocab, and layers, along which each layer's weights are stacked. In a mixture
of experts also experts, expert_hidden, and the group, token and slot of ``neocc.nn.experts``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from neocc.frontends import gptneo, huggingface
from neocc.ir.builder import (
    Graph,
    Tensor,
    einsum,
    fused_attention,
    gather,
    iota,
    random,
    repeat,
    scan,
    select,
)
from neocc.ir.errors import NeoccError
from neocc.ir.program import Program
from neocc.ir.types import Dim
from neocc.nn import (
    Cached,
    Draw,
    Experts,
    Masking,
    Place,
    Weight,
    activate,
    cache_inputs,
    cached_attention,
    check_experts,
    cross_entropy,
    draws_by_position,
    dropout,
    entmax_loss,
    layer_norm,
    linear_attention,
    linear_state,
    linear_step,
    mask_tokens,
    mixture,
    rotary,
    scale_norm,
    stored,
    unfused_attention,
    unrouted,
)
from neocc.optim import Adafactor, Adam, clip_scale, global_norm, learning_rate
from neocc.passes.autodiff import gradients

ATTENTION = ("global", "local", "linear", "none")
KERNELS = ("fused", "unfused")
POSITIONS = ("learned", "rotary", "axial")
NORMS = ("layer", "scale", "rezero")
OPTIMIZERS = ("adam", "adafactor")
WTE_SALT, WPE_SALT, ATTN_SALT, RES_SALT, MLP_SALT = range(1000, 1005)  # one per dropout
MACARON_SALT, SCORE_SALTS = 1005, (ATTN_SALT, 1006)
Pattern = tuple[str, ...]  # attention types of consecutive layers
Kind = tuple[str, bool]  # a layer's attention, and whether its mlp is a mixture of experts


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
    mem_kv: int = 0  # learned keys and values that every query of a global layer sees as well
    positions: str = "learned"  # a table; rotary: q and k turned; axial: a row and a column table
    axial: tuple[int, int] = (0, 0)  # rows and columns of axial positions, seq of them
    # rezero: no norm, what is added to the residual stream has a gain that starts at 0. scale: a
    # norm with one gain in place of embd ones.
    norm: str = "layer"
    activation: str = "gelu"  # one of neocc.nn.ACTIVATIONS
    glu: bool = False  # mlp.fc times the activation of mlp.gate
    macaron: bool = (
        False  # half an mlp before attention and half of one after, the first not normed
    )
    moe_layers: tuple[int, ...] = ()  # those with experts in the place of an mlp
    experts: Experts | None = None
    share: bool = False  # all layers have the same parameters
    tied: bool = True  # logits from ln_f and the embedding; else from a head of its own, unnormed
    scale_scores: bool = True  # by 1 / sqrt(head_dim); GPT-Neo does not
    qkv_bias: bool = False  # queries, keys and values have biases; GPT-2's do
    double_at_none: bool = False  # GPT-Neo adds x to itself in a layer without attention
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    res_dropout: float = 0.0
    z_loss: float = 1e-4
    entmax: bool = False  # the entmax loss in place of cross entropy and z_loss
    masking: Masking | None = None  # finds masked tokens, looking both ways; None: the next one
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
    # Optimizer. Adafactor: beta1 0 keeps no first moments; beta2 and epsilon are Adam's alone.
    optimizer: str = "adam"
    lr: float = 6e-4
    lr_decay: str = "cosine"
    warmup: int = 2000
    steps: int = 100_000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    ada_epsilon1: float = 1e-30  # added to squared gradients
    ada_epsilon2: float = 1e-3  # the least scale of a parameter
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
        """One per repeat: its dim, the number of its first layer, and one period of attention. Each
        period has its experts in the same places."""
        first, found = 0, []
        pattern = self.pattern
        if self.moe_layers:
            types = [t for types, times in pattern for t in types * times]
            kinds = periods([(t, i in self.moe_layers) for i, t in enumerate(types)])
            pattern = tuple((tuple(t for t, _ in period), times) for period, times in kinds)
        for i, (types, times) in enumerate(pattern):
            name = "layers" if len(pattern) == 1 else f"layers_{i}"
            found.append((Dim(name, times), first, types))
            first += len(types) * times
        choices = [("attention", t, ATTENTION) for _, _, types in found for t in types]
        choices += [("attention_kernel", self.attention_kernel, KERNELS)]
        choices += [("positions", self.positions, POSITIONS), ("norm", self.norm, NORMS)]
        for field, value, known in (*choices, ("optimizer", self.optimizer, OPTIMIZERS)):
            if value not in known:
                raise NeoccError(f"{self.name}: {field} {value!r}; one of {', '.join(known)}")
        if first != self.layers:
            raise NeoccError(f"{self.name}: attention of {first} layers for {self.layers} layers")
        if self.moe_layers:
            if self.experts is None:
                raise NeoccError(f"{self.name}: moe_layers need experts")
            check_experts(self.experts)
            if wrong := [i for i in self.moe_layers if not 0 <= i < self.layers]:
                raise NeoccError(
                    f"{self.name}: moe_layers has {wrong[0]}; layers are 0 to {self.layers - 1}"
                )
        return found


def periods(kinds: Sequence[Kind]) -> list[tuple[tuple[Kind, ...], int]]:
    """The layers as (period, times) pairs in order: each time the shortest period that, repeated,
    goes furthest."""
    found: list[tuple[tuple[Kind, ...], int]] = []
    at = 0
    while at < len(kinds):
        rest, best = kinds[at:], (1, 1)
        for p in range(1, len(rest) // 2 + 1):
            times = next(t for t in range(1, len(rest) + 1) if rest[t * p :][:p] != rest[:p])
            if times > 1 and p * times > best[0] * best[1]:
                best = p, times
        found.append((tuple(rest[: best[0]]), best[1]))
        at += best[0] * best[1]
    return found


def weights(c: Config) -> dict[str, Weight]:
    """Every parameter by name; ``h3.attn.q`` is layer 3's and that of those stacked on it."""
    _, seq, heads, head_dim, embd, mlp, vocab = c.dims()
    stacks = c.stacks()
    q = kv = 0.02
    o = proj = 0.02 / math.sqrt(2 * c.layers if c.scale_by_depth else 1)
    if c.neo_init:
        q, kv, o = (c.embd * head_dim.size) ** -0.5, c.embd**-0.5, c.embd**-0.5
        proj = 0.02 / math.sqrt(c.layers if c.scale_by_depth else 1)
    fc_in, proj_in = (c.embd**-0.5, mlp.size**-0.5) if c.scale_by_in else (1.0, 1.0)
    norm = {"g": Weight((embd,), fill=1.0), "b": Weight((embd,))}
    own = {"layer": norm, "scale": {"g": Weight((), fill=1.0)}, "rezero": {}}[c.norm]
    gain = {"g": Weight(())} if c.norm == "rezero" else {}
    biases = {f"{n}_b": Weight((heads, head_dim)) for n in "qkv" if c.qkv_bias}
    attn = {
        "q": Weight((embd, heads, head_dim), q),
        "k": Weight((embd, heads, head_dim), kv),
        "v": Weight((embd, heads, head_dim), kv),
        "o": Weight((heads, head_dim, embd), o, rows=2),
        "b": Weight((embd,)),
        **biases,
    }
    mem = Weight((Dim("mem", c.mem_kv), heads, head_dim), head_dim.size**-0.5)
    feed = {
        "fc": Weight((embd, mlp), 0.02 * fc_in),
        "fc_b": Weight((mlp,)),
        "proj": Weight((mlp, embd), proj * proj_in),
        "proj_b": Weight((embd,)),
    }
    if c.glu:
        feed |= {"gate": Weight((embd, mlp), 0.02 * fc_in), "gate_b": Weight((mlp,))}
    moe: dict[str, Weight] = {}
    if c.moe_layers and c.experts is not None:
        experts, hidden = c.experts.experts, Dim("expert_hidden", c.experts.hidden)
        # Mesh TensorFlow's: by what goes in.
        moe["gate"] = Weight((embd, experts), c.embd**-0.5)
        moe["up"] = Weight((experts, embd, hidden), c.embd**-0.5, stacked=1)
        moe["down"] = Weight((experts, hidden, embd), hidden.size**-0.5, stacked=1)

    def block(kind: str, mixed: bool) -> dict[str, dict[str, Weight]]:
        """The weights of a layer, by group."""
        found = {"macaron": feed} if c.macaron else {}
        if kind != "none":
            more = {"mem_k": mem, "mem_v": mem} if kind == "global" and c.mem_kv else {}
            found |= {"ln1": own, "attn": attn | more}
        if kind != "none" or c.double_at_none:
            found["rezero1"] = gain
        return found | {"ln2": own, **({"moe": moe} if mixed else {"mlp": feed}), "rezero2": gain}

    found = {"wte": Weight((vocab, embd), 0.02)}
    if c.positions == "axial":
        sides = (Dim(f"axial_{i}", n) for i, n in enumerate(c.axial, 1))
        found |= {f"wpe_{i}": Weight((d, embd), 0.01) for i, d in enumerate(sides, 1)}
    elif c.positions == "learned":
        found["wpe"] = Weight((seq, embd), 0.01)
    for layers, first, types in stacks:
        for i, kind in enumerate(types):
            for group, members in block(kind, first + i in c.moe_layers).items():
                for name, w in members.items():
                    if c.share:
                        found[f"h.{group}.{name}"] = w
                    else:
                        stack = replace(w, dims=(layers, *w.dims), stacked=w.stacked + 1)
                        found[f"h{first + i}.{group}.{name}"] = stack
    if c.tied:
        return found | {f"ln_f.{name}": w for name, w in norm.items()}
    return found | {"head.w": Weight((embd, vocab), 0.02 * fc_in), "head.b": Weight((vocab,))}


Parameters = dict[str, Tensor]


def part(w: Parameters, prefix: str) -> Parameters:
    """Those whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def attention(
    c: Config, kind: str, x: Tensor, w: Parameters, seed: Tensor | None, cached: Cached | None
) -> Tensor:
    """Self-attention: x[batch, seq, embd] -> [batch, seq, embd]. Causal but for ``masking``. With
    ``cached``, keys and values go there, and a decode step looks at those that are there."""
    _, seq, _, head_dim, *_ = c.dims()
    memory = Dim("memory", c.seq)
    w = {name: t.cast(c.dtype) for name, t in w.items()}

    def project(name: str) -> Tensor:
        y = einsum(x, w[name], "batch seq heads head_dim")
        return y + w[f"{name}_b"] if c.qkv_bias else y

    def placed(t: Tensor) -> Tensor:
        if c.positions != "rotary":
            return t
        at = cached.place.positions if cached is not None and cached.place is not None else None
        return rotary(t, seq, head_dim, c.param_dtype, at)

    q = placed(project("q"))
    k = placed(project("k")).rename(seq="memory")
    v = project("v").rename(seq="memory")
    scale = head_dim.size**-0.5 if c.scale_scores else 1.0
    window = c.window if kind == "local" else None
    causal, dropped = c.masking is None, seed is not None and c.attn_dropout > 0
    more = (w["mem_k"], w["mem_v"]) if kind == "global" and c.mem_kv else None
    if cached is not None and kind != "linear":
        cached.made.update(k=k, v=v)
    elif cached is not None and not cached.past:
        cached.made.update(linear_state(k, v, cached.lengths, c.param_dtype))
    if cached is not None and cached.past and kind == "linear":
        mixed, state = linear_step(q, k, v, cached.past, c.param_dtype)
        cached.made.update(state)
    elif cached is not None and cached.past:
        mixed = cached_attention(q, k, v, cached, window, scale, c.param_dtype, more)
    elif kind == "linear":
        mixed = linear_attention(q, k, v, causal, c.param_dtype)
    elif c.attention_kernel == "fused" and not dropped and more is None:
        mixed, _ = fused_attention(q, k, v, seq, memory, head_dim, causal, window, scale)
    else:
        drops = [partial(dropout, rate=c.attn_dropout, seed=seed, salt=s) for s in SCORE_SALTS]
        mixed = unfused_attention(q, k, v, causal, window, scale, c.param_dtype, drops, more)
    return einsum(mixed, w["o"], "batch seq embd") + w["b"]


def feed_forward(c: Config, x: Tensor, w: Parameters) -> Tensor:
    """x[batch, seq, embd] -> [batch, seq, embd] through mlp."""
    w = {name: t.cast(c.dtype) for name, t in w.items()}
    h = einsum(x, w["fc"], "batch seq mlp") + w["fc_b"]
    if c.glu:
        h = h * activate(c.activation, einsum(x, w["gate"], "batch seq mlp") + w["gate_b"], "mlp")
    else:
        h = activate(c.activation, h, "mlp")
    return einsum(h, w["proj"], "batch seq embd") + w["proj_b"]


@dataclass(frozen=True)
class Sampled:
    """How a layer runs where a text is continued or scored: what it puts into the ``cached`` keys
    and values, if there are any; ``draw``: for experts that are chosen at random."""

    cached: Cached | None
    draw: Draw | None


def layer(
    c: Config,
    kind: str,
    x: Tensor,
    w: Parameters,
    seed: Tensor | None,
    sampled: Sampled | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One pre-norm block, and the loss[batch] of its experts if it has them. Weights are cast
    inside it, so that they travel as ``dtype``."""

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "rezero":
            return x
        if c.norm == "scale":
            return scale_norm(x, w[f"{name}.g"], x.dim("embd")).cast(c.dtype)
        gain, bias = w[f"{name}.g"], w[f"{name}.b"]
        return layer_norm(x, gain, bias, x.dim("embd")).cast(c.dtype)

    def gained(x: Tensor, name: str) -> Tensor:
        """Wide, since the gain's gradient sums over every element."""
        if c.norm != "rezero":
            return x
        return (x.cast(c.param_dtype) * w[f"{name}.g"]).cast(c.dtype)

    if c.macaron:
        h = feed_forward(c, x, part(w, "macaron."))
        x = x + 0.5 * dropout(h, c.res_dropout, seed, MACARON_SALT)
    if kind != "none":
        cached = None if sampled is None else sampled.cached
        a = attention(c, kind, norm(x, "ln1"), part(w, "attn."), seed, cached)
        x = x + gained(dropout(a, c.res_dropout, seed, RES_SALT), "rezero1")
    elif c.double_at_none:
        x = x + gained(x, "rezero1")
    h, loss = norm(x, "ln2"), None
    if "moe.gate" in w:
        assert c.experts is not None
        up, down = (w[f"moe.{n}"].cast(c.dtype) for n in ("up", "down"))
        if sampled is None:
            h, loss = mixture(h, w["moe.gate"], up, down, c.experts, seed)
        else:
            h = unrouted(h, w["moe.gate"], up, down, c.experts, sampled.draw)
    else:
        h = feed_forward(c, h, part(w, "mlp."))
    h = dropout(h, c.res_dropout, seed, MLP_SALT)
    return x + gained(0.5 * h if c.macaron else h, "rezero2"), loss


def position_table(c: Config, w: Parameters, dim: str = "seq") -> Tensor | None:
    """What is added to the embeddings: [seq, embd], or nothing where positions are rotary. ``dim``:
    what the table's seq is called."""
    if c.positions == "rotary":
        return None
    if c.positions == "learned":
        return w["wpe"]
    rows, columns = c.axial
    if rows * columns < c.seq:
        raise NeoccError(f"{c.name}: {rows} x {columns} axial positions for a seq of {c.seq}")
    table = (w["wpe_1"] + w["wpe_2"]) * 0.5
    if rows * columns == c.seq:
        return table.merge("axial_1", "axial_2", dim)
    return table.merge("axial_1", "axial_2", "position").slice("position", 0, Dim(dim, c.seq))


def model(
    c: Config, w: Parameters, tokens: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """tokens[batch, seq] -> logits[batch, seq, vocab] in ``param_dtype``, and the loss[batch] of
    all mixtures of experts, if there are any.

    ``seed``: for dropout and for experts chosen at random, a u32 scalar to which each layer adds
    its number; None is for none.

    The embedding is looked up in the parameter's own dtype, so that its gradient, which sums
    as many terms as a token occurs, is summed in it too: bf16 stops growing at some 256 terms.
    """
    x = dropout(gather(w["wte"], tokens, "vocab"), c.embed_dropout, seed, WTE_SALT)
    table = position_table(c, w)
    if table is not None:
        x = x + dropout(table, c.embed_dropout, seed, WPE_SALT)
    carry = {"x": x.cast(c.dtype)}
    if c.moe_layers:
        zero = x.block.emit("constant", (), value=0.0, dtype=c.param_dtype)
        carry["balance"] = zero.broadcast(tokens.dims[0])
    for layers, first, types in c.stacks():

        def period(
            carry: Parameters, slices: dict, first: int = first, types: Pattern = types
        ) -> Parameters:
            after = dict(carry)
            for i, kind in enumerate(types):
                number = first + i
                own = None if seed is None else seed + (slices["period"] * len(types) + number)
                mine = own_weights(c, w, slices, number)
                after["x"], loss = layer(c, kind, after["x"], mine, own)
                if loss is not None:
                    after["balance"] = after["balance"] + loss
            return after

        stacked = {n: t for n, t in w.items() if layers in t.dims}
        if seed is not None:
            stacked["period"] = iota(carry["x"], layers, "u32")
        mixed = any(first + i in c.moe_layers for i in range(len(types)))
        carried = carry if mixed else {"x": carry["x"]}
        carry |= repeat(layers, period, carried, stacked, c.recompute)
    return logits_of(c, w, carry["x"]), carry.get("balance")


def own_weights(c: Config, w: Parameters, slices: Parameters, number: int) -> Parameters:
    """Those of a layer: slices of what is stacked, or what all layers share."""
    if not c.share:
        return part(slices, f"h{number}.")
    other = "mlp." if number in c.moe_layers else "moe."  # those of both kinds have weights
    return part({n: t for n, t in w.items() if not n.startswith(f"h.{other}")}, "h.")


def logits_of(c: Config, w: Parameters, x: Tensor) -> Tensor:
    """x[..., embd] after the last layer -> logits[..., vocab] in ``param_dtype``."""
    names = (*(n for n in x.type.names if n != "embd"), "vocab")
    if not c.tied:
        return einsum(x, w["head.w"].cast(c.dtype), names, dtype=c.param_dtype) + w["head.b"]
    h = layer_norm(x, w["ln_f.g"], w["ln_f.b"], x.dim("embd")).cast(c.dtype)
    return einsum(h, w["wte"].cast(c.dtype), names, dtype=c.param_dtype)


def losses(
    c: Config, logits: Tensor, labels: Tensor, balance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean over all positions, with that of ``balance[batch]`` added, and loss[batch, seq] of each
    position. With ``masking``, a position whose label is its padding counts as 0."""
    vocab = logits.dim("vocab")
    if c.entmax:
        each = entmax_loss(logits, labels, vocab)
    else:
        each = cross_entropy(logits, labels, vocab, c.z_loss)
    if c.masking is not None:
        each = select(labels.equals(c.masking.padding), 0.0, each)
    loss = each.mean("batch", "seq")
    return loss if balance is None else loss + balance.mean("batch"), each


def begin(c: Config, name: str) -> tuple[Graph, Parameters, Tensor]:
    """A graph with its parameters and tokens[batch, seq]."""
    g = Graph(f"{c.name}_{name}".replace("-", "_").replace(".", "_"))
    w = {n: g.parameter(n, p.dims, c.param_dtype) for n, p in weights(c).items()}
    return g, w, g.data("tokens", c.dims()[:2])


def mask_seed(c: Config, step: Tensor) -> Tensor | None:
    """Of what a step draws: each layer adds its number, so steps are ``layers`` apart."""
    rates = (c.embed_dropout, c.attn_dropout, c.res_dropout)
    routes = bool(c.moe_layers) and c.experts is not None and c.experts.draws
    return step.cast("u32") * c.layers if any(rates) or routes else None


def forward(c: Config) -> Program:
    """Parameters, tokens, labels -> logits, loss, loss_batch; without dropout. With ``masking``,
    of tokens that are masked already. Experts are chosen as in evaluation; what their policy
    draws is the same each time."""
    g, w, tokens = begin(c, "forward")
    labels = g.data("labels", tokens.dims)
    c = replace(c, embed_dropout=0.0, attn_dropout=0.0, res_dropout=0.0)
    if c.moe_layers and c.experts is not None:
        c = replace(c, experts=c.experts.evaluation)
    seed = mask_seed(c, g.constant(0, "i32")) if c.moe_layers else None
    logits, balance = model(c, w, tokens, seed)
    loss, each = losses(c, logits, labels, balance)
    return g.build({"logits": logits, "loss": loss, "loss_batch": each})


def prefill(c: Config, prompt: int | None = None, slots: int | None = None) -> Program:
    """Parameters, tokens[batch, seq], lengths[batch] -> a cache of ``slots`` positions with the
    keys and values of the tokens, and logits[batch, vocab] behind the last token of each sequence.
    The seq is of ``prompt`` tokens, those beyond a sequence's length are padding. Sizes are the
    config's seq where they are not given."""
    return sampling(c, "prefill", prompt or c.seq, slots or c.seq)


def decode_step(c: Config, slots: int | None = None) -> Program:
    """Parameters, the cache, tokens[batch, seq], one of each sequence, and their place
    (``neocc.nn.cache``) -> the cache with their keys and values, and logits[batch, vocab]."""
    return sampling(c, "decode_step", 1, slots or c.seq)


def score(c: Config, given: int | None = None) -> Program:
    """Parameters, tokens[batch, seq], labels[batch, seq] -> logp[batch, seq], each label's log
    probability behind its token, and best[batch, seq], the likeliest one. The seq is of ``given``
    tokens, or the config's."""
    return sampling(c, "score", given or c.seq, given or c.seq)


def sampling(c: Config, name: str, given: int, slots: int) -> Program:
    """The program that is given so many tokens of each sequence. Matrices are stored as ``dtype``,
    and so is the cache; in the loop over layers it is only read, what is new is written after. No
    expert is ever full here (``neocc.nn.unrouted``), and what their policy draws goes by position:
    a text is the same in any batch, and however much of it is given at a time."""
    if c.masking is not None:
        verb = "scored" if name == "score" else "sampled"
        raise NeoccError(f"{c.name}: a model that finds masked tokens cannot be {verb}")
    if given > slots or (slots > c.seq and c.positions != "rotary"):
        raise NeoccError(f"{c.name}: {given} tokens in {slots} slots of a context of {c.seq}")
    g = Graph(f"{c.name}_{name}".replace("-", "_").replace(".", "_"))
    w = {}
    for n, p in weights(c).items():
        dims = [Dim("place", d.size) if n == "wpe" and d.name == "seq" else d for d in p.dims]
        wide = not p.decays or n.endswith("moe.gate")
        w[n] = g.parameter(n, dims, c.param_dtype if wide else c.dtype)
    table = position_table(c, w, "place")
    experts = c.experts.evaluation if c.moe_layers and c.experts is not None else None
    c = replace(c, seq=given, embed_dropout=0.0, attn_dropout=0.0, res_dropout=0.0, experts=experts)
    batch, seq, heads, head_dim, *_ = c.dims()
    slot, cache, place = Dim("slot", slots), {}, None
    filled = name == "prefill" and given == slots
    tokens = g.data("tokens", (batch, seq))
    scored = name == "score"
    lengths = g.data("labels", (batch, seq)) if scored else g.data("lengths", (batch,))
    if name == "decode_step":
        place = Place(lengths, g.data("filled", ()), g.data("at", ()))
        for layers, first, types in c.stacks():
            for i, kind in enumerate(types, first):
                own = (layers, batch, heads, head_dim)
                key = f"h{i}.cache."
                cache |= cache_inputs(g, key, kind, own, slot, c.dtype, c.param_dtype)
    x = gather(w["wte"], tokens, "vocab").cast(c.param_dtype)
    if table is not None:
        rows = table.slice("place", 0, seq) if place is None else place.rows(table)
        x = x + rows.cast(c.param_dtype)
    x = x.cast(c.dtype)
    seed, after = mask_seed(c, g.constant(0, "i32")) if c.moe_layers else None, {}
    for layers, first, types in c.stacks():

        def period(
            x: Tensor, slices: Parameters, first: int = first, types: Pattern = types
        ) -> tuple[Tensor, Parameters]:
            made = {}
            for number, kind in enumerate(types, first):
                key, draw = f"h{number}.cache.", None
                if seed is not None:
                    own = seed + (slices["period"] * len(types) + number)
                    draw = draws_by_position(own, slots, seq, place)
                cached = Cached(lengths, past=part(slices, key), place=place)
                mine = own_weights(c, w, slices, number)
                sampled = Sampled(None if scored else cached, draw)
                x, _ = layer(c, kind, x, mine, None, sampled)
                for n, t in cached.made.items():
                    whole = filled and kind != "linear"
                    made[key + n] = t.rename(memory="slot") if whole else t
            return x, made

        stacked = {n: t for n, t in (w | cache).items() if layers in t.dims}
        if seed is not None:
            stacked["period"] = iota(x, layers, "u32")
        x, made = scan(layers, period, x, stacked)
        after |= {n: stored(t, cache.get(n), place, slot) for n, t in made.items()}
    if scored:
        logits = logits_of(c, w, x)
        vocab = logits.dim("vocab")
        best = select(logits >= logits.max(vocab), iota(x, vocab), vocab.size)
        logp = -cross_entropy(logits, lengths, vocab)
        return g.build({"logp": logp, "best": best.reduce("min", vocab)})
    if place is None:
        x = select(iota(x, seq).equals(lengths - 1), x, 0.0)
    return g.build({**after, "logits": logits_of(c, w, x.sum(seq))})


def optimizer(c: Config) -> Adam | Adafactor:
    if c.optimizer == "adam":
        return Adam(c.beta1, c.beta2, c.epsilon, c.bias_correction)
    return Adafactor(c.beta1, c.ada_epsilon1, c.ada_epsilon2)


def slots(c: Config, p: Weight) -> dict[str, tuple[Dim, ...]]:
    """The optimizer's state beside a parameter: ``NAME.m``, ``NAME.v``, ... by the ending."""
    return optimizer(c).slots(p.matrix)


def train_step(c: Config) -> Program:
    """Parameters, the state of their ``slots``, step, tokens, labels -> the same parameters and
    state after one step of the optimizer, and loss, grad_norm (before clipping), lr. With
    ``masking`` there are no labels: the step masks the tokens itself."""
    g, w, tokens = begin(c, "train_step")
    labels = None if c.masking else g.data("labels", tokens.dims)
    own = weights(c)
    state = {
        n: {s: g.state(f"{n}.{s}", dims, c.param_dtype) for s, dims in slots(c, p).items()}
        for n, p in own.items()
    }
    step = g.state("step", (), "i32")
    if c.masking is not None:
        tokens, labels = mask_tokens(tokens, c.masking, step.cast("u32"), c.vocab)
    assert labels is not None
    logits, balance = model(c, w, tokens, mask_seed(c, step))
    loss, _ = losses(c, logits, labels, balance)
    grads = dict(zip(w, gradients(loss, list(w.values())), strict=True))

    norm = global_norm(list(grads.values()))
    time = step.cast(c.param_dtype)
    lr = learning_rate(time, c.lr, c.warmup, c.lr_decay, c.steps)
    scale = None if c.clip is None else clip_scale(norm, c.clip)
    update = optimizer(c).updates(time, lr)
    after = {"step": step + 1}
    for n, p in own.items():
        grad = grads[n] if scale is None else grads[n] * scale
        decay = c.weight_decay if p.decays else 0.0
        change, new = update(p.matrix, w[n], grad, state[n], decay)
        after |= {n: w[n] - change} | {f"{n}.{s}": t for s, t in new.items()}
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
        for name, dims in slots(c, p).items():
            start[f"{n}.{name}"] = g.constant(0, c.param_dtype).broadcast(*dims)
    return g.build(start)


def config_from_gptneo(data: dict, name: str = "gpt-neo") -> Config:
    """A GPT-Neo model config (parsed JSON) as a ``Config``; see ``frontends.gptneo``."""
    return Config(name=name, **gptneo.read(data).settings)


def config_from_huggingface(data: dict, name: str) -> Config:
    """A Hugging Face config.json (parsed) as a ``Config``; see ``frontends.weights``."""
    return Config(name=name, **huggingface.read_config(data).settings)


def gpt2(name: str, layers: int, embd: int, heads: int, lr: float) -> Config:
    """Radford et al. 2019, table 2. The learning rates are GPT-3's for the nearest size."""
    return Config(name, layers, embd, heads, seq=1024, batch=512, lr=lr)


def gpt3(name: str, layers: int, embd: int, heads: int, batch: int, lr: float) -> Config:
    """Brown et al. 2020, table 2.1, with every layer dense. Batches in tokens are divided by 2048;
    300e9 tokens in all, 375e6 of them warm-up, and the rate decays over 260e9."""
    warmup, steps = 375 * 10**6 // (batch * 2048), 260 * 10**9 // (batch * 2048)
    return Config(name, layers, embd, heads, batch=batch, lr=lr, warmup=warmup, steps=steps)


def moe(dense: Config, experts: Experts) -> Config:
    """With experts in every second layer, as Lepikhin et al. 2020 have them."""
    return replace(dense, moe_layers=tuple(range(1, dense.layers, 2)), experts=experts)


TINY = Config("tiny", 2, 32, 4, vocab=64, seq=16, batch=4, dtype="f32", warmup=10, steps=100)
# The paper's XL has 24 heads of 128, which is not its embd of 2048, and its 13B an embd of 5140,
# which is not its 40 heads of 128: here 16 heads and 5120. Its 175B has batches of 1536 sequences;
# here 512, as many as 128 chips of 96 GB hold at a time. gpt-moe is of no paper: 29 B parameters,
# as wide as the 6.7B, of which a token meets about 6 B.
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
        moe(gpt3("gpt-moe", 24, 4096, 32, 256, 1.2e-4), Experts(16, 16384, activation="gelu")),
        moe(replace(TINY, name="tiny-moe"), Experts(4, 64, group=8)),
    )
}
DEFAULT = "gpt3-xl"
