"""Fits a chip's efficiencies, latencies and overheads to measured times; touches no device.

What is fitted are fields of the chip's row in hardware.json, under the planner's own formulas
(``matmul_time``, ``elementwise_time``, ``collective_time``): the figures that make them come true.
Each group of points is split by a hash into two halves: one is fitted, on the other the error is
told. Everything is robust: a few points that are far off, for whatever reason, do not move a fit.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from neocc.cost.calibration import get_field, set_fields
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import chip_of_row
from neocc.cost.roofline import elementwise_time, matmul_time
from neocc.cost.topology import Topology

MOST = 1.05  # an efficiency above this is a wrong row or a wrong measurement
RESIDUAL = 0.35  # median relative error on points that were not fitted, above which a fit is none
NEGATIVE = 0.25  # of the least time measured: how far below zero a line may start, and noise
SPREADS = 3.0  # times the scatter about the line: as far as that, too
TINY = 1 / 64  # of the largest pass: below that, a pass is a launch, or stays in a cache
FEWEST = 4  # points that a group must have
NOTICED = 10.0  # a product counts for the efficiency if it takes so many times a kernel's overhead


class BadFit(ValueError):
    """The measured times fit no sane row; ``reasons``, one line each."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product [m, k] x [k, n] on each device; seconds of a run."""

    m: int
    n: int
    k: int
    dtype: str
    seconds: float

    @property
    def key(self) -> tuple[Hashable, ...]:
        return "product", self.m, self.n, self.k, self.dtype


