"""Composites that more than one model wants; each is a handful of IR ops."""

from __future__ import annotations

from neocc.nn.activations import ACTIVATIONS, activate, check_activation, gelu
from neocc.nn.attention import linear_attention, rotary, unfused_attention
from neocc.nn.cache import (
    Cached,
    Place,
    cache_inputs,
    cached_attention,
    draws_by_position,
    linear_state,
    linear_step,
    stored,
)
from neocc.nn.experts import Draw, Experts, Routing, check_experts, mixture, unrouted
from neocc.nn.losses import cross_entropy, entmax, entmax_loss
from neocc.nn.noise import Masking, dropout, mask_tokens
from neocc.nn.norms import layer_norm, logsumexp, scale_norm, softmax
from neocc.nn.weights import Weight

__all__ = [
    "ACTIVATIONS",
    "Cached",
    "Draw",
    "Experts",
    "Masking",
    "Place",
    "Routing",
    "Weight",
    "activate",
    "cache_inputs",
    "cached_attention",
    "check_activation",
    "check_experts",
    "cross_entropy",
    "draws_by_position",
    "dropout",
    "entmax",
    "entmax_loss",
    "gelu",
    "layer_norm",
    "linear_attention",
    "linear_state",
    "linear_step",
    "logsumexp",
    "mask_tokens",
    "mixture",
    "rotary",
    "scale_norm",
    "softmax",
    "stored",
    "unfused_attention",
    "unrouted",
]
