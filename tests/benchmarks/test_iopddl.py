"""The contest benchmark reads the format, checks answers by itself, and keeps the time."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.iopddl import evaluate, main, read, row, to_problem
from neocc.passes.layout.pairwise.problem import cost_of, peak_of
from tests.passes.layout.pairwise.samples import lists, problems

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "iopddl"

# By hand: node 1 is used at times 1 and 2, node 2 at none.
DATA = {
    "name": "ours",
    "nodes": {
        "costs": [[5, 0], [1, 2, 3], [0, 4]],
        "usages": [[1, 6], [4, 3, 0], [9, 9]],
        "intervals": [[0, 2], [1, 3], [2, 2]],
    },
    "edges": {"nodes": [[0, 1], [1, 2]],
              "costs": [[0, 2, 10**18, 0, 0, 0], [10**18, 0, 0, 0, 1, 1]]},
    "usage_limit": 6,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ours.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"problem": DATA}).encode()))
    return path


def test_the_evaluator_counts_as_the_contest_does():
    assert evaluate(DATA, [0, 1, 0]) == (5 + 2 + 0 + 2 + 0, 4)
    assert evaluate(DATA, [1, 2, 1]) == (0 + 3 + 4 + 0 + 1, 6)
    assert evaluate(DATA, [1, 1, 0]) == (0 + 2 + 0 + 0 + 0, 9)
    assert evaluate(DATA, [0, 2, 0])[0] >= 10**18


def test_a_file_is_read_and_solved(file: Path):
    problem = to_problem(read(file))
    assert problem.limit == 6
    assert np.isinf(problem.table(0)[0, 2])
    found = row(file, 2.0, time.time())
    assert found["cost"] == evaluate(DATA, [1, 2, 0])[0] == 4
    assert found["bound"] <= 4
    assert found["problem"] == "ours"


@settings(max_examples=60, deadline=None)
@given(problems(forbid=False), st.randoms(use_true_random=False))
def test_both_evaluators_agree(problem, random):
    parts = lists(problem)
    data = {
        "nodes": {k: parts[k] for k in ("costs", "usages", "intervals")},
        "edges": {"nodes": parts["edges"], "costs": parts["tables"]},
    }
    picked = [random.randrange(int(k)) for k in problem.strategies]
    counted = cost_of(problem, np.array(picked)), peak_of(problem, np.array(picked))
    assert evaluate(data, picked) == counted


def test_what_is_no_problem_is_refused_in_a_line(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none.json")])
    assert stop.value.code == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SystemExit, match="not a problem in the contest's format"):
        read(tmp_path / "bad.json")
    (tmp_path / "ours.json").write_text(json.dumps({"problem": DATA}))
    with pytest.raises(SystemExit, match="give --seconds"):
        row(tmp_path / "ours.json", None, time.time())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the contest's problems are not here")
def test_the_smallest_problem_of_the_contest():
    found = row(SHARED / "G.json.gz", 60.0, time.time())
    assert found["ratio"] <= 1.05
    assert found["gap"] < 0.02
