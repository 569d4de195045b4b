"""Hold a plan against what the compiler made of it: collectives, FLOPs, memory.

Each collective of the plan is paired with one operand of one collective instruction: first by the
plan's id, which travels in the ``op_name`` metadata, then by kind, mesh axes, bytes and trip
count. What the compiler changed on the way is named (docs/compiler-behaviour.md lists it); what
stays unexplained fails the audit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from neocc.cost.algorithms import STANDARD, formula
from neocc.cost.choice import RING
from neocc.ir.mesh import Mesh
from neocc.ir.ops import HOST_MOVES
from neocc.lower.hlo import Collective as Compiled
from neocc.lower.hlo import HloFacts, Kernel, Message, axes_of, axes_of_pairs, read_hlo
from neocc.lower.kernels import Calls, messages, ran
from neocc.passes.plan import Collective as Planned
from neocc.passes.plan import Plan, local_flops

SCOPE = re.compile(
    r"neocc\.(?:all_gather|all_reduce|reduce_scatter|all_to_all|attention|attention_grad)\.(\d+)"
)
HALF = "made bf16, half the bytes"
SCATTERED = "made an all-reduce and a slice"
GATHERED = "made an all-reduce of the whole, in which each piece is one device's"
MEMORY_TOLERANCE = 0.10  # share by which the predicted peak may miss the compiler's


@dataclass(frozen=True)
class Finding:
    """One collective of the plan or of the program, or a kernel. ``verdict``: ``as planned``, or
    what the compiler did to it; ``ok``: that is an explained change that moves no other bytes."""

    planned: Planned | None
    compiled: Compiled | Kernel | None
    verdict: str
    ok: bool


@dataclass(frozen=True)
class Hiding:
    """Of one kind of collective, seconds of a step by the plan's prices: ``planned``, those that
    the plan lets run behind compute, and ``beside``, those of them that the program starts before
    a matrix product and ends after it."""

    planned: float
    beside: float


@dataclass(frozen=True)
class Audit:
    """The plan against the compiled program. FLOPs of matrix products and bytes per device.

    ``compiled_peak``: live bytes at the fullest point, XLA's ``peak_memory_in_bytes``;
    ``reserved``: bytes of arguments and of the one block for temporaries, with its gaps.
    ``hiding``: by kind; what the program runs at once is told, and fails nothing.
    """

    findings: tuple[Finding, ...]
    planned_flops: int
    compiled_flops: int
    planned_peak: int
    compiled_peak: int
    reserved: int
    unknown_loops: tuple[str, ...]
    hiding: Mapping[str, Hiding]

    @property
    def flops_equal(self) -> bool:
        return self.planned_flops == self.compiled_flops

    @property
    def memory_error(self) -> float:
        """Predicted over compiled peak, less one."""
        return self.planned_peak / self.compiled_peak - 1

    @property
    def collectives_ok(self) -> bool:
        return all(f.ok for f in self.findings) and not self.unknown_loops

    @property
    def ok(self) -> bool:
        in_tolerance = abs(self.memory_error) <= MEMORY_TOLERANCE
        return self.collectives_ok and self.flops_equal and in_tolerance


def audit(
    plan: Plan,
    text: str,
    compiled_peak: int,
    reserved: int,
    read: HloFacts | None = None,
    calls: Calls = lambda op, mesh: (),
) -> Audit:
    """Reads optimised HLO ``text``, where it is not ``read`` yet, and holds ``plan`` against it.
    ``calls``: the kernels that an op runs as (``Backend.calls``).

    Raises:
        HloError: the text holds a collective in a form that is not known.
    """
    facts = read or read_hlo(text)
    body, mesh = plan.partitioned.program.body, plan.mesh
    summed = local_flops(body, mesh) - local_flops(body, mesh, plan.chip)
    findings = tuple(pair(plan, facts, calls))
    return Audit(
        findings=findings,
        planned_flops=plan.flops - summed,
        compiled_flops=facts.flops + kernel_flops(plan, facts, calls),
        planned_peak=plan.memory.peak,
        compiled_peak=compiled_peak,
        reserved=reserved,
        unknown_loops=facts.unknown_loops,
        hiding=hiding(plan, findings),
    )


def kernel_flops(plan: Plan, facts: HloFacts, calls: Calls) -> int:
    """FLOPs of the kernels that the program has as planned: HLO shows none of them."""
    found = ran(plan.partitioned, calls, {k: ids_of(k) for k in facts.kernels})
    return sum(op.flops for op in found if op.as_planned)


def hiding(plan: Plan, findings: Iterable[Finding]) -> dict[str, Hiding]:
    """What may run behind compute, by kind, and how much of it does; of a collective that is
    several in the program the share of its bytes."""
    own: dict[int, list[Compiled]] = defaultdict(list)
    for f in findings:
        if isinstance(f.compiled, Compiled):
            for id in [f.planned.id] if f.planned else ids_of(f.compiled):
                own[id].append(f.compiled)
    found: dict[str, Hiding] = {}
    for p in plan.collectives:
        planned = p.behind + p.within * p.count
        if planned > 0 and p.kind not in HOST_MOVES:
            sent = sum(c.operand_bytes * c.trip_count for c in own[p.id])
            beside = sum(c.operand_bytes * c.trip_count for c in own[p.id] if c.beside)
            so_far = found.get(p.kind, Hiding(0.0, 0.0))
            more = planned * beside / sent if sent else 0.0
            found[p.kind] = Hiding(so_far.planned + planned, so_far.beside + more)
    return found


Match = Callable[[Planned, Compiled], bool]


def pair(plan: Plan, facts: HloFacts, calls: Calls = lambda op, mesh: ()) -> list[Finding]:
    """Every collective of the plan and of the program, once, in pairs where there is one; and
    every kernel."""
    mesh = plan.mesh
    planned = [c for c in plan.collectives if c.kind not in ("slice", *HOST_MOVES)]
    compiled = list(facts.collectives)
    axes = {c: compiled_axes(c, mesh.sizes) for c in compiled}
    ids = {c: ids_of(c) for c in compiled}
    findings: list[Finding] = []

    def same_place(p: Planned, c: Compiled) -> bool:
        return axes[c] == (mesh.index(p.axis),) and p.count == c.trip_count

    def exact(p: Planned, c: Compiled) -> bool:
        same = p.kind.replace("_", "-") == c.kind and same_place(p, c)
        return same and (p.bytes, p.result_bytes) == (c.operand_bytes, c.result_bytes)

    def known(match: Match) -> Match:
        return lambda p, c: ids[c] == [p.id] and match(p, c)

    def scattered(p: Planned, c: Compiled) -> bool:
        written = c.kind == "all-reduce" and p.kind == "reduce_scatter"
        return written and same_place(p, c) and p.bytes == c.operand_bytes

    def gathered(p: Planned, c: Compiled) -> bool:
        """A vector whose pieces are no whole number of lanes long."""
        written = c.kind == "all-reduce" and p.kind == "all_gather"
        return written and same_place(p, c) and p.result_bytes == c.operand_bytes

    def narrowed(p: Planned, c: Compiled) -> bool:
        same = p.kind.replace("_", "-") == c.kind and same_place(p, c)
        return same and p.bytes == 2 * c.operand_bytes and c.dtype == "bf16"

    def cast_after(p: Planned, c: Compiled) -> bool:
        same = p.kind.replace("_", "-") == c.kind and same_place(p, c)
        half = c.result_dtype == "bf16" and p.result_bytes == 2 * c.result_bytes
        return same and half and p.bytes == c.operand_bytes

    def stacked(p: Planned, c: Compiled) -> bool:
        times, rest = divmod(p.count, c.trip_count)
        same = p.kind.replace("_", "-") == c.kind and axes[c] == (mesh.index(p.axis),)
        return same and times > 1 and rest == 0 and times * p.bytes == c.operand_bytes

    def hoisted(p: Planned, c: Compiled) -> bool:
        same = p.kind.replace("_", "-") == c.kind and axes[c] == (mesh.index(p.axis),)
        return same and c.trip_count < p.count and p.bytes == c.operand_bytes

    def take(match: Match, verdict: str, ok: bool) -> None:
        for c in list(compiled):
            p = next((p for p in planned if match(p, c)), None)
            if p is not None:
                planned.remove(p)
                compiled.remove(c)
                more = c.operand_count - 1
                combined = f"combined with {more} more in {c.instruction}" if more else ""
                words = ", ".join(filter(None, (verdict, combined))) or "as planned"
                findings.append(Finding(p, c, words, ok))

    def take_peeled() -> None:
        """A loop whose first or last run the compiler took out of it, to copy ahead."""

        def alike(p: Planned, c: Compiled) -> bool:
            whole = replace(c, trip_count=p.count)
            axes[whole], ids[whole] = axes[c], ids[c]
            return c.trip_count < p.count and (exact(p, whole) or scattered(p, whole))

        for p in list(planned):
            own = [c for c in compiled if alike(p, c)]
            own.sort(key=lambda c: ids[c] != [p.id])
            many = next((c for c in own if c.trip_count == p.count - 1), None)
            once = next((c for c in own if c.trip_count == 1 and c is not many), None)
            if many and once:
                planned.remove(p)
                compiled.remove(many)
                compiled.remove(once)
                findings.append(Finding(p, many, "one run peeled off its loop", True))

    def take_folded() -> None:
        """Sums along one axis and then another that the compiler made one sum over both."""
        for c in list(compiled):
            over = [mesh.names[i] for i in axes[c] or ()]
            found = [p for axis in over for p in planned if sums_along(p, axis, c)]
            first = {p.axis: p for p in reversed(found)}
            if len(over) < 2 or len(first) < len(over):
                continue
            compiled.remove(c)
            for i, axis in enumerate(over):
                planned.remove(first[axis])
                words = f"one sum over {' and '.join(over)}"
                findings.append(Finding(first[axis], None if i else c, words, True))

    def take_kernels() -> set[int]:
        """Ops that run as kernels of the backend's own, among them collectives. Gives those that
        should and do not."""
        left = {k: ids_of(k) for k in facts.kernels}
        lacking = set[int]()
        for made in ran(plan.partitioned, calls, left):
            p = next((p for p in planned if p.id == made.id), None)
            if not made.as_planned:
                lacking.add(made.id)
                if p is None:
                    findings.append(Finding(None, None, f"{made.kind} without its kernels", False))
                continue
            if p is not None:
                planned.remove(p)
            by = f"by {p.algorithm}, " if p else ""
            for i, k in enumerate(made.kernels):
                left.pop(k)
                findings.append(Finding(None if i else p, k, f"{by}a kernel as planned", True))
        findings.extend(Finding(None, k, "a kernel that is not as planned", False) for k in left)
        return lacking

    def take_permutes() -> None:
        """Collectives that an algorithm runs: each of its messages is a permute of its own."""
        for p in list(planned):
            if p.algorithm == STANDARD or p.pairs or p.id in lacking:
                continue
            own = [c for c in compiled if ids[c] == [p.id] and c.kind == "collective-permute"]
            rounds = formula(p.kind, p.algorithm).rounds(values(p), p.itemsize, p.grid)
            wanted = Counter(messages(rounds, p.grid, mesh, p.axis))
            half = p.itemsize == 4 and all(c.dtype == "bf16" for c in own)
            sent = Counter(Message(frozenset(c.groups), c.operand_bytes * (1 + half)) for c in own)
            # Pieces of less than a value each: the compiler sends none that are only padding.
            padding = wanted - sent if values(p) < math.prod(p.grid) * len(p.grid) else Counter()
            if own and wanted - padding == sent and all(c.trip_count == p.count for c in own):
                planned.remove(p)
                words = HALF if half else "without padding" if padding else "as planned"
                words = f"by {p.algorithm}, {words}"
                for i, c in enumerate(own):
                    compiled.remove(c)
                    findings.append(Finding(None if i else p, c, words, True))

    def take_rings() -> None:
        """What ring attention sends: each permute as often as planned. Attention that is computed
        again beside its gradient may share with it what both send."""
        alike: dict[tuple[object, ...], list[Planned]] = defaultdict(list)
        for p in planned:
            if p.pairs:
                alike[p.region, device_pairs(p, mesh), p.bytes].append(p)
        for (_, pairs, size), same in alike.items():
            by = {p.id for p in same}
            own = [c for c in compiled if c.kind == "collective-permute" and by.issuperset(ids[c])]
            own = [
                c for c in own if ids[c] and (frozenset(c.groups), c.operand_bytes) == (pairs, size)
            ]
            wanted = Counter[int]()
            for p in same:
                wanted[p.id] += p.count
            runs = sum(c.trip_count for c in own)
            if not max(wanted.values()) <= runs <= wanted.total():
                continue
            merged = wanted.total() - runs
            words = f"{merged} runs merged with equal ones" if merged else "as planned"
            for p, c in itertools.zip_longest(same, own):
                findings.append(Finding(p, c, f"by {RING}, {words}", True))
            for p in same:
                planned.remove(p)
            for c in own:
                compiled.remove(c)

    lacking = take_kernels()
    take_permutes()
    take_rings()
    take(known(exact), "", True)
    take(exact, "", True)
    take_folded()
    take(scattered, SCATTERED, True)
    take(gathered, GATHERED, True)
    take_peeled()
    take(narrowed, HALF, True)
    take(known(cast_after), "with the cast to bf16 that follows it", True)
    take(stacked, "moved out of the loop as one of the stack, the same bytes", True)
    take(hoisted, "moved out of the loop", False)
    for p in planned:
        alike = (f for f in findings if f.planned is not None and same_transfer(f.planned, p))
        twin = p.id not in lacking and any(alike)
        verdict = "merged with an equal one" if twin else "removed"
        findings.append(Finding(p, None, verdict, twin))
    for c in compiled:
        realigns = (
            c.kind == "collective-permute"
            and c.written_as is None
            and any(
                isinstance(f.compiled, Compiled)
                and f.compiled.kind == "reduce-scatter"
                and f.compiled.fused
                and f.compiled.trip_count == c.trip_count
                for f in findings
            )
        )
        verdict = (
            "added: shifts a reduce-scatter's uneven pieces into place" if realigns else "added"
        )
        findings.append(Finding(None, c, verdict, realigns))
    return findings


def ids_of(c: Compiled | Kernel) -> list[int]:
    """The plan's id of the innermost op that an instruction is of, if it bears one."""
    return [int(n) for n in SCOPE.findall(c.op_name)][-1:]


