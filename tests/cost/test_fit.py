"""Fits find the figures that made the times, through noise and outliers, and refuse nonsense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neocc.cost.calibration import get_field, set_fields
from neocc.cost.collectives import KINDS
from neocc.cost.fit import (
    BadFit,
    Measured,
    Pass,
    Product,
    Transfer,
    TransferModel,
    best_seen,
    fit_row,
    halves,
    robust_solve,
)
from neocc.cost.hardware import chip, chip_of_row, table_row
from neocc.cost.roofline import elementwise_time, matmul_time
from neocc.cost.topology import topology

SIZES = [2**n for n in range(10, 29, 2)]
SHAPES = [
    (m, n, k) for m in (2048, 8192, 16384) for n in (2048, 4160, 8192) for k in (2048, 4096, 8192)
]


def synthetic(
    name: str, mesh: tuple[int, ...], fields: dict[str, float], seed: int, noise: float = 0.0,
    outliers: float = 0.0,
) -> Measured:  # fmt: skip
    """What a device with these figures would measure; each time off by a random ``noise``, and a
    share of them, ``outliers``, many times too long."""
    row = set_fields(table_row(name), fields)
    made = chip_of_row(name, row)
    random = np.random.default_rng(seed)

    def spoilt(points: list) -> tuple:
        bad = random.permutation(len(points)) < outliers * len(points)
        return tuple(
            replace(
                p,
                seconds=p.seconds
                * (random.uniform(3, 30) if off else 1 + noise * random.uniform(-1, 1)),
            )
            for p, off in zip(points, bad, strict=True)
        )

    gap = row.get("kernel_overhead", 0.0)
    passes = [
        Pass(size, inputs, elementwise_time(made, size) + gap)
        for inputs in (1, 2, 3)
        for size in (2**12, 2**14, 2**16, *(n * 2**27 for n in range(1, 9)))
    ]
    products = [
        Product(m, n, k, dtype, matmul_time(made, 1, m, n, k, dtype) + gap)
        for dtype in ("bf16", "f32")
        for m, n, k in SHAPES
    ]
    laid = topology(made, mesh)
    keys = [
        Transfer(kind, axis, size, 1.0)
        for axis, extent in enumerate(mesh)
        if extent > 1
        for kind in KINDS
        for size in SIZES
    ]
    model = TransferModel(row, laid)
    times = model.predict(model.nominal, keys)
    transfers = [replace(p, seconds=float(t)) for p, t in zip(keys, times, strict=True)]
    return Measured(spoilt(products), spoilt(passes), spoilt(transfers), laid)


EFFICIENCY = st.floats(0.3, 1.0)
LATENCY = st.floats(5e-7, 2e-5)


@settings(max_examples=25)
@given(
    matmul=EFFICIENCY,
    hbm=st.floats(0.6, 1.0),
    link=EFFICIENCY,
    latency=LATENCY,
    overhead=LATENCY,
    outliers=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["h100", "a100", "v5e"]),
)
def test_known_figures_are_recovered_through_noise_and_outliers(
    matmul, hbm, link, latency, overhead, outliers, seed, name
):
    wire = "torus.link" if name == "v5e" else "nvlink.link"
    true = {
        "matmul_efficiency": matmul,
        "hbm_efficiency": hbm,
        "collective_overhead": overhead,
        f"{wire}.efficiency": link,
        f"{wire}.latency": latency,
    }
    measured = synthetic(name, (8,), true, seed, noise=0.02, outliers=outliers)
    fields, fits = fit_row(table_row(name), measured)
    for path in ("matmul_efficiency", "hbm_efficiency", f"{wire}.efficiency"):
        assert fields[path] == pytest.approx(true[path], rel=0.05)
    # What starts a gather: launch, and a step for each of the others.
    start = fields["collective_overhead"] + 7 * fields[f"{wire}.latency"]
    assert start == pytest.approx(overhead + 7 * latency, rel=0.05)
    assert fields["peak_flops.f32"] == pytest.approx(
        get_field(table_row(name), "peak_flops.f32"), rel=0.05
    )
    assert all(fit.residual < 0.05 for fit in fits)


@settings(max_examples=15)
@given(inner=EFFICIENCY, outer=EFFICIENCY, latency=LATENCY, seed=st.integers(0, 2**16))
def test_two_kinds_of_link_are_told_apart(inner, outer, latency, seed):
    """Both axes of 4x4 on nodes of 8: one within a node, one over the two."""
    true = {
        "nvlink.link.efficiency": inner,
        "network.efficiency": outer,
        "network.latency": latency,
    }
    measured = synthetic("h100", (4, 4), true, seed, noise=0.01)
    fields, _ = fit_row(table_row("h100"), measured)
    for path in ("nvlink.link.efficiency", "network.efficiency"):
        assert fields[path] == pytest.approx(true[path], rel=0.05)


def test_a_link_that_no_collective_waits_for_is_not_fitted():
    """One axis of 16 over two nodes: the network sets the pace, NVLink is never what is slow."""
    measured = synthetic("h100", (16,), {"network.efficiency": 0.6}, 0)
    fields, _ = fit_row(table_row("h100"), measured)
    assert fields["network.efficiency"] == pytest.approx(0.6, rel=1e-3)
    gathers = [p for p in measured.transfers if p.kind == "all_gather"]
    slowed = synthetic("h100", (16,), {"network.efficiency": 0.6, "nvlink.link.efficiency": 0.7}, 0)
    same = [p for p in slowed.transfers if p.kind == "all_gather"] == gathers
    assert ("nvlink.link.efficiency" in fields) is not same


def test_exact_times_give_exact_figures_and_no_residual():
    row = table_row("h100")
    fields, fits = fit_row(row, synthetic("h100", (2, 4), {}, 0))
    for path, value in fields.items():
        # The smallest passes, which the overhead is read off, still move a few kilobytes.
        rel = 1e-2 if path == "kernel_overhead" else 1e-4
        assert value == pytest.approx(get_field(row, path), rel=rel)
    assert [fit.name for fit in fits] == [
        "memory passes", "bf16 products", "f32 products", "collectives",
    ]  # fmt: skip
    for fit in fits:
        assert fit.worst < 1e-3
        assert abs(fit.fitted - fit.tested) <= 5


def test_one_device_has_no_collectives_to_fit():
    fields, fits = fit_row(table_row("h100"), synthetic("h100", (1,), {}, 0))
    assert "collective_overhead" not in fields and len(fits) == 3


def test_half_of_the_points_is_chosen_by_what_was_measured_and_not_by_how_fast():
    points = list(synthetic("h100", (8,), {}, 0).transfers)
    chosen, rest = halves(points)
    assert len(chosen) == len(rest) and set(chosen) | set(rest) == set(points)
    slower = [replace(p, seconds=2 * p.seconds) for p in reversed(points)]
    assert [p.key for p in halves(slower)[0]] == [p.key for p in chosen]


def test_a_wrong_tile_shows_in_the_products_off_whole_tiles():
    row = {k: v for k, v in table_row("v5e").items() if k != "kernel_overhead"}
    v5e, sides = chip("v5e"), (2048, 3072, 4096, 6144, 8192, 2112, 4160, 8256)
    products = tuple(
        Product(side, side, k, "bf16", matmul_time(v5e, 1, side, side, k, "bf16"))
        for side in sides
        for k in (2048, 4096, 8192)
    )
    measured = replace(synthetic("v5e", (1,), {}, 0), products=products)
    right, wrong = (
        {fit.name: fit for fit in fit_row({**row, "matmul_tile": tile}, measured)[1]}
        for tile in ([8, 128, 128], [8, 1024, 128])
    )
    assert right["bf16 products"].uneven == pytest.approx(0, abs=1e-6)
    assert wrong["bf16 products"].uneven > 0.1


# Nonsense.


def refused(measured: Measured, allowed: float = 0.35) -> str:
    with pytest.raises(BadFit) as caught:
        fit_row(table_row("h100"), measured, allowed)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [("matmul_efficiency", 1.2), ("hbm_efficiency", 1.3), ("nvlink.link.efficiency", 1.1)],
)
def test_a_device_faster_than_its_row_is_refused(path: str, value: float):
    said = refused(synthetic("h100", (8,), {path: value}, 0))
    assert path in said and "is this the right chip?" in said


def test_every_reason_is_told_at_once():
    said = refused(synthetic("h100", (8,), {"matmul_efficiency": 1.2, "hbm_efficiency": 1.3}, 0))
    assert "matmul_efficiency" in said and "hbm_efficiency" in said


def test_a_launch_that_takes_less_than_no_time_is_refused():
    measured = synthetic("h100", (8,), {}, 0)
    early = tuple(
        replace(p, seconds=max(p.seconds - 1e-4, 0) + p.bytes * 1e-9)
        if p.kind == "all_gather"
        else p
        for p in measured.transfers
    )
    # A line through (1 KiB, 1 us), (256 MiB, 0.27 s), lowered by 0.1 ms.
    lowered = tuple(
        replace(p, seconds=max(p.seconds, 2e-6 * (p.bytes / 2**10) ** 1.2)) for p in early
    )
    said = refused(replace(measured, transfers=lowered), allowed=10.0)
    assert "all_gather on mesh axis 0" in said
    assert "no launch takes less than none" in said


def test_times_that_no_line_explains_are_refused():
    measured = synthetic("h100", (8,), {}, 1, noise=0.95)
    said = refused(measured)
    assert "35% is allowed" in said and "idle machine" in said


def test_bytes_that_take_no_time_are_refused():
    measured = synthetic("h100", (8,), {}, 0)
    flat = tuple(replace(p, seconds=1e-4 / p.bytes**0.1) for p in measured.transfers)
    assert "more bytes take no longer" in refused(replace(measured, transfers=flat))


def test_too_few_points_are_refused():
    measured = synthetic("h100", (8,), {}, 0)
    said = refused(replace(measured, passes=measured.passes[:3]))
    assert "memory passes: 3 points, and a fit takes 4; give more --seconds" in said


# A processor's own row.


def test_the_best_that_was_seen_is_the_nominal_rate():
    """The synthetic device has no latency, so its fastest points show its rates."""
    true = {
        "matmul_efficiency": 0.8,
        "hbm_efficiency": 0.9,
        "collective_overhead": 0.0,
        "nvlink.link.latency": 0.0,
        "nvlink.link.efficiency": 0.7,
    }
    measured = synthetic("h100", (8,), true, 0)
    ones = {"matmul_efficiency": 1.0, "hbm_efficiency": 1.0, "nvlink.link.efficiency": 1.0}
    row = set_fields(table_row("h100"), {**true, **ones})
    found = best_seen(measured, row)
    h100 = table_row("h100")
    assert found["peak_flops.bf16"] == pytest.approx(0.8 * h100["peak_flops"]["bf16"], rel=0.1)
    assert found["hbm_bandwidth"] == pytest.approx(0.9 * h100["hbm_bandwidth"], rel=0.05)
    assert found["nvlink.link.bandwidth"] == pytest.approx(0.7 * 450e9, rel=1e-3)
    fields, _ = fit_row(set_fields(row, found), replace(measured, laid=topology(
        chip_of_row("h100", set_fields(row, found)), (8,))))  # fmt: skip
    assert fields["nvlink.link.efficiency"] == pytest.approx(1.0, rel=1e-3)


# The solver under it.


@given(
    x=st.tuples(st.floats(1e-6, 1e-3), st.floats(1e-12, 1e-9)),
    seed=st.integers(0, 2**16),
    bad=st.integers(0, 5),
    factor=st.floats(3, 1000),
)
def test_a_quarter_of_wrong_rows_does_not_move_the_line(x, seed, bad, factor):
    random = np.random.default_rng(seed)
    a = np.stack([np.ones(20), 2.0 ** np.linspace(10, 28, 20)], axis=1)
    seconds = a @ np.array(x)
    seconds[random.permutation(20)[:bad]] *= factor
    found = robust_solve(a, seconds)
    assert a @ found == pytest.approx(a @ np.array(x), rel=0.02)
