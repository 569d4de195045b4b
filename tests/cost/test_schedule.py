"""Pipeline time: the published bubble, and what interleaving does to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.cost.schedule import Stage, bubble, pipeline_time, reduction_time, step_time

SECONDS = st.floats(1e-3, 10.0)
COUNT = st.integers(1, 64)


@given(f=SECONDS, b=SECONDS, p=COUNT, m=COUNT, v=st.integers(1, 8))
def test_equal_stages_idle_for_the_bubble(f: float, b: float, p: int, m: int, v: int):
    time = pipeline_time([Stage(f, b)] * p, m, v)
    assert time == pytest.approx(m * (f + b) * (1 + bubble(p, m, v)))


@given(f=SECONDS, b=SECONDS, m=COUNT, v=st.integers(1, 8), send=SECONDS)
def test_one_stage_has_no_bubble_and_sends_nothing(f: float, b: float, m: int, v: int, send: float):
    assert bubble(1, m, v) == 0
    assert pipeline_time([Stage(f, b)], m, v, send) == pytest.approx(m * (f + b))


@given(f=SECONDS, b=SECONDS, p=st.integers(2, 64), m=COUNT, v=st.integers(2, 8))
def test_interleaving_divides_the_bubble(f: float, b: float, p: int, m: int, v: int):
    ideal = m * (f + b)
    plain = pipeline_time([Stage(f, b)] * p, m) - ideal
    assert pipeline_time([Stage(f, b)] * p, m, v) - ideal == pytest.approx(plain / v)


def test_a_slow_stage_sets_the_pace():
    # Four microbatches through 1 + 2 s and 3 + 4 s: 4 x 7 s on the second device, and the first
    # microbatch's way through the other one.
    stages = [Stage(1, 2), Stage(3, 4)]
    assert pipeline_time(stages, 4) == 4 * 7 + 3
    assert pipeline_time(stages[::-1], 4) == 4 * 7 + 3


@given(p=st.integers(2, 16), m=COUNT, v=st.integers(1, 8), send=SECONDS)
def test_sends_cost_more_with_chunks_and_less_overlapped(p: int, m: int, v: int, send: float):
    stages = [Stage(1.0, 2.0)] * p
    free = pipeline_time(stages, m, v)
    waited = pipeline_time(stages, m, v, send)
    hidden = pipeline_time(stages, m, v, send, overlapped=True)
    assert free < hidden < waited
    assert waited - hidden == pytest.approx(2 * m * v * send)


def test_the_published_bubble():
    # arXiv 2104.04473, figures 3 and 4: 4 devices and 8 microbatches; 2 chunks halve the idle time.
    assert bubble(4, 8) == 3 / 8
    assert bubble(4, 8, 2) == 3 / 16


@given(seconds=SECONDS, backward=SECONDS)
def test_an_overlapped_reduction_leaves_its_last_bucket(seconds: float, backward: float):
    waited = reduction_time(seconds, backward, overlapped=True)
    assert waited >= 0.1 * seconds * 0.999
    assert waited >= (seconds - backward) * 0.999
    assert waited <= reduction_time(seconds, backward, overlapped=False) == seconds


def test_a_step_is_the_sum_of_what_is_waited_for():
    assert step_time(3.0, 0.5, 0.25, 0.25) == 4.0


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_counts_below_one_are_refused(counts: tuple[int, int, int]):
    p, m, v = counts
    with pytest.raises(ValueError, match="at least 1"):
        bubble(p, m, v)
    with pytest.raises(ValueError, match="at least 1"):
        pipeline_time([Stage(1.0, 1.0)] * p, m, v)
