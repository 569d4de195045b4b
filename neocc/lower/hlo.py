"""Reads optimised HLO text: what a compiled program does on one device, counted.

``read_hlo`` takes the text that ``compiled.as_text()`` prints (TPU, GPU or CPU) and gives each
executed collective operand, the matrix products with their FLOPs, and the TPU scheduler's cycle
estimate, all multiplied by loop trip counts. Only text is read: JAX is not imported.
docs/compiler-behaviour.md tells what the compiler does to a program on the way here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from neocc.lower.hlo_flops import convolution_flops, dot_flops, library_flops
from neocc.lower.hlo_loops import Constants
from neocc.lower.hlo_text import (
    Array,
    Computation,
    HloError,
    Instruction,
    Module,
    arrays,
    elements,
    parse_groups,
    parse_module,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_SKIP = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast"))
_CALLERS = frozenset(("fusion", "call", "custom-call", "async"))  # and these with "-start"
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha\w*)"')
_BODY = re.compile(r'"body":"([^"]*)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ENDS = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_PRIMITIVE = re.compile(
    r"(all_gather|reduce_scatter|psum_scatter|psum|pmax|pmin|all_to_all|ppermute)(?:_invariant)?"
)


@dataclass(frozen=True, slots=True)
class Collective:
    """One operand of one collective instruction, as executed by one device.

    Shapes are logical (no tiling, no layout). Bytes are ``prod(shape) * itemsize``. A compiler
    that combines several collectives makes one instruction with several operands: they share
    ``instruction``, ``operand_count`` is their number and ``operand_index`` tells them apart.
    """

    kind: str
    instruction: str
    computation: str
    dtype: str
    result_dtype: str
    """Differs from ``dtype`` where a cast was folded in (bf16 terms summed to a float32 result)."""
    operand_shape: tuple[int, ...]
    result_shape: tuple[int, ...]
    operand_bytes: int
    result_bytes: int
    groups: tuple[tuple[int, ...], ...]
    """Replica groups, each ordered; for a permute its (source, target) pairs. Ids are positions in
    the jit's device assignment, i.e. in the mesh's devices flattened in order, not chip ids."""
    reduction: str | None
    """``add``, ``maximum``, ``minimum``, ``and``, ``or``, ``multiply``; None for the others."""
    trip_count: int
    """Executions in one call of the program: product of the enclosing loops' trip counts."""
    op_name: str
    """The ``op_name`` metadata; empty where the compiler dropped it."""
    written_as: str | None
    """The JAX primitive it was written as (``reduce_scatter`` for an all-reduce that the compiler
    made of one); None for a collective that the compiler added of its own."""
    fused: bool
    """Inside a fusion: on TPU the fused all-reduce + slice is read as ``reduce-scatter``."""
    conditional: bool
    """Inside a branch that need not be taken; counted as if it is."""
    operand_index: int = 0
    operand_count: int = 1
    start: str = ""
    end: str = ""
    """The instructions of the schedule between which an asynchronous one runs; "" of one that
    starts and ends at once."""
    beside: int = 0
    """FLOPs of the matrix products between them, in one run."""


@dataclass(frozen=True, slots=True)
class MatMul:
    """A ``dot``, ``convolution`` or library matrix product. ``flops`` is 2*M*N*K of one execution,
    on one device, padding not counted."""

    instruction: str
    computation: str
    dtype: str
    flops: int
    trip_count: int
    op_name: str


@dataclass(frozen=True, slots=True)
class Message:
    """What a kernel sends: (source, target) devices, as of a permute, and bytes from each."""

    pairs: frozenset[tuple[int, ...]]
    bytes: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that the compiler was given whole: Pallas' on TPU, cuDNN's attention on GPU.

    HLO shows none of what it computes. ``operand_bytes`` and ``result_bytes``: of each array.
    """

    name: str
    """What its author called it; of cuDNN's the custom call's target."""
    instruction: str
    computation: str
    operand_bytes: tuple[int, ...]
    result_bytes: tuple[int, ...]
    trip_count: int
    op_name: str
    conditional: bool
    body: str = field(default="", repr=False)
    """What Mosaic, the TPU's compiler of kernels, was given, in base64; else empty."""
    sent: tuple[Message, ...] | None = None
    """What one run sends to other devices; None where the body was not read."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A ``while``: ``trip_count`` is None where the text does not tell it."""

    instruction: str
    body: str
    trip_count: int | None
    executions: int
    """How often the loop itself is entered (product of the enclosing trip counts)."""
    op_name: str
    cycles: int
    """``estimated_cycles`` of one run of the body, with the loops in it."""


