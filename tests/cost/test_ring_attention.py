"""What a ring takes: the longer of products and permutes in each turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.hardware import chip
from neocc.cost.ring_attention import ring_time, sent_seconds
from neocc.cost.topology import topology
from neocc.ir.ops.attention_ring import circle, sent

NAMES = ("q", "k", "v", "out", "lse", "dout", "stats", "dq", "dk", "dv", "dq+", "dk+", "dv+")


@given(
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    st.floats(1e-6, 1e-1),
    st.integers(1, 1 << 22),
)
def test_a_turn_takes_the_longer_of_its_products_and_its_permutes(
    n: int, causal: bool, grad: bool, count: int, compute: float, size: int
) -> None:
    (link,) = topology(chip("v5p"), (n,)).links()
    shape = circle(64, 64, causal, None, n, 8)
    sends = sent(shape, grad, count, dict.fromkeys(NAMES, 4 * size))
    found = ring_time(compute, shape.computed, sends, link, True)
    waited = sum(s.times * sent_seconds(s, link) for s in sends if not s.turns)
    for turn, tiles in enumerate(shape.computed):
        sending = sum(sent_seconds(s, link) for s in sends if turn in s.turns)
        waited += max(0.0, sending - compute * tiles / sum(shape.computed))
    assert found.exposed == pytest.approx(waited)
    at_once = ring_time(compute, shape.computed, sends, link, False)
    assert at_once.hidden == 0 and at_once.sending == pytest.approx(found.sending)
