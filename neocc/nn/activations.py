"""Activation functions by the names that jax.nn and GPT-Neo's models/activations.py give them.

Autodiff of each has JAX's derivative, at kinks too, and is finite wherever the value is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from neocc.ir.builder import (
    Tensor,
    absolute,
    cos,
    erf,
    exp,
    log,
    maximum,
    minimum,
    select,
    sin,
    sqrt,
    tanh,
)
from neocc.ir.errors import NeoccError
from neocc.nn.norms import logsumexp, softmax

SELU_SCALE = 1.0507009873554804934193349852946  # Klambauer et al., 2017
SELU_ALPHA = 1.6732632423543772848170429916717


def gelu(x: Tensor) -> Tensor:
    """The tanh form of the Gaussian error linear unit (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1.0 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def gelu_exact(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


def relu(x: Tensor) -> Tensor:
    return select(x > 0.0, x, 0.0)


def relu6(x: Tensor) -> Tensor:
    return select(x < 6.0, relu(x), 6.0)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), by tanh, whose gradient is finite however small x is."""
    return 0.5 + 0.5 * tanh(0.5 * x)


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return maximum(x, 0.0) + log(1.0 + exp(-absolute(x)))


def elu(x: Tensor) -> Tensor:
    return select(x > 0.0, x, exp(select(x > 0.0, 0.0, x)) - 1.0)


def selu(x: Tensor) -> Tensor:
    negative = SELU_ALPHA * (exp(select(x > 0.0, 0.0, x)) - 1.0)
    return SELU_SCALE * select(x > 0.0, x, negative)


def leaky(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda x: select(x >= 0.0, x, slope * x)


def hard_tanh(x: Tensor) -> Tensor:
    return select(x > 1.0, 1.0, select(x < -1.0, -1.0, x))


def hard_sigmoid(x: Tensor) -> Tensor:
    return relu6(x + 3.0) * (1.0 / 6.0)


def sparse_plus(x: Tensor) -> Tensor:
    return select(x <= -1.0, 0.0, select(x >= 1.0, x, (x + 1.0) * (x + 1.0) * 0.25))


def elish(x: Tensor) -> Tensor:
    """Basirat and Roth, 2018. GPT-Neo's had a sign wrong: x / (1 + exp(x)) above 0."""
    return select(x > 0.0, silu(x), elu(x) * sigmoid(x))


def arcsinh(x: Tensor) -> Tensor:
    """Both sides by themselves: for x far below 0, x + sqrt(1 + x * x) is lost to rounding."""

    def positive(x: Tensor) -> Tensor:
        return log(x + sqrt(1.0 + x * x))

    return positive(select(x >= 0.0, x, 0.0)) - positive(select(x >= 0.0, 0.0, -x))


def sign(x: Tensor) -> Tensor:
    return select(x > 0.0, 1.0, select(x < 0.0, -1.0, 0.0 * x))


def waves(wave: Callable[[Tensor], Tensor], weights: tuple[float, ...]) -> Callable[..., Tensor]:
    """The first odd harmonics of a wave."""

    def function(x: Tensor) -> Tensor:
        y = wave(x)
        for n, weight in zip((3.0, 5.0, 7.0), weights, strict=True):
            y = y + weight * wave(n * x)
        return y

    return function


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": gelu,
    "gelu_tanh": gelu,
    "gelu_exact": gelu_exact,
    "relu": relu,
    "relu6": relu6,
    "silu": silu,
    "swish": silu,
    "elu": elu,
    "celu": elu,
    "selu": selu,
    "softplus": softplus,
    "sigmoid": sigmoid,
    "log_sigmoid": lambda x: -softplus(-x),
    "tanh": tanh,
    "leaky_relu": leaky(0.01),
    "hard_tanh": hard_tanh,
    "hard_sigmoid": hard_sigmoid,
    "hard_silu": lambda x: x * hard_sigmoid(x),
    "hard_swish": lambda x: x * hard_sigmoid(x),
    "soft_sign": lambda x: x / (absolute(x) + 1.0),
    "mish": lambda x: x * tanh(softplus(x)),
    "squareplus": lambda x: 0.5 * (x + sqrt(x * x + 4.0)),
    "sparse_plus": sparse_plus,
    "sparse_sigmoid": lambda x: 0.5 + 0.5 * hard_tanh(x),
    "identity": lambda x: x,
    # GPT-Neo's own
    "abs": absolute,
    "sin": sin,
    "cos": cos,
    "sign": sign,
    "lrelu001": leaky(0.01),
    "lrelu020": leaky(0.2),
    "id": lambda x: x,
    "triangle_relax": waves(sin, (-1 / 9, 1 / 25, -1 / 49)),
    "square_relax": waves(cos, (-1 / 3, 1 / 5, -1 / 7)),
    "spike": lambda x: 1.0 / (1.0 + x * x),
    "spike2": lambda x: exp(-(x * x)),
    "tanhshrink": lambda x: x - tanh(x),
    "softsign": lambda x: x / (absolute(x) + 1.0),
    "bipolarsigmoid": lambda x: tanh(0.5 * x),
    "elish": elish,
    "arcsinh": arcsinh,
    "maxsig": lambda x: maximum(x, sigmoid(x)),
    "cosid": lambda x: cos(x) - x,
    "minsin": lambda x: minimum(x, sin(x)),
    "maxtanh": lambda x: maximum(x, tanh(x)),
    "tanhexp": lambda x: x * tanh(exp(minimum(x, 20.0))),
    "lisht": lambda x: x * tanh(x),
    "seagull": lambda x: log(1.0 + x * x),
    "snake": lambda x: x + sin(x) * sin(x),
    "roottanh": lambda x: (x * x + 1.0) ** (1 / 3) * tanh(x),
    "softplusmone": lambda x: softplus(x) - 1.0,
}
# Along the hidden dim, as GPT-Neo has them.
ALONG: dict[str, Callable[[Tensor, str], Tensor]] = {
    "softmax": softmax,
    "log_softmax": lambda x, dim: x - logsumexp(x, dim),
    "logsoftmax": lambda x, dim: x - logsumexp(x, dim),
}
# GPT-Neo drew a slope, or the names of parameters, at random when it built the graph: no second run
# had the same function, and no checkpoint could be read again.
RANDOM = ("rrelu", "aria", "prelu", "parcsinh", "psoftplus", "proottanh")


def check_activation(name: str) -> None:
    """Whether ``activate`` knows it.

    Raises:
        NeoccError: it does not; with the nearest name.
    """
    if name in RANDOM:
        raise NeoccError(
            f"activation {name!r} has a slope or parameters that GPT-Neo named at random, so that "
            "no run could be resumed: not supported"
        )
    known = (*ACTIVATIONS, *ALONG)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise NeoccError(
            f"unknown activation {name!r}; the nearest known one is {near!r}, of "
            f"{', '.join(sorted(known))}"
        )


def activate(name: str, x: Tensor, dim: str) -> Tensor:
    """The activation called ``name`` of ``x``; ``dim``: the one along which the softmaxes run.

    Raises:
        NeoccError: there is no such activation.
    """
    check_activation(name)
    return ALONG[name](x, dim) if name in ALONG else ACTIVATIONS[name](x)
