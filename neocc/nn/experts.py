"""Mixture of experts: each token goes through a few feed-forward layers of many.

As GPT-Neo had it, through Mesh TensorFlow's transformer_moe_layer_v1 (transformer/moe.py, after
Shazeer et al., 2017, and Lepikhin et al., 2020). Tokens are sent in groups, and an expert takes a
fixed number of each group's tokens: the first ones by choice, then by place; the others pass by.
To send and to fetch are matrix products with a tensor of zeros and ones, so that nothing here
knows of devices: where tokens are cut along the batch and experts along ``experts``, the product's
result moves from one to the other by an all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from neocc.ir.builder import Tensor, einsum, iota, log, minimum, random, select
from neocc.ir.errors import NeoccError
from neocc.ir.types import Dim
from neocc.nn.activations import activate
from neocc.nn.noise import dropout
from neocc.nn.norms import logsumexp, softmax

GATINGS = ("top_2", "top_n", "switch", "ntlb")
POLICIES = ("all", "none", "threshold", "random")  # of every choice but the first
SWITCHES = ("argmax", "input_dropout", "input_jitter", "sample")
POLICY_SALTS = range(1200, 1264)  # one for each choice after the first
JITTER_SALT, SWITCH_SALT, SAMPLE_SALT, HIDDEN_SALT = range(1264, 1268)
TINY = 1e-9  # keeps Mesh TensorFlow's quotients finite
# Uniform numbers of these dims, for a salt: ``random`` of a seed, or the like.
Draw = Callable[[Sequence[Dim], int], Tensor]


@dataclass(frozen=True)
class Routing:
    """How tokens are sent in one mode. ``capacity``: slots of all experts together, as a multiple
    of a group's tokens. ``policy``, ``threshold``: of choices after the first. ``switch``: how the
    one expert of the gating of that name is chosen."""

    capacity: float = 1.25
    policy: str = "random"
    threshold: float = 0.2
    switch: str = "input_jitter"


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, and how tokens come to them.

    ``top_2`` and ``top_n``: a token's ``choices`` most likely experts, weighted by their
    probabilities over the sum of these. ``switch``: one, weighted by its probability (Fedus et al.,
    2021). ``ntlb``, no token left behind: so too, but the first of ``choices`` that is not full.
    ``least``: slots that an expert has at least in each group. ``loss``: weight of the balancing
    loss; ``second_loss``: balances second choices too; ``z_loss``: of the mean squared
    log-partition of the gate. ``routing`` in training; ``evaluating``: that of evaluation.
    """

    count: int = 16
    hidden: int = 4096
    gating: str = "top_2"
    choices: int = 2
    group: int = 1024  # tokens, at most
    least: int = 1
    activation: str = "relu"
    dropout: float = 0.0
    loss: float = 1e-2
    second_loss: bool = False
    z_loss: float = 0.0
    jitter: float = 1e-2
    input_dropout: float = 0.1
    temperature: float = 1.0
    routing: Routing = Routing()
    evaluating: Routing = Routing(capacity=2.0)

    @property
    def evaluation(self) -> Experts:
        """These, as they are evaluated: nothing is dropped at random or trembles."""
        how = self.evaluating
        if how.switch in ("input_dropout", "input_jitter"):
            how = replace(how, switch="argmax")
        return replace(self, routing=how, dropout=0.0)

    @property
    def draws(self) -> bool:
        """Whether anything in it is random."""
        if self.gating == "ntlb":
            return self.routing.switch == "input_jitter" or self.dropout > 0
        if self.gating == "switch":
            return self.routing.switch != "argmax" or self.dropout > 0
        return self.routing.policy == "random" or self.dropout > 0

    @property
    def experts(self) -> Dim:
        return Dim("experts", self.count)

    def grouped(self, seq: int) -> int:
        """Tokens of a group: the most, up to ``group``, that divide a sequence. A group lies in
        one sequence, so that where a token goes depends on no other sequence, nor on the mesh."""
        return next(n for n in range(min(self.group, seq), 0, -1) if seq % n == 0)

    def slots(self, tokens: int) -> int:
        """How many of a group's tokens one expert takes."""
        share = min(tokens, int(tokens * self.routing.capacity / self.count))
        return max(share, self.least)


