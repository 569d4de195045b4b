"""A case's predictions beside what the compiler made of it, and the figures over all cases."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.tpu_record import Record
from neocc.passes.plan import Plan, bodies

# Cycles a second: ``cycles_per_microsecond`` in the schedules that the compiler dumps
# (``--xla_dump_latency_hiding_schedule``), and the peak bf16 FLOP/s over those of a cycle: 4
# matrix units of 128 x 128 on v5e, 8 on v4 (two cores) and v5p, 4 of 256 x 256 on v6e.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


@dataclass(frozen=True)
class Score:
    """Bytes and seconds of one device. ``held``: as ``compiled``, with what lies on chip, if known.
    ``sent``: bytes that a step puts into collectives, as planned and as compiled; ``layers``:
    seconds of one trip of each loop's compute, as predicted and by the compiler's estimate."""

    name: str
    predicted: int
    compiled: int
    held: int | None
    flops_equal: bool
    findings: dict[str, int]
    unexplained: tuple[str, ...]
    sent: tuple[int, int]
    layers: tuple[tuple[str, float, float], ...]

    @property
    def exact(self) -> bool:
        """Every collective is found with the bytes planned; none is gone, and those that were added
        only shift the uneven pieces of a scatter."""
        changes = ("merged", "removed", "made bf16", "moved", "added")
        changed = [v for v in self.findings if v.startswith(changes)]
        return not self.unexplained and all(v.startswith("added: shifts") for v in changed)

    @property
    def memory_error(self) -> float:
        return self.predicted / self.compiled - 1

    @property
    def held_error(self) -> float:
        return self.predicted / (self.held or self.compiled) - 1

    @property
    def layer_errors(self) -> list[float]:
        return [ours / theirs - 1 for _, ours, theirs in self.layers]

    def line(self) -> str:
        layers = ", ".join(f"{ours / theirs - 1:+.0%}" for _, ours, theirs in self.layers)
        unexplained = f"  {len(self.unexplained)} UNEXPLAINED" if self.unexplained else ""
        return (
            f"{self.predicted / 1e9:7.2f} {self.compiled / 1e9:7.2f} GB {self.memory_error:+6.1%}"
            f"  sent {self.sent[0] / 1e9:8.2f} {self.sent[1] / 1e9:8.2f} GB"
            f"  {self.name}  {'' if self.flops_equal else 'FLOPS DIFFER'}{unexplained}  {layers}"
        )


def score(name: str, plan: Plan, record: Record) -> Score:
    """``plan``: the stored one, under the cost model as it is."""
    planned = sum(c.bytes * c.count for c in plan.collectives if c.kind != "slice")
    compiled = sum(row[2] * row[4] * row[5] for row in record.collectives)
    return Score(
        name=name,
        predicted=plan.memory.peak,
        compiled=record.peak,
        held=record.held,
        flops_equal=plan.flops == record.flops,
        findings=record.findings,
        unexplained=tuple(record.unexplained),
        sent=(planned, compiled),
        layers=tuple(layers(plan, record)) if record.cycles else (),
    )


def layers(plan: Plan, record: Record) -> list[tuple[str, float, float]]:
    compute: dict[str, float] = {}
    for body in bodies(plan.problem.program.body):
        picked = ((c, i) for c, i in plan.solution.picked.items() if c.region is body.region)
        compute[body.name] = sum(c.seconds[i] for c, i in picked) / body.trips
    clock = CLOCK[plan.chip.name]
    trips = {body.name: body.trips for body in bodies(plan.problem.program.body)}
    # Loops over tiles of attention are part of a layer's time, and none of the plan's.
    own: dict[str, int] = {}
    for name, count, cycles in record.loops:
        if count == trips[name]:
            own[name] = max(cycles, own.get(name, 0))
    return [(name, compute[name], cycles / clock) for name, cycles in own.items()]


def report(found: list[Score]) -> str:
    """The figures over all cases."""
    if not found:
        return "no results"
    memory = sorted(abs(s.memory_error) for s in found)
    held = sorted(abs(s.held_error) for s in found)
    explained = sum(not s.unexplained for s in found)
    lines = [
        f"{len(found)} programs",
        f"peak memory: median error {median(memory):.1%}, worst {memory[-1]:.1%}",
        f"with what lies on chip ({sum(s.held is not None for s in found)} programs): "
        f"median error {median(held):.1%}, worst {held[-1]:.1%}",
        f"collectives: bytes as planned in {sum(s.exact for s in found)} of {len(found)} programs, "
        f"changes explained in {explained}",
        f"FLOPs of matrix products equal: {sum(s.flops_equal for s in found)} of {len(found)}",
    ]
    times = sorted(abs(e) for s in found for e in s.layer_errors)
    if times:
        programs = sum(bool(s.layers) for s in found)
        lines.append(
            f"compute of a layer: median error {median(times):.1%}, worst {times[-1]:.1%}, "
            f"{len(times)} loops of {programs} programs"
        )
    return "\n".join(lines)
