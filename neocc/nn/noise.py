"""What is drawn at random in training: dropout, and the tokens of masked language modelling.

Both draw from the IR's ``random`` op, whose numbers depend on the seed, the salt and the global
index: they are the same on every mesh, and again in a backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from neocc.ir.builder import Tensor, iota, minimum, random, select

MASK_SALTS = CHOSEN_SALT, FATE_SALT, TOKEN_SALT = range(1100, 1103)


def dropout(x: Tensor, rate: float, seed: Tensor | None, salt: int) -> Tensor:
    """Elements zeroed with probability ``rate``, the others scaled by 1 / (1 - rate).

    The same for one seed (u32 scalar) and salt wherever it runs, so that a backward pass makes
    the mask again instead of keeping it.
    """
    if rate == 0 or seed is None:
        return x
    kept = random(seed, x.dims, salt) >= rate
    return select(kept, x * (1.0 / (1.0 - rate)), 0.0)


@dataclass(frozen=True)
class Masking:
    """Masked language modelling (Devlin et al., 2018): which tokens a model has to find again.

    ``rate`` of the tokens are chosen. Of these ``same`` stay, ``random`` become some token, and
    the others become ``mask``. ``cls``: put before each sequence, whose last token goes. Those in
    ``ignore``, ``cls`` and ``padding`` are never chosen, nor drawn.
    """

    mask: int
    rate: float = 0.15
    same: float = 0.1
    random: float = 0.0
    cls: int | None = None
    ignore: tuple[int, ...] = ()
    padding: int = 0

    @property
    def special(self) -> tuple[int, ...]:
        """Tokens that are never chosen."""
        own = () if self.cls is None else (self.cls,)
        return tuple(sorted({self.padding, *own, *self.ignore}))


def mask_tokens(tokens: Tensor, m: Masking, seed: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """tokens[batch, seq] -> the tokens that the model sees and its labels: the token where one is
    chosen, ``m.padding`` elsewhere, which counts for nothing. ``seed``: a u32 scalar."""
    if m.cls is not None:
        first = iota(tokens, tokens.dim("seq")).equals(0)
        tokens = select(first, m.cls, tokens.shift("seq", 1))

    def uniform(salt: int) -> Tensor:
        return random(seed, tokens.dims, salt)

    def ordinary(t: Tensor) -> Tensor:
        found = ~t.equals(m.special[0])
        for token in m.special[1:]:
            found = found & ~t.equals(token)
        return found

    chosen = (uniform(CHOSEN_SALT) < m.rate) & ordinary(tokens)
    fate = uniform(FATE_SALT)
    seen = select(fate < m.same, tokens, m.mask)
    if m.random:
        drawn = minimum((uniform(TOKEN_SALT) * float(vocab)).cast("i32"), vocab - 1)
        drawn = select(ordinary(drawn), drawn, tokens)
        seen = select((fate >= m.same) & (fate < m.same + m.random), drawn, seen)
    return select(chosen, seen, tokens), select(chosen, tokens, m.padding)