@dataclass(frozen=True, slots=True)
class Pass:
    """One elementwise fusion of ``inputs`` arrays that moves ``bytes`` on each device."""

    bytes: int
    inputs: int
    seconds: float

    @property
    def key(self) -> tuple[Hashable, ...]:
        return "pass", self.bytes, self.inputs


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective over a mesh axis; ``bytes`` as ``collective_time`` counts them."""

    kind: str
    axis: int
    bytes: int
    seconds: float

    @property
    def key(self) -> tuple[Hashable, ...]:
        return "transfer", self.kind, self.axis, self.bytes


@dataclass(frozen=True)
class Measured:
    """All points of one calibration; ``laid``: the mesh that the collectives ran on."""

    products: tuple[Product, ...]
    passes: tuple[Pass, ...]
    transfers: tuple[Transfer, ...]
    laid: Topology


@dataclass(frozen=True, slots=True)
class Fit:
    """A group of points and the fields fitted to half of them.

    residual, worst: median and largest relative error of the formula on the other half. uneven: of
    products, the median over those of the other half whose sides are no whole tiles: whether the
    row's tile is the matrix unit's. None where there are none.
    """

    name: str
    fields: Mapping[str, float]
    fitted: int
    tested: int
    residual: float
    worst: float
    uneven: float | None = None


class Point(Protocol):
    @property
    def seconds(self) -> float: ...

    @property
    def key(self) -> tuple[Hashable, ...]: ...


P = TypeVar("P", bound=Point)


def halves(points: Iterable[P]) -> tuple[list[P], list[P]]:
    """Half of the points to fit and half to test on, chosen by a hash of what was measured."""
    order = sorted(points, key=lambda p: hashlib.sha256(repr(p.key).encode()).digest())
    middle = (len(order) + 1) // 2
    return order[:middle], order[middle:]


def fit_row(
    row: Mapping[str, Any], measured: Measured, allowed: float = RESIDUAL
) -> tuple[dict[str, float], list[Fit]]:
    """The fields of a chip's ``row`` that make the formulas fit what was measured.

    Raises:
        BadFit: an efficiency above ``MOST`` or not positive, a launch that takes negative time, a
            residual above ``allowed``, or too few points.
    """
    reasons: list[str] = []
    fits: list[Fit] = []
    fields: dict[str, float] = {}

    def add(fit: Callable[[], Fit]) -> None:
        try:
            found = fit()
        except BadFit as error:
            reasons.extend(error.reasons)
            return
        fits.append(found)
        fields.update(found.fields)
        reasons.extend(objections(found, allowed))

    add(lambda: fit_passes(row, measured.passes))
    dtypes = list(dict.fromkeys(p.dtype for p in measured.products))
    for dtype in sorted(dtypes, key=lambda d: d != "bf16"):
        points = [p for p in measured.products if p.dtype == dtype]
        add(lambda d=dtype, points=points: fit_products(set_fields(row, fields), d, points))
    if measured.transfers:
        add(lambda: fit_transfers(row, measured.laid, measured.transfers))
    if reasons:
        raise BadFit(reasons)
    return fields, fits


def objections(fit: Fit, allowed: float) -> list[str]:
    """What is not sane about a fit."""
    found = []
    for path, value in fit.fields.items():
        if path.endswith("efficiency") and not 0 < value <= MOST:
            found.append(
                f"{path} would be {value:.3g}: the measured rate is not within 0 to {MOST:g} of"
                " the nominal one; is this the right chip?"
            )
    if fit.residual > allowed:
        found.append(
            f"{fit.name}: half of the points that were not fitted are off by more than "
            f"{fit.residual:.0%}, and {allowed:.0%} is allowed; measure on an idle machine"
        )
    return found


def enough(name: str, points: Sequence[Point]) -> None:
    if len(points) < FEWEST:
        raise BadFit(
            [f"{name}: {len(points)} points, and a fit takes {FEWEST}; give more --seconds"]
        )


def errors(predicted: Iterable[float], points: Sequence[Point]) -> tuple[float, float]:
    """Median and largest relative error."""
    off = [abs(s / p.seconds - 1) for s, p in zip(predicted, points, strict=True)]
    return float(np.median(off)), float(max(off))


def fit_passes(row: Mapping[str, Any], points: Sequence[Pass]) -> Fit:
    """``hbm_efficiency`` from the large elementwise fusions, which no cache holds; and, where
    the row has it, ``kernel_overhead`` from the tiny ones, which are nothing else.

    Raises:
        BadFit: too few points.
    """
    name = "memory passes"
    edge = TINY * max((p.bytes for p in points), default=0)
    large = [p for p in points if p.bytes > edge]
    enough(name, large)
    chosen, rest = halves(large)
    fields: dict[str, float] = {}
    start = 0.0
    if "kernel_overhead" in row:
        tiny, _ = halves([p for p in points if p.bytes <= edge])
        enough(f"tiny {name}", tiny)
        fields["kernel_overhead"] = start = float(np.median([p.seconds for p in tiny]))
    sizes = np.array([[p.bytes] for p in chosen], float)
    seconds = np.array([p.seconds for p in chosen])
    (slope,) = robust_solve(sizes, seconds - start, seconds)
    chip = chip_of_row("measured", row)
    fields["hbm_efficiency"] = 1 / (float(slope) * chip.hbm_bandwidth)
    fitted = chip_of_row("measured", set_fields(row, fields))
    residual, worst = errors((elementwise_time(fitted, p.bytes) + start for p in rest), rest)
    return Fit(name, fields, len(chosen), len(rest), residual, worst)


def line(name: str, points: Sequence[Transfer]) -> tuple[float, float]:
    """Seconds at no bytes, and seconds a byte.

    Raises:
        BadFit: the line falls, or starts farther below zero than noise explains.
    """
    a = np.array([[1.0, p.bytes] for p in points])
    seconds = np.array([p.seconds for p in points])
    start, slope = (float(x) for x in robust_solve(a, seconds))
    if slope <= 0:
        raise BadFit([f"{name}: more bytes take no longer; measure larger ones"])
    scatter = float(np.median(np.abs((start + slope * a[:, 1]) / seconds - 1)))
    if start < -max(NEGATIVE, SPREADS * scatter) * seconds.min():
        raise BadFit([f"{name}: the line starts at {start:.3g} s; no launch takes less than none"])
    return start, slope


def fit_products(row: Mapping[str, Any], dtype: str, points: Sequence[Product]) -> Fit:
    """The median of the efficiencies under which each product would take the time it took.

    bf16, which comes first, sets ``matmul_efficiency``; another dtype keeps that and sets its own
    peak, ``peak_flops.f32``. Products that memory or launches bound say nothing and are left out.

    Raises:
        BadFit: too few products are bound by the matrix unit, or a rate above the nominal one.
    """
    name = f"{dtype} products"
    chip = chip_of_row("measured", row)
    overhead = row.get("kernel_overhead", 0.0)

    def predicted(p: Product, efficiency: float) -> float:
        return matmul_time(chip, 1, p.m, p.n, p.k, dtype, efficiency) + overhead

    bound = [
        p
        for p in points
        if predicted(p, 0.5) > predicted(p, 1.0) * 1.8 and p.seconds > NOTICED * overhead
    ]
    enough(name, bound)
    chosen, rest = halves(bound)
    found = float(np.median([own_efficiency(p.seconds, p, predicted) for p in chosen]))
    residual, worst = errors((predicted(p, found) for p in rest), rest)
    fields = {"matmul_efficiency": found}
    if dtype != "bf16":
        if found > MOST:
            raise BadFit([f"{name} reach {found:.3g} of the nominal peak; is this the right chip?"])
        peak = get_field(row, f"peak_flops.{dtype}")
        fields = {f"peak_flops.{dtype}": peak * found / chip.matmul_efficiency}
    tile_m, tile_n, tile_k = chip.matmul_tile
    uneven = [p for p in rest if p.m % tile_m or p.n % tile_n or p.k % tile_k]
    off = errors((predicted(p, found) for p in uneven), uneven)[0] if uneven else None
    return Fit(name, fields, len(chosen), len(rest), residual, worst, off)


def own_efficiency(
    seconds: float, p: Product, predicted: Callable[[Product, float], float]
) -> float:
    """The efficiency at which a product is predicted to take ``seconds``, by bisection."""
    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(p, middle) > seconds else (low, middle)
    return low


def fit_transfers(row: Mapping[str, Any], laid: Topology, points: Sequence[Transfer]) -> Fit:
    """``collective_overhead``, and efficiency and latency of each kind of link that the mesh
    uses, from all collectives together.

    Raises:
        BadFit: too few points, times that fall with bytes, or a start below zero.
    """
    name = "collectives"
    reasons: list[str] = []
    for (kind, axis), group in grouped(points).items():
        try:
            enough(f"{kind} on mesh axis {axis}", group)
            line(f"{kind} on mesh axis {axis}", group)
        except BadFit as error:
            reasons += error.reasons
    if reasons:
        raise BadFit(reasons)
    chosen, rest = transfer_halves(points)
    model = TransferModel(row, laid)
    x = model.solve(chosen)
    paths = list(model.fields(x))
    seen = {paths[i] for i in model.seen(model.slopes(x, chosen))}
    fields = {path: value for path, value in model.fields(x).items() if path in seen}
    fitted = TransferModel(set_fields(row, fields), laid)
    residual, worst = errors(fitted.predict(fitted.nominal, rest), rest)
    return Fit(name, fields, len(chosen), len(rest), residual, worst)


def grouped(points: Iterable[Transfer]) -> dict[tuple[str, int], list[Transfer]]:
    groups: dict[tuple[str, int], list[Transfer]] = defaultdict(list)
    for p in points:
        groups[p.kind, p.axis].append(p)
    return groups


def transfer_halves(points: Iterable[Transfer]) -> tuple[list[Transfer], list[Transfer]]:
    """``halves`` of each kind on each axis."""
    split = [halves(group) for group in grouped(points).values()]
    return [p for here, _ in split for p in here], [p for _, there in split for p in there]


@dataclass(frozen=True)
class TransferModel:
    """Collective times as a function of x = (overhead, then latency and 1/efficiency per link).

    Piecewise linear in x, so Newton's steps on its slopes, which are read off the formulas, end.
    """

    row: Mapping[str, Any]
    laid: Topology

    @property
    def links(self) -> list[str]:
        """Where in the row the links are that the mesh uses."""
        chip, last = self.laid.chip, len(self.laid.shape) - 1
        axes = {part.axis for parts in self.laid.parts for part in parts}
        found = []
        for axis in sorted(axes):
            if axis == 0:
                found.append("network")
            elif chip.torus is None or axis == last:
                found.append(next(k for k in ("nvlink", "host", "die") if k in self.row) + ".link")
            else:
                found.append("torus.link")
        return list(dict.fromkeys(found))

    @property
    def nominal(self) -> np.ndarray:
        x = [get_field(self.row, "collective_overhead")]
        for link in self.links:
            x.append(get_field(self.row, f"{link}.latency"))
            x.append(1 / get_field(self.row, f"{link}.efficiency"))
        return np.array(x)

    def fields(self, x: np.ndarray) -> dict[str, float]:
        """Paths in the row and their values, in the order of x."""
        found = {"collective_overhead": float(x[0])}
        for i, link in enumerate(self.links):
            found[f"{link}.latency"] = float(x[1 + 2 * i])
            found[f"{link}.efficiency"] = float(1 / x[2 + 2 * i])
        return found

    def predict(self, x: np.ndarray, points: Sequence[Transfer]) -> np.ndarray:
        chip = chip_of_row(self.laid.chip.name, set_fields(self.row, self.fields(x)))
        links = replace(self.laid, chip=chip).links()
        return np.array([collective_time(p.kind, p.bytes, links[p.axis]) for p in points])

    def slopes(self, x: np.ndarray, points: Sequence[Transfer]) -> np.ndarray:
        """How each point's time grows with each entry of x: [points, entries]."""
        here = self.predict(x, points)
        steps = np.maximum(np.abs(x), 1e-9) * 1e-3
        columns = [
            (self.predict(x + step * unit, points) - here) / step
            for step, unit in zip(steps, np.eye(len(x)), strict=True)
        ]
        return np.stack(columns, axis=1)

    @staticmethod
    def seen(slopes: np.ndarray) -> list[int]:
        """The entries of x that make a difference to some point: on an axis over two kinds of
        links, the faster one's rate may make none."""
        return [i for i in range(slopes.shape[1]) if np.any(slopes[:, i] != 0)]

    def solve(self, points: Sequence[Transfer], rounds: int = 6) -> np.ndarray:
        """The x that fits best; overhead and latencies not below zero."""
        seconds = np.array([p.seconds for p in points])
        x = self.nominal
        starts = [i for i in range(len(x)) if i == 0 or i % 2 == 1]
        for _ in range(rounds):
            here = self.predict(x, points)
            slopes = self.slopes(x, points)
            free = self.seen(slopes)
            target = seconds - here + slopes @ x
            before, x = x, x.copy()
            x[free] = 0.0  # what no point shows stays as it is
            while True:
                solved = robust_solve(slopes[:, free], target, seconds)
                below = [i for i, v in zip(free, solved, strict=True) if i in starts and v < 0]
                if not below:
                    break
                free.remove(below[-1])  # a latency before the overhead: that one is in all kinds
            x[free] = solved
            if any(x[i] <= 0 for i in range(len(x)) if i not in starts):
                raise BadFit(["collectives: no bandwidth of the links explains their times"])
            if np.allclose(x, before, rtol=1e-6, atol=1e-12):
                break
        return x


