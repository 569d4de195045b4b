"""Which algorithm runs a collective: XLA's own, or one of neocc's where it is better or asked for.

An algorithm of neocc's takes ``PREMIUM`` times what its formula says, as no device has measured
it, so that it is chosen only where it gains more than that; and it moves what it sends through the
device's own memory some more times (``COPIES``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from neocc.cost.algorithms import (
    FORMULAS,
    KERNEL_RING,
    PRODUCTS,
    STANDARD,
    Formula,
    formula,
)
from neocc.cost.attention_kernels import KERNELS, AttentionKernels
from neocc.cost.collectives import collective_time
from neocc.cost.hardware import Chip
from neocc.cost.roofline import elementwise_time
from neocc.cost.rounds import factors
from neocc.cost.topology import AxisLink
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh

AUTO = "auto"
MODES = (AUTO, STANDARD)
PREMIUM = 1.1
COPIES = {"all_gather": 5.0, "reduce_scatter": 5.0, "all_reduce": 6.0, "all_to_all": 7.0}
"""Bytes that an algorithm reads and writes in memory for each byte that a device holds before or
after the collective, whichever is larger."""
RING_KIND, RING = "attention", "ring"  # the collectives of fused attention, run in the op itself
PROBE = 1 << 40  # bytes at which the slope of an algorithm's time is read


@dataclass(frozen=True, slots=True)
class Way:
    """How a collective runs: the algorithm, the sizes of the grid that it runs on (none for XLA's
    own), its seconds, and those of XLA's own. ``alone``: a device computes nothing meanwhile, as it
    runs a kernel."""

    algorithm: str
    grid: tuple[int, ...]
    seconds: float
    standard: float
    alone: bool = False

    @property
    def wires(self) -> float:
        """Seconds in which the device may do something else."""
        return 0.0 if self.alone else self.seconds


@dataclass(frozen=True)
class Collectives:
    """What may run a plan's collectives. ``auto``: the best of XLA's own and of every algorithm of
    ``FORMULAS`` that gives the same numbers, and rings of fused attention; else XLA's own.
    ``forced``: (kind, algorithm), in place of that wherever the algorithm can run;
    ``attention=ring``: wherever keys and values would be gathered; ``attention=splash`` or
    ``=cudnn``: as those kernels wherever queries and keys are whole on a device. Inside products
    they run, or do not, once the layout is decided (``passes.products``): until then, what runs so
    is XLA's own."""

    auto: bool = True
    forced: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def asked(mode: str = STANDARD, forced: Iterable[str] = ()) -> Collectives:
        """Of the words of a command: ``auto`` or ``standard``, and ``KIND=ALGORITHM``.

        Raises:
            LayoutError: another mode, kind or algorithm, or two for one kind.
        """
        if mode not in MODES:
            lossy = mode in {f.name for f in FORMULAS.values() if f.lossy}
            named = f"; {mode} rounds, so ask for it by name: all_reduce={mode}" if lossy else ""
            raise LayoutError(
                f"collectives {mode!r}; one of {', '.join(MODES)}: of one kind alone, "
                f"KIND=ALGORITHM{named}"
            )
        found: dict[str, str] = {}
        for text in forced:
            kind, _, name = text.partition("=")
            kind = kind.strip().replace("-", "_")
            if not name:
                raise LayoutError(f"collective {text!r}: write KIND=ALGORITHM: all_gather=ring2")
            if kind in found:
                raise LayoutError(f"collective {text!r}: {kind} has {found[kind]} already")
            found[kind] = named_formula(kind, name.strip())
        return Collectives(mode == AUTO, tuple(found.items()))

    def __str__(self) -> str:
        mode = AUTO if self.auto else STANDARD
        return ", ".join((mode, *(f"{kind}={name}" for kind, name in self.forced)))

    def of(self, kind: str) -> str | None:
        """The algorithm that a kind is to run by; None where that is free."""
        return dict(self.forced).get(kind, None if self.auto else STANDARD)

    @property
    def attention(self) -> AttentionKernels | None:
        """The kernels that fused attention is to run as, if any."""
        return KERNELS.get(self.of(RING_KIND) or "")

    def check(self, mesh: Mesh, chip: Chip) -> None:
        """Raises:
        LayoutError: a forced algorithm runs on no such chip, or on no axis of the mesh.
        """
        sizes = [size for size in mesh.sizes if size > 1]
        for kind, name in self.forced:
            if kind == RING_KIND and name in KERNELS:
                check_chips(f"{kind}={name}", KERNELS[name].chips, chip, "leave it to the loop")
            if name == STANDARD or kind == RING_KIND:
                continue
            f = formula(kind, name)
            check_kernel(f, chip)
            if sizes and not any(runs(f, size) for size in sizes):
                raise LayoutError(
                    f"{kind}={name} runs on {needed(f)}, and no axis of mesh {mesh} is one: give "
                    "an axis of another size, or another algorithm"
                )

    def candidates(self, kind: str, link: AxisLink) -> Iterator[Formula]:
        """The algorithms beside XLA's own among which the kind is free on such wires: those made
        for them that for some bytes are faster than XLA's own."""
        if self.of(kind) is None:
            alike = (f for f in FORMULAS.values() if f.kind == kind and not (f.lossy or f.kernel))
            yield from (f for f in alike if f.fits(link) and faster(f, link))

    def inside(self, kind: str) -> bool:
        """Whether collectives of a kind may run inside products."""
        return (kind, PRODUCTS) in FORMULAS and self.of(kind) in (None, PRODUCTS)

    @property
    def products(self) -> bool:
        """Whether any may."""
        return any(self.inside(kind) for kind, _ in FORMULAS)