@dataclass(frozen=True)
class HloFacts:
    """What one device executes in one call of the program.

    Where a loop's trip count is unknown its body is counted once; ``unknown_loops`` names it.
    """

    module: str
    devices: int
    collectives: tuple[Collective, ...]
    matmuls: tuple[MatMul, ...]
    loops: tuple[Loop, ...]
    estimated_cycles: int
    """Sum of the TPU compiler's ``estimated_cycles``, times trip counts; 0 on other backends.
    Collectives and kernels carry no estimate and are not in it."""
    kernels: tuple[Kernel, ...] = ()

    @cached_property
    def unknown_loops(self) -> tuple[str, ...]:
        return tuple(loop.instruction for loop in self.loops if loop.trip_count is None)

    @cached_property
    def flops(self) -> int:
        """FLOPs of all matrix products, times trip counts."""
        return sum(m.flops * m.trip_count for m in self.matmuls)

    @cached_property
    def flops_by_op_name(self) -> Mapping[str, int]:
        """FLOPs of the matrix products, times trip counts, by ``op_name`` metadata."""
        total: dict[str, int] = defaultdict(int)
        for m in self.matmuls:
            total[m.op_name] += m.flops * m.trip_count
        return dict(total)


def read_hlo(text: str) -> HloFacts:
    """Reads optimised HLO text.

    Raises:
        HloError: the text is not an HLO module, or holds a collective in a form unknown here (an
            audit must not overlook one).
    """
    module = parse_module(text)
    walk = _Walk(module)
    walk.visit(module.computations[module.entry], _Context())
    walk.check_complete()
    return HloFacts(
        module=module.name,
        devices=module.devices,
        collectives=tuple(walk.collectives),
        matmuls=tuple(walk.matmuls),
        loops=tuple(walk.loops),
        estimated_cycles=walk.cycles,
        kernels=tuple(walk.kernels),
    )


@dataclass(frozen=True, slots=True)
class _Context:
    """How a computation is reached from the entry."""

    times: int = 1
    fused: bool = False
    conditional: bool = False
    timed: bool = True
    """Whether its cycle estimates count: not inside a fusion, which carries its own, and not on a
    SparseCore, which runs beside the TensorCore."""


