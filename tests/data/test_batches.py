"""Batches: next tokens as labels, places that depend on seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.data import Batches
from neocc.ir.errors import NeoccError


@given(st.data())
def test_a_label_is_the_next_token(data: st.DataObject):
    batch, seq = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    more, seed = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 2**32 - 1))
    step = data.draw(st.integers(0, 10**6))
    tokens = np.arange(batch * seq + more, dtype=np.int32)  # each says where it stands
    made = Batches(tokens, batch, seq, seed).at(step)
    assert made["tokens"].shape == made["labels"].shape == (batch, seq)
    assert made["tokens"].dtype == made["labels"].dtype == np.int32
    assert np.array_equal(made["labels"], made["tokens"] + 1)
    assert np.array_equal(made["tokens"] - made["tokens"][:, :1], [range(seq)] * batch)


def test_every_place_of_the_text_is_used():
    batches = Batches(np.arange(9, dtype=np.int32), 2, 4, seed=3)
    starts = {int(s) for step in range(60) for s in batches.at(step)["tokens"][:, 0]}
    assert starts == {0, 1, 2, 3, 4}


def test_steps_and_seeds_give_other_places():
    tokens = np.arange(100_000, dtype=np.int32)
    batches = Batches(tokens, 4, 8, seed=1)
    first = batches.at(0)["tokens"]
    assert np.array_equal(first, Batches(tokens, 4, 8, seed=1).at(0)["tokens"])
    assert not np.array_equal(first, batches.at(1)["tokens"])
    assert not np.array_equal(first, Batches(tokens, 4, 8, seed=2).at(0)["tokens"])


def test_places_stay_what_they_are_between_versions():
    """A run that goes on later, maybe elsewhere, has to see the batches that it would have."""
    batches = Batches(np.arange(1_000_000, dtype=np.int32), 4, 8, seed=7)
    assert batches.at(0)["tokens"][:, 0].tolist() == PLACES[0]
    assert batches.at(1)["tokens"][:, 0].tolist() == PLACES[1]


PLACES = [[485932, 864479, 470944, 375586], [223797, 22198, 389983, 639628]]


@pytest.mark.parametrize(("batch", "seq"), [(2, 8), (1, 16), (16, 1)])
def test_a_text_shorter_than_one_batch_is_refused(batch: int, seq: int):
    Batches(np.zeros(17, np.int32), batch, seq)
    with pytest.raises(NeoccError, match=r"the text has 16 tokens; one batch .* needs 17"):
        Batches(np.zeros(16, np.int32), batch, seq)


@pytest.mark.parametrize(("batch", "seq"), [(0, 8), (2, 0), (2, -1)])
def test_empty_batches_are_refused(batch: int, seq: int):
    with pytest.raises(NeoccError, match="1 is the least"):
        Batches(np.zeros(100, np.int32), batch, seq)
