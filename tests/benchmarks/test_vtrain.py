"""vTrain's iterations as runs, and the host that bounds small ones."""

from __future__ import annotations

import pytest

from benchmarks.vtrain import fitted_host, iteration, rank_correlation, seconds

ROW = {
    "# GPUs": "8",
    "global batch": "16",
    "micro batch": "2",
    "hidden size": "1024",
    "attention heads": "16",
    "# layers": "4",
    "sequence length": "512",
    "tensor parallelism": "2",
    "data parallelism": "2",
    "pipeline parallelism": "2",
    "iteration time (ms)": "250.0",
}


def test_a_line_becomes_a_run():
    it = iteration("single", ROW)
    assert it.measured == 0.25
    assert it.run.devices == 8
    assert (it.run.batch, it.run.microbatches, it.run.stages) == (2, 4, 2)
    assert not iteration("multi", ROW).train


def test_the_host_bounds_a_small_layer_and_is_found_again():
    it = iteration("single", ROW)
    free, bound = seconds(it, 1.0, 0.0), seconds(it, 1.0, 5e-5)
    assert free < bound
    slow = iteration("single", ROW | {"iteration time (ms)": str(1e3 * bound)})
    assert fitted_host([slow], 1.0) == pytest.approx(5e-5)


def test_rank_correlation_sees_order_alone():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)
