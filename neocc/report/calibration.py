"""What a calibration found, on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from neocc.cost.calibration import get_field, nominal_rates
from neocc.cost.fit import Fit
from neocc.report.facts import seconds_text


def heading(title: str, devices: Any) -> str:
    kind = devices.flat[0].device_kind
    shape = "x".join(map(str, devices.shape))
    return f"measuring {devices.size} x {kind} as a mesh of {shape}, against the row of {title}"


def table(row: Mapping[str, Any], fields: Mapping[str, float], fits: Sequence[Fit]) -> Table:
    """Each fitted figure beside the row's; then how well the formulas fit."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    made.add_column("figure", no_wrap=True)
    made.add_column("row", justify="right", no_wrap=True)
    made.add_column("measured", justify="right", no_wrap=True)
    made.add_column("points", justify="right", no_wrap=True)
    made.add_column("error on as many others", no_wrap=True)
    for fit in fits:
        error = f"{fit.residual:.1%} median, {fit.worst:.1%} worst"
        if fit.uneven is not None:
            error += f", {fit.uneven:.1%} off tiles"
        for n, path in enumerate(fit.fields):
            told = (str(fit.fitted), error) if n == 0 else ("", "")
            before = figure(path, get_field(row, path))
            after = figure(path, fields[path])
            made.add_row(path, before, f"{after}{rate(path, fields[path], row)}", *told)
    return made


def figure(path: str, value: float) -> str:
    if path.endswith(("latency", "overhead")):
        return seconds_text(value)
    if path.startswith("peak_flops"):
        return flops_text(value)
    return f"{value:.3f}"


def rate(path: str, value: float, row: Mapping[str, Any]) -> str:
    """`` (605 TFLOP/s)``: what an efficiency comes to; nothing for another figure."""
    if not path.endswith("efficiency"):
        return ""
    (nominal,) = nominal_rates(row, {path: value}).values()
    text = flops_text if path == "matmul_efficiency" else bandwidth_text
    return f" ({text(value * nominal)})"


def flops_text(value: float) -> str:
    return f"{value / 1e12:.4g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.4g} GFLOP/s"


def bandwidth_text(value: float) -> str:
    return f"{value / 1e9:.4g} GB/s"