def check_experts(e: Experts) -> None:
    """Refuses what makes no layer.

    Raises:
        NeoccError: a name that is not known, or more choices than experts.
    """
    named = [("gating", e.gating, GATINGS)]
    for how in (e.routing, e.evaluating):
        named += [("policy", how.policy, POLICIES), ("switch policy", how.switch, SWITCHES)]
    for what, value, known in named:
        if value not in known:
            raise NeoccError(f"experts: {what} {value!r}; one of {', '.join(known)}")
    most = min(e.count, len(POLICY_SALTS))
    if not 0 < e.choices <= most:
        raise NeoccError(f"experts: a token chooses 1 to {most} of {e.count}, not {e.choices}")


@dataclass(frozen=True)
class Routes:
    """``dispatch[batch, (group), token, experts, slot]``: whether the token lies in that slot;
    ``combine``: the weight of what comes out of it, of the same dims; ``loss[batch]``: the weighted
    losses that keep experts in balance, a mean over each sequence."""

    dispatch: Tensor
    combine: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Choices:
    """What a token wants: ``p[..., experts]``, the gate's probabilities, of ``logits``; of each of
    its choices ``chosen[..., experts]``, which expert it is, and ``gates[...]``, its weight."""

    logits: Tensor
    p: Tensor
    chosen: list[Tensor]
    gates: list[Tensor]


def choose(x: Tensor, gate: Tensor, e: Experts, draw: Draw | None) -> Choices:
    """The experts that each token finds most likely: x[..., embd], gate[embd, experts], of one
    dtype."""
    experts = e.experts
    names = [d.name for d in x.dims if d.name != "embd"]
    logits = einsum(x, gate, [*names, "experts"])
    p = softmax(logits, experts)
    number = iota(p, experts)
    ranked = sampled(logits, e, draw) if e.gating == "switch" else p
    chosen: list[Tensor] = []
    for _ in range(e.choices):
        best = ranked.equals(ranked.max(experts))
        first = select(best, number, experts.size).reduce("min", experts)
        chosen.append(number.equals(first))
        ranked = select(chosen[-1], float("-inf"), ranked)
    gates = [select(mine, p, 0.0).sum(experts) for mine in chosen]
    if e.choices > 1 and e.gating != "ntlb":
        total = sum(gates[1:], gates[0]) + TINY
        gates = [g / total for g in gates]
    return Choices(logits, p, chosen, gates)


def route(x: Tensor, gate: Tensor, e: Experts, seed: Tensor | None) -> Routes:
    """Sends the tokens of each group: x[batch, (group), token, embd], gate[embd, experts]. In the
    gate's dtype. ``seed``: a u32 scalar, which only random policies need."""
    token, experts = x.dim("token"), e.experts
    slot = Dim("slot", e.slots(token.size))
    draw = None if seed is None else partial(random, seed)
    wanted = choose(jittered(x.cast(gate.dtype), e, seed), gate, e, draw)
    logits, p, chosen, gates = wanted.logits, wanted.p, wanted.chosen, wanted.gates
    one = e.gating == "ntlb"  # of its choices a token gets the first with room
    counted = chosen if one else chosen[:1]
    balances = [balance(p, mine, token) for mine in counted]
    loss = sum(balances[1:], balances[0]) * (e.loss / len(balances))
    if e.second_loss and e.choices > 1 and not one:
        others = select(chosen[0], 0.0, p)
        others = others / (others.sum(experts) + TINY)
        loss = loss + balance(others, chosen[1], token) * (0.5 * e.loss)
    if e.z_loss:
        z = logsumexp(logits, experts)
        loss = loss + (z * z).mean(*(d for d in z.dims if d.name != "batch")) * (e.z_loss * e.loss)

    place, before, left = iota(p, slot), None, None
    dispatch = combine = None
    for n, (mine, g) in enumerate(zip(chosen, gates, strict=True)):
        if one:
            taken = mine if left is None else mine & left
        else:
            taken = mine if n == 0 else allowed(mine, g, e, n, draw)
        ones = taken.cast("i32")
        at = ones.cumsum("token") - ones  # how many of this choice come before it
        if before is not None:
            at = at + before
        if n + 1 < e.choices:
            full = minimum(ones.sum("token") if before is None else before + ones.sum("token"),
                           slot.size)  # fmt: skip
            before = full
        # A place beyond the slots is none of them.
        at = select(taken, at, slot.size).reduce("min", experts)
        here = mine & place.equals(at)
        if one:
            free = here.cast("i32").sum("experts", slot).equals(0)
            left = free if left is None else left & free
        weight = select(here, g, 0.0)
        dispatch = here if dispatch is None else dispatch | here
        combine = weight if combine is None else combine + weight
    assert dispatch is not None and combine is not None
    return Routes(dispatch, combine, loss)