class _Walk:
    """Follows the calls from the entry computation and keeps what it meets."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.constants = Constants(module)
        self.collectives: list[Collective] = []
        self.matmuls: list[MatMul] = []
        self.kernels: list[Kernel] = []
        self.loops: list[Loop] = []
        self.cycles = 0
        self.flops = 0
        self.visited: set[str] = set()
        self.chains: set[str] = set()

    def visit(self, comp: Computation, at: _Context) -> None:
        """Counts what one call of ``comp`` executes."""
        self.visited.add(comp.name)
        under: dict[str, tuple[str, range, int]] = {}
        for inst in comp.instructions:
            first = len(self.collectives)
            self._run(comp, inst, at)
            way, name = self._asynchronous(comp, inst)
            if way == "start":
                under[name] = inst.name, range(first, len(self.collectives)), self.flops
            elif way == "done" and name in under:
                start, those, flops = under.pop(name)
                beside = (self.flops - flops) // at.times if at.times else 0
                for i in those:
                    c = self.collectives[i]
                    self.collectives[i] = replace(c, start=start, end=inst.name, beside=beside)

    def _run(self, comp: Computation, inst: Instruction, at: _Context) -> None:
        """Counts one instruction."""
        op = inst.opcode
        if op in _SKIP:
            return
        if at.timed:
            self.cycles += inst.estimated_cycles * at.times
        if op in ("send", "recv") and "megascale" in inst.rest:
            raise HloError(
                f"{inst.name!r} crosses between slices; only programs of one slice are read"
            )
        kind = _collective_kind(op)
        if kind is not None and self._piece(inst, at):
            return
        if kind is not None:
            self.collectives += self._collective(kind, comp, inst, at)
        elif op in ("dot", "convolution"):
            flops = dot_flops(comp, inst) if op == "dot" else convolution_flops(comp, inst)
            self._matmul(comp, inst, flops, at.times)
        elif op == "custom-call" and (flops := library_flops(comp, inst)) is not None:
            self._matmul(comp, inst, flops, at.times)
        elif op == "custom-call" and (found := _KERNEL.search(inst.rest)) is not None:
            self.kernels.append(_kernel(comp, inst, found[1], at))
        elif op == "while":
            self._loop(comp, inst, at)
        elif op == "conditional":
            for callee in inst.called(
                "branch_computations", "true_computation", "false_computation"
            ):
                self.visit(self.module.computations[callee], replace(at, conditional=True))
        elif op.removesuffix("-start") in _CALLERS:
            fused = op == "fusion"
            elsewhere = fused or inst.attribute("async_execution_thread") is not None
            within = replace(at, fused=at.fused or fused, timed=at.timed and not elsewhere)
            for callee in inst.called("calls", "to_apply", "called_computations"):
                inner = self.module.computations[callee]
                whole = self._scatter_fusion(comp, inst, inner, at)
                if whole:
                    self.collectives += whole
                    self.visited.add(callee)
                else:
                    self.visit(inner, within)

    def _asynchronous(self, comp: Computation, inst: Instruction) -> tuple[str, str]:
        """Whether an instruction is the ``start`` or ``done`` of a transfer that runs meanwhile,
        and what both have in common: the name of the start, or the chain of the fusions that it
        runs in."""
        op = inst.opcode
        if op.endswith("-start"):
            return "start", inst.name
        if op.endswith("-done"):
            source = comp.by_name[inst.operands[0]]
            while source.opcode.endswith("-update"):
                source = comp.by_name[source.operands[0]]
            return "done", source.name
        if op == "fusion":
            for one in self.module.computations[inst.called("calls")[0]].instructions:
                if one.opcode == "custom-call" and (found := _ENDS.search(one.rest)):
                    return found[1].lower(), self._chain_in(inst)
        return "", ""

    def _chain_in(self, fusion: Instruction) -> str:
        inner = self.module.computations[fusion.called("calls")[0]]
        found = (_CHAIN.search(one.rest) for one in inner.instructions)
        return next((f"chain {match[1]}" for match in found if match), "")

    def _piece(self, inst: Instruction, at: _Context) -> bool:
        """Whether a collective was met before: an asynchronous one that runs inside fusions stands
        in the one that starts it, in those that it runs beside and in the one that ends it, all
        of one chain."""
        chain = _CHAIN.search(inst.rest)
        if not at.fused or chain is None:
            return False
        if chain[1] in self.chains:
            return True
        self.chains.add(chain[1])
        return False

    def check_complete(self) -> None:
        """Raises HloError if a computation that holds a collective was not reached."""
        for name, comp in self.module.computations.items():
            if name not in self.visited:
                for inst in comp.instructions:
                    if _collective_kind(inst.opcode):
                        raise HloError(
                            f"collective {inst.name!r} is in computation {name!r}, which is called"
                            " in a way not known here"
                        )

    def _matmul(self, comp: Computation, inst: Instruction, flops: int, times: int) -> None:
        dtype = arrays(comp.shape(inst.operands[0]))[0].dtype
        self.matmuls.append(MatMul(inst.name, comp.name, dtype, flops, times, inst.op_name))
        self.flops += flops * times

    def _loop(self, comp: Computation, inst: Instruction, at: _Context) -> None:
        (body,), (condition,) = inst.called("body"), inst.called("condition")
        trips = self.constants.trip_count(comp, inst)
        place, before = len(self.loops), self.cycles
        known = 1 if trips is None else trips
        self.visit(self.module.computations[body], replace(at, times=at.times * known))
        executions = at.times * known
        cycles = (self.cycles - before) // executions if executions else 0
        self.visit(self.module.computations[condition], replace(at, times=at.times * (known + 1)))
        self.loops.insert(place, Loop(inst.name, body, trips, at.times, inst.op_name, cycles))

    def _collective(
        self, kind: str, comp: Computation, inst: Instruction, at: _Context
    ) -> Iterator[Collective]:
        operands = [arrays(comp.shape(name))[0] for name in inst.operands]
        results = _results(inst)
        if kind == "all-to-all" and len(operands) > 1 and inst.attribute("dimensions") is None:
            # One piece per peer: a single exchange whose pieces are operands.
            operands = [Array(operands[0].dtype, (len(operands), *operands[0].shape))]
            results = operands
        if len(operands) != len(results):
            raise HloError(
                f"collective {inst.name!r} has {len(operands)} operands but {len(results)} results;"
                " this form is not known here"
            )
        if kind == "all-reduce" and len(operands) == 1:
            operands = results = self._joined(comp, inst) or operands
        groups, reducer = self._groups(inst), self._reducer(inst)
        for i, (operand, result) in enumerate(zip(operands, results, strict=True)):
            op_name = inst.op_name
            if not op_name and len(operands) > 1:
                op_name = _element_op_name(comp, inst.name, i)
            yield Collective(
                kind=kind,
                instruction=inst.name,
                computation=comp.name,
                dtype=operand.dtype,
                result_dtype=result.dtype,
                operand_shape=operand.shape,
                result_shape=result.shape,
                operand_bytes=operand.nbytes,
                result_bytes=result.nbytes,
                groups=groups,
                reduction=reducer.root.opcode if reducer else None,
                trip_count=at.times,
                op_name=op_name,
                written_as=_primitive(op_name, reducer),
                fused=at.fused,
                conditional=at.conditional,
                operand_index=i,
                operand_count=len(operands),
            )

    def _joined(self, comp: Computation, inst: Instruction) -> list[Array]:
        """The operands of an all-reduce that the GPU compiler laid one behind the other, each as a
        row, to send them at once; none if it did not."""
        source = _through(comp, inst.operands[0], ("bitcast",))
        if source.opcode == "fusion":
            comp = self.module.computations[source.called("calls")[0]]
            source = comp.root
        if source.opcode != "concatenate" or source.op_name or len(inst.arrays[0].shape) != 1:
            return []
        return [arrays(comp.shape(name))[0] for name in source.operands]

    def _scatter_fusion(
        self, comp: Computation, inst: Instruction, inner: Computation, at: _Context
    ) -> list[Collective]:
        """Reads a TPU fusion "all-reduce, then my slice of it" as the reduce-scatter it executes;
        of several operands as so many combined. Empty for any other.

        The emitter sends only what a reduce-scatter sends. It may pad the scattered dim so that
        the pieces are whole tiles; ``result_shape`` is the logical one, and the compiler then adds
        collective-permutes that shift the uneven pieces into place.
        """
        root = inner.root
        slices = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
        if inst.opcode != "fusion" or any(s.opcode != "dynamic-slice" for s in slices):
            return []
        plain = ("bitcast", "copy", "convert", "reshape")
        taken = [_through(inner, s.operands[0], plain) for s in slices]
        reduces = {_through(inner, t.name, (*plain, "get-tuple-element")).name for t in taken}
        reduce = inner.by_name[next(iter(reduces))]
        if len(reduces) > 1 or reduce.opcode != "all-reduce":
            return []
        if len(reduce.operands) != len(slices):
            return []
        read = list(self._collective("reduce-scatter", inner, reduce, replace(at, fused=True)))
        found = []
        for i, (part, piece) in enumerate(zip(taken, slices, strict=True)):
            k = part.integers("index")[0] if part.opcode == "get-tuple-element" else 0
            source = _through(inner, reduce.operands[k], ("pad",))
            operand, sliced = source.arrays[0], piece.arrays[0]
            if source.name != reduce.operands[k]:
                width = len(read[k].groups[0])
                sizes = zip(operand.shape, reduce.arrays[k].shape, sliced.shape, strict=True)
                shape = (n // width if big != small else n for n, big, small in sizes)
                sliced = Array(operand.dtype, tuple(shape))
            op_name = inst.op_name
            if len(slices) > 1:
                op_name = _element_op_name(comp, inst.name, i) or op_name
            found.append(
                replace(
                    read[k],
                    instruction=inst.name,
                    computation=comp.name,
                    dtype=operand.dtype,
                    result_dtype=sliced.dtype,
                    operand_shape=operand.shape,
                    result_shape=sliced.shape,
                    operand_bytes=operand.nbytes,
                    result_bytes=sliced.nbytes,
                    op_name=op_name or read[k].op_name,
                    operand_index=i,
                )
            )
        return found

    def _groups(self, inst: Instruction) -> tuple[tuple[int, ...], ...]:
        text = inst.attribute("source_target_pairs") or inst.attribute("replica_groups")
        if text is None:
            raise HloError(f"collective {inst.name!r} names no replica groups")
        return parse_groups(text, self.module.devices)

    def _reducer(self, inst: Instruction) -> Computation | None:
        names = inst.called("to_apply")
        return self.module.computations[names[0]] if names else None


def _collective_kind(opcode: str) -> str | None:
    """The kind of a collective that starts here; its ``-done`` half is not a second one."""
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def _kernel(comp: Computation, inst: Instruction, target: str, at: _Context) -> Kernel:
    body = _BODY.search(inst.rest)
    return Kernel(
        name=re.sub(r"\.\d+$", "", inst.name) if body else target,
        instruction=inst.name,
        computation=comp.name,
        operand_bytes=tuple(arrays(comp.shape(name))[0].nbytes for name in inst.operands),
        result_bytes=tuple(a.nbytes for a in inst.arrays),
        trip_count=at.times,
        op_name=inst.op_name,
        conditional=at.conditional,
        body=body[1] if body else "",
    )


def _results(inst: Instruction) -> list[Array]:
    """The arrays a collective gives, whichever tuple its asynchronous form wraps them in."""
    if not inst.opcode.endswith("-start") or inst.opcode == "all-reduce-start":
        return list(inst.arrays)
    return list(arrays(elements(inst.shape)[1]))  # (operands, results, context...)


def _through(comp: Computation, name: str, opcodes: tuple[str, ...]) -> Instruction:
    """The instruction behind a chain of these opcodes."""
    inst = comp.by_name[name]
    while inst.opcode in opcodes:
        inst = comp.by_name[inst.operands[0]]
    return inst


def _element_op_name(comp: Computation, name: str, index: int) -> str:
    """The metadata of a combined collective's result ``index``, kept where it is taken out."""
    for inst in comp.instructions:
        taken = inst.opcode == "get-tuple-element" and inst.operands[0] == name
        if taken and inst.integers("index") == (index,):
            return inst.op_name
    return ""