def robust_solve(
    a: np.ndarray, seconds: np.ndarray, scale: np.ndarray | None = None, rounds: int = 40
) -> np.ndarray:
    """x such that ``a @ x`` is near ``seconds``, in relative error, for most of the rows.

    Least absolute errors first (by reweighted least squares), which a minority of wrong rows does
    not move; then Tukey's biweight from there, which forgets them: rows farther off than 4.685
    times the spread of the others (the usual constant).
    """
    scale = np.abs(seconds) if scale is None else scale
    rows, target = a / scale[:, None], seconds / scale
    size = np.linalg.norm(rows, axis=0)
    size[size == 0] = 1.0
    rows = rows / size
    weights = np.ones(len(target))
    x = np.zeros(a.shape[1])
    for n in range(2 * rounds):
        root = np.sqrt(weights)
        x = np.linalg.lstsq(rows * root[:, None], target * root, rcond=None)[0]
        off = np.abs(rows @ x - target)
        if n < rounds:
            weights = 1 / np.maximum(off, 1e-6)
        else:
            spread = max(float(1.4826 * np.median(off)), 1e-6)
            weights = np.maximum(1 - (off / (4.685 * spread)) ** 2, 0) ** 2
    return x / size


def best_seen(measured: Measured, row: Mapping[str, Any]) -> dict[str, float]:
    """Nominal rates for a row that has none: the best that any point reached.

    For a processor, of which no data sheet is kept. ``row`` has rates of any size, efficiencies of
    1, no latency and no overhead: what its formulas say is then scaled to the fastest point, of
    links also to what is left of the points when their launches are taken off.

    Raises:
        BadFit: nothing large was measured, or no bandwidth explains the collectives.
    """
    chip = chip_of_row("measured", row)
    found: dict[str, float] = {}
    for dtype in dict.fromkeys(p.dtype for p in measured.products):
        # A memory so fast that only the matrix unit counts.
        unit = replace(chip, hbm_bandwidth=1e30)
        found[f"peak_flops.{dtype}"] = chip.flops(dtype) * max(
            matmul_time(unit, 1, p.m, p.n, p.k, dtype) / p.seconds
            for p in measured.products
            if p.dtype == dtype
        )
    if not measured.passes:
        raise BadFit(["memory passes: no point; give more --seconds"])
    edge = TINY * max(p.bytes for p in measured.passes)
    found["hbm_bandwidth"] = max(p.bytes / p.seconds for p in measured.passes if p.bytes > edge)
    if measured.transfers:
        model = TransferModel(row, measured.laid)
        predicted = model.predict(model.nominal, measured.transfers)
        fastest = max(t / p.seconds for t, p in zip(predicted, measured.transfers, strict=True))
        rates = 1 / model.solve(transfer_halves(measured.transfers)[0])[2::2]
        fastest = max(fastest, float(rates.max()))
        for link in model.links:
            found[f"{link}.bandwidth"] = get_field(row, f"{link}.bandwidth") * fastest
    return found