def jittered(x: Tensor, e: Experts, seed: Tensor | None) -> Tensor:
    """What the gate of a switch sees in training."""
    if e.gating not in ("switch", "ntlb") or seed is None:
        return x
    if e.routing.switch == "input_dropout" and e.gating == "switch":
        return dropout(x, e.input_dropout, seed, SWITCH_SALT)
    if e.routing.switch == "input_jitter" and e.jitter:
        u = random(seed, x.dims, JITTER_SALT).cast(x.dtype)
        return x * (u * (2.0 * e.jitter) + (1.0 - e.jitter))
    return x


def sampled(logits: Tensor, e: Experts, draw: Draw | None) -> Tensor:
    """What a switch takes the largest of: with Gumbel noise the largest is a sample."""
    if e.routing.switch != "sample" or draw is None:
        return logits
    u = draw(logits.dims, SAMPLE_SALT).cast(logits.dtype)
    return logits * (1.0 / e.temperature) - log(-log(u * (1.0 - 2e-7) + 1e-7))


def allowed(mine: Tensor, gate: Tensor, e: Experts, n: int, draw: Draw | None) -> Tensor:
    """Choice ``n`` as far as the policy lets it be."""
    how = e.routing
    if how.policy == "all":
        return mine
    if how.policy == "none":
        return mine & ~mine
    if how.policy == "threshold":
        return mine & (gate > how.threshold)
    assert draw is not None
    u = draw(gate.dims, POLICY_SALTS[n - 1]).cast(gate.dtype)
    return mine & (u < gate * (1.0 / max(how.threshold, TINY)))


def balance(p: Tensor, chosen: Tensor, token: Dim) -> Tensor:
    """experts times the sum over them of the part of the tokens that chose one times its mean
    probability: 1 where all is even. [batch], a mean over its groups."""
    experts = p.dim("experts")
    part = chosen.cast(p.dtype).mean(token)
    product = (p.mean(token) * part).sum(experts) * float(experts.size)
    return product.mean(*(d for d in product.dims if d.name != "batch"))


def mixture(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, e: Experts, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x[batch, seq, embd] through experts up[experts, embd, expert_hidden] and down[experts,
    expert_hidden, embd], which have x's dtype; gate[embd, experts] in a wide one. A token that no
    expert took comes out as 0.

    Returns:
        [batch, seq, embd], and the loss[batch] of ``Routes``.
    """
    seq = x.dim("seq")
    tokens = e.grouped(seq.size)
    groups = [] if tokens == seq.size else ["group"]
    if groups:
        x = x.split("seq", Dim("group", seq.size // tokens), Dim("token", tokens))
    else:
        x = x.rename(seq="token")
    routes = route(x, gate, e, seed)
    inside = ["experts", "batch", *groups, "slot"]
    sent = einsum(x, routes.dispatch.cast(x.dtype), [*inside, "embd"])
    h = activate(e.activation, einsum(sent, up, [*inside, "expert_hidden"]), "expert_hidden")
    h = dropout(h, e.dropout, seed, HIDDEN_SALT)
    y = einsum(h, down, [*inside, "embd"])
    y = einsum(y, routes.combine.cast(x.dtype), ["batch", *groups, "token", "embd"])
    y = y.merge("group", "token", "seq") if groups else y.rename(token="seq")
    return y, routes.loss


def unrouted(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, e: Experts, draw: Draw | None
) -> Tensor:
    """``mixture`` where no expert is ever full: what a token gets depends on no other token, so
    that it is the same with padding beside it, in any batch, and one token at a time. Each expert
    runs over each token, which leaves those that did not choose it with a weight of 0."""
    wanted = choose(x.cast(gate.dtype), gate, e, draw)
    weight = None
    for n, (mine, g) in enumerate(zip(wanted.chosen, wanted.gates, strict=True)):
        if n and e.gating == "ntlb":  # the first has room
            break
        taken = mine if n == 0 else allowed(mine, g, e, n, draw)
        own = select(taken, g, 0.0)
        weight = own if weight is None else weight + own
    assert weight is not None
    names = [d.name for d in x.dims if d.name != "embd"]
    h = activate(e.activation, einsum(x, up, ["experts", *names, "expert_hidden"]), "expert_hidden")
    return einsum(h * weight.cast(x.dtype), down, [*names, "embd"])