def _primitive(op_name: str, reducer: Computation | None) -> str | None:
    """The JAX primitive in the metadata, or else in the reducer's: XLA keeps that one when it
    rewrites the instruction."""
    names = [op_name]
    if reducer is not None:
        names += [inst.op_name for inst in reducer.instructions if inst.opcode == "parameter"]
        names += [inst.name for inst in reducer.instructions if inst.opcode == "parameter"]
    for name in names:
        if found := _PRIMITIVE.findall(name.rsplit("/", 1)[-1]):
            return found[-1]
    return None


def axes_of(
    groups: tuple[tuple[int, ...], ...],
    mesh_sizes: tuple[int, ...],
    device_ids: tuple[int, ...] | None = None,
) -> tuple[int, ...] | None:
    """The mesh axes that replica groups vary over.

    Args:
        groups: the ids of each group.
        mesh_sizes: sizes of the mesh axes, first axis slowest.
        device_ids: the id at each flattened mesh position. In an SPMD program ids *are* positions
            (whatever the physical order of the chips), which None stands for.

    Returns:
        Ascending axis numbers, ``()`` for groups of one; None if no set of axes gives just these
        groups.
    """
    where = _coordinates(groups, mesh_sizes, device_ids)
    if where is None or len(where) != math.prod(mesh_sizes):
        return None
    axes = _varying(groups, where, len(mesh_sizes))
    # Disjoint groups as wide as their axes' positions are all of these positions.
    width = math.prod(mesh_sizes[axis] for axis in axes)
    if any(len(set(group)) != width for group in groups) or sum(map(len, groups)) != len(where):
        return None
    return axes