STANDARD_ONLY = Collectives(auto=False)


def named_formula(kind: str, name: str) -> str:
    if kind == RING_KIND:
        known = (STANDARD, RING, *KERNELS)
        if name not in known:
            raise LayoutError(f"collective {kind}={name}: one of {', '.join(known)}")
        return name
    if name == STANDARD and any(k == kind for k, _ in FORMULAS):
        return name
    try:
        return formula(kind, name).name
    except ValueError as error:
        raise LayoutError(f"collective {kind}={name}: {error}") from None


def check_kernel(f: Formula, chip: Chip) -> None:
    """Raises:
    LayoutError: an algorithm is a kernel of other chips.
    """
    if f.kernel:
        check_chips(f"{f.kind}={f.name}", f.kernel, chip, "ring2 sends the same by permutes")


def check_chips(what: str, kind: str, chip: Chip, instead: str) -> None:
    if kind != chip.kind:
        raise LayoutError(
            f"{what} is a kernel of {kind.upper()}s, and {chip.name} is a {chip.kind.upper()}: "
            f"{instead}"
        )


def runs(f: Formula, size: int) -> bool:
    """Whether an axis of so many devices is a grid of as many rings as an algorithm needs, or a
    ring that its kernel takes."""
    if f.kernel and size > KERNEL_RING:
        return False
    return size > 1 and all(n > 1 for n in factors(size, f.rings[0]))


def needed(f: Formula) -> str:
    if f.kernel:
        return f"a ring of at most {KERNEL_RING} devices"
    return f"a grid of {f.rings[0]} rings, which sizes that are prime have not"


def lines(f: Formula, link: AxisLink) -> tuple[float, float]:
    """The formula's fixed seconds and seconds a byte; no bytes take less."""
    fixed = float(f.seconds(0, link))
    return fixed, (float(f.seconds(PROBE, link)) - fixed) / PROBE


def standard_line(kind: str, link: AxisLink) -> tuple[float, float]:
    fixed = float(collective_time(kind, 0, link))
    return fixed, (float(collective_time(kind, PROBE, link)) - fixed) / PROBE


def faster(f: Formula, link: AxisLink) -> bool:
    """Whether for some bytes an algorithm's price is below that of XLA's own."""
    own, standard = lines(f, link), standard_line(f.kind, link)
    return any(PREMIUM * a < b for a, b in zip(own, standard, strict=True))


def price(f: Formula, full_bytes: int, itemsize: int, link: AxisLink, chip: Chip) -> float:
    """Seconds of one run of an algorithm; ``full_bytes`` as ``collective_time`` has it."""
    copied = elementwise_time(chip, COPIES[f.kind] * full_bytes)
    return f.seconds(full_bytes, link, itemsize) * PREMIUM + copied


def way_of(
    f: Formula, full_bytes: int, itemsize: int, link: AxisLink, chip: Chip, standard: float
) -> Way:
    """By one of neocc's algorithms; ``standard``: what XLA's own takes."""
    grid = tuple(ring.size for ring in f.grid(link))
    seconds = price(f, full_bytes, itemsize, link, chip)
    return Way(f.name, grid, seconds, standard, alone=bool(f.kernel))