def device_pairs(p: Planned, mesh: Mesh) -> frozenset[tuple[int, ...]]:
    """Source and target devices of a permute along an axis."""
    axis = mesh.index(p.axis)
    devices = np.moveaxis(np.arange(mesh.size).reshape(mesh.sizes), axis, 0).reshape(p.grid[0], -1)
    every = ((devices[s].tolist(), devices[t].tolist()) for s, t in p.pairs)
    return frozenset(pair for s, t in every for pair in zip(s, t, strict=True))


def values(p: Planned) -> int:
    """Values of a collective that a device holds, before or after, whichever are more."""
    return max(p.bytes, p.result_bytes) // p.itemsize


def sums_along(p: Planned, axis: str, c: Compiled) -> bool:
    """Whether an all-reduce of the program, over more axes, does a planned one along ``axis``."""
    same = (p.kind, p.axis, p.bytes, p.count) == ("all_reduce", axis, c.operand_bytes, c.trip_count)
    return c.kind == "all-reduce" and same


def same_transfer(a: Planned | None, b: Planned) -> bool:
    return a is not None and (a.kind, a.axis, a.bytes, a.count) == (
        b.kind,
        b.axis,
        b.bytes,
        b.count,
    )


def undoes(gather: Planned, scatter: Planned | None) -> bool:
    """Whether an all-gather puts together what a reduce-scatter cut."""
    if scatter is None or (gather.kind, scatter.kind) != ("all_gather", "reduce_scatter"):
        return False
    same = (gather.axis, gather.dim, gather.count) == (scatter.axis, scatter.dim, scatter.count)
    return same and (gather.bytes, gather.result_bytes) == (scatter.result_bytes, scatter.bytes)


def compiled_axes(c: Compiled, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    read = axes_of_pairs if c.kind == "collective-permute" else axes_of
    return read(c.groups, sizes)


def summary(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings each verdict has, combined ones counted together."""
    counts: dict[str, int] = {}
    for f in findings:
        verdict = re.sub(r"combined with \d+ more in \S+", "combined with others", f.verdict)
        counts[verdict] = counts.get(verdict, 0) + 1
    return counts
