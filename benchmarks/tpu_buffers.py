"""Peak memory of a program from what XLA dumps when it has assigned buffers, before code.

Generating code takes nine tenths of a compile for TPU and changes neither buffers, nor collectives,
nor the schedule. The dump (``--xla_dump_to``) has the scheduled HLO and each buffer with its place,
size and users: what is live at each instruction follows, and its peak is the
``peak_memory_in_bytes`` that a finished compile gives.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neocc.ir.errors import NeoccError
from neocc.lower.hlo_text import Module, parse_module

HLO = "*train_step*after_optimizations_after_buffer_assignment.txt"
FLAGS = "--xla_dump_to={} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
HBM, ON_CHIP = 0, 1  # the memory spaces ("colors") of values
SMALL = 512  # bytes: tuples and counters


@dataclass
class Buffer:
    """One value's place in its allocation, and the instructions that hold or read it."""

    name: str
    color: int
    size: int
    offset: int
    users: list[str] = field(default_factory=list)


@dataclass
class Allocation:
    size: int
    kind: str
    buffers: list[Buffer] = field(default_factory=list)


def until_buffers(compile: Callable[[], Any], folder: Path, seconds: float) -> str:
    """Runs ``compile`` in a thread until the HLO with buffers is in ``folder``, and returns its
    text. The caller ends the process: XLA cannot be interrupted.

    Raises:
        NeoccError: the compile ended without it, or takes longer than ``seconds``.
    """
    errors: list[str] = []

    def run() -> None:
        try:
            compile()
        except Exception as error:  # printed by the caller; XLA reports through several types
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    size, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        found = list(folder.glob(HLO))
        if found and size == found[0].stat().st_size > 0:
            return found[0].read_text()
        size = found[0].stat().st_size if found else 0
        if not thread.is_alive() and not found:
            break
        time.sleep(0.5)
    raise NeoccError(errors[0][:300] if errors else f"no buffers after {seconds:.0f} s")


def peak_bytes(folder: Path, text: str, colors: Sequence[int] = (HBM,)) -> int:
    """Most bytes of a device's memory, or of several memories, that are in use at one
    instruction."""
    module = parse_module(text)
    order = {name: i for i, name in enumerate(schedule(module, module.entry))}
    found = allocations(
        next(folder.glob("*train_step*buffer-assignment.txt")).read_text(),
        next(folder.glob("*train_step*buffer-assignment-values.txt")).read_text(),
    )
    always, ranges = 0, []
    for allocation in found:
        if "thread-local" in allocation.kind:
            continue
        if "preallocated-temp" not in allocation.kind and "color" not in allocation.kind:
            always += allocation.size if "constant" not in allocation.kind else 0
            continue
        for b in allocation.buffers:
            at = [order[n] for n in (b.name, *b.users) if n in order]
            if b.color in colors and b.size > SMALL and at:
                begin = order.get(b.name, min(at))
                ranges.append((begin, max(at), b.color, b.offset, b.size))

    def held(t: int) -> int:
        here = [(c, o, s) for begin, end, c, o, s in ranges if begin <= t <= end]
        return sum(covered((o, s) for at, o, s in here if at == color) for color in colors)

    return always + max(map(held, {begin for begin, *_ in ranges}), default=0)


def schedule(module: Module, name: str) -> Iterator[str]:
    """Instructions in order of execution, a loop's body before the loop."""
    for inst in module.computations[name].instructions:
        if inst.opcode == "while":
            for inner in (*inst.called("body"), *inst.called("condition")):
                yield from schedule(module, inner)
        elif inst.opcode in ("call", "conditional"):
            for inner in inst.called("to_apply", "calls", "branch_computations"):
                yield from schedule(module, inner)
        yield inst.name


def covered(pieces: Iterable[tuple[int, int]]) -> int:
    """Bytes that (offset, size) pieces cover: several values may share a place."""
    total, top = 0, -1
    for offset, size in sorted(pieces):
        low = max(offset, top)
        if offset + size > low:
            total += offset + size - low
            top = offset + size
    return total


def allocations(assignment: str, values: str) -> list[Allocation]:
    """The two dumps: places of values, and their positions and uses."""
    found: list[Allocation] = []
    by_number: dict[str, Buffer] = {}
    place = re.compile(r" value: <(\d+) (\S+).*? @(\d+)> \(size=(\d+),offset=(\d+)\)")
    for line in assignment.splitlines():
        if match := re.match(r"allocation \d+: size (\d+)(.*)", line):
            found.append(Allocation(int(match[1]), match[2]))
        elif match := place.match(line):
            name = match[2].split("{")[0]
            buffer = Buffer(name, int(match[3]), int(match[4]), int(match[5]))
            found[-1].buffers.append(buffer)
            by_number[match[1]] = buffer
    current: Buffer | None = None
    for line in values[values.index("Used values:") :].splitlines():
        if line.startswith("<"):
            current = by_number.get(line[1:].split()[0])
        elif line.startswith("  ") and current is not None:
            current.users.append(re.split(r"[ {,]", line.strip(), maxsplit=1)[0])
    return found
