"""The benchmark of decode steps: its smallest case, and the table in the documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decode

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_case_is_planned_compiled_and_audited():
    pytest.importorskip("libtpu")
    row = decode.measure("gpt2-small", "v5e", "1x2", 8)
    assert row.collectives_ok and row.flops_equal and row.fits
    assert row.floor < row.compute <= row.step and row.cycles > 0


def test_the_documents_show_what_was_found():
    rows = json.loads(decode.RESULTS.read_text("utf-8"))
    assert [(r["preset"], r["chip"], r["mesh"], r["batch"]) for r in rows] == list(decode.CASES)
    table = (ROOT / "docs" / "measurements.md").read_text("utf-8").split("## A token at a time")[1]
    for r in rows:
        times = " | ".join(f"{1e3 * r[k]:.2f}" if r[k] else "0" for k in ("compute", "exposed"))
        place = f"| {r['preset']} | {r['chip']} {r['mesh']} | {r['batch']} "
        assert (
            f"{place}| {r['stored'] / 2**30:.2f} GiB | {1e3 * r['floor']:.2f} | {times} " in table
        )
        assert (
            r["proved"]
            and r["collectives_ok"]
            and r["flops_equal"]
            and abs(r["memory_error"]) < 0.07
        )