def axes_of_pairs(
    pairs: tuple[tuple[int, ...], ...],
    mesh_sizes: tuple[int, ...],
    device_ids: tuple[int, ...] | None = None,
) -> tuple[int, ...] | None:
    """The mesh axes along which any (source, target) pair of a permute differs; as ``axes_of``."""
    where = _coordinates(pairs, mesh_sizes, device_ids)
    return None if where is None else _varying(pairs, where, len(mesh_sizes))


def _coordinates(
    groups: tuple[tuple[int, ...], ...],
    mesh_sizes: tuple[int, ...],
    device_ids: tuple[int, ...] | None,
) -> dict[int, list[int]] | None:
    ids = range(math.prod(mesh_sizes)) if device_ids is None else device_ids
    position = {device: i for i, device in enumerate(ids)}
    members = {d for group in groups for d in group}
    if any(d not in position for d in members):
        return None
    order = sorted(members)
    coords = np.stack(np.unravel_index([position[d] for d in order], mesh_sizes), axis=1)
    return dict(zip(order, coords.tolist(), strict=True))


def _varying(
    groups: tuple[tuple[int, ...], ...], where: Mapping[int, list[int]], rank: int
) -> tuple[int, ...]:
    return tuple(
        axis
        for axis in range(rank)
        if any(where[d][axis] != where[group[0]][axis] for group in groups for d in group)
    )
