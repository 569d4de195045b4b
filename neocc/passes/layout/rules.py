"""What a user's layout, or an expert's plan, allows: constraints on the layout problem.

A layout in Mesh TensorFlow's syntax, ``batch:x,heads:y``, says of each mesh axis that it names
which dims it cuts: these, wherever they occur, and no others. Axes that it does not name are the
solver's. One dim may be given several axes (``batch:x,batch:y``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.ops import OPS
from neocc.ir.ops.base import SEQUENTIAL
from neocc.ir.ops.shape import acted_on
from neocc.ir.program import Input, Op, Program, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import Choice, Strategy, Through
from neocc.passes.layout.problem import Rules

JOINS = ("split", "merge", "slice", "concat", "pad", "reorder")
PADDING_ALLOWED = 0.01  # a dim may grow by this share, unasked, to divide by more axes


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def parse_layout(text: str, program: Program, mesh: Mesh) -> dict[int, tuple[str, ...]]:
    """Mesh axis index -> the dims it cuts, from ``dim:axis,dim:axis``; an axis of size 1 cuts none.

    Two dims of one axis may meet in a tensor only where one of them is that of experts
    (``parallel_weights``) and the tensor is no weight: there the plan says which the axis cuts.

    Raises:
        LayoutError: a rule is not ``dim:axis``, names an unknown dim or axis, or two of an
            axis' dims meet in one tensor.
    """
    dims = program.dims
    found: dict[int, tuple[str, ...]] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        dim, colon, axis = (p.strip() for p in part.partition(":"))
        if not (dim and colon and axis):
            raise LayoutError(f"layout rule {part!r} is not of the form dim:axis")
        if dim not in dims:
            raise LayoutError(f"layout {part!r}: the model has no dim {dim!r}{nearest(dim, dims)}")
        if axis not in mesh.names:
            raise LayoutError(
                f"layout {part!r}: the mesh {mesh} has no axis {axis!r}{nearest(axis, mesh.names)}"
            )
        index = mesh.index(axis)
        found[index] = tuple(dict.fromkeys((*found.get(index, ()), dim)))
    weights = depending_on(program, "parameter") - depending_on(program, "data")
    apart = parallel_weights(program, weights)
    for index, names in found.items():
        for value in program.values():
            free = () if value in weights else apart
            both = [n for n in names if value.type.has(n) and n not in free]
            if len(both) > 1:
                raise LayoutError(
                    f"layout {text!r}: axis {mesh.names[index]!r} cuts both {both[0]!r} and "
                    f"{both[1]!r}, which meet in the tensor {value!r}; one axis cuts one dim of it"
                )
    return {index: names for index, names in found.items() if mesh.sizes[index] > 1}


def parallel_weights(program: Program, weights: Collection[Value]) -> frozenset[str]:
    """Dims along which a matrix product has a weight of its own for each index, so that product,
    weight and what it is multiplied by have it: those of experts."""
    found: set[str] = set()
    for op in program.body.walk():
        if op.kind == "einsum":
            a, b = op.operands
            if (a in weights) != (b in weights):
                found |= {*a.type.names} & {*b.type.names} & {*op.result.type.names}
    return frozenset(found)


def depending_on(program: Program, role: str) -> set[Value]:
    """The inputs of a role, and every value that depends on one."""
    found = {v for i, v in program.named_inputs if i.role == role}
    size = -1
    while size < len(found):
        size = len(found)
        for op in program.body.walk():
            for region in op.regions:
                found |= {a for v, a in zip(op.operands, region.args, strict=True) if v in found}
                ends = zip(op.results, region.outputs, strict=True)
                found |= {r for r, out in ends if out in found}
                around = zip(region.args[: op.attrs["carries"]], region.outputs, strict=False)
                found |= {arg for arg, out in around if out in found}
            if not op.regions and any(v in found for v in op.operands):
                found.update(op.results)
    return found


def padded_sizes(
    program: Program, mesh: Mesh, given: Mapping[int, tuple[str, ...]] | None = None
) -> dict[str, int]:
    """Sizes that dims grow to so that they divide: for a given layout as far as it needs; else to
    a multiple of as many devices as cost at most ``PADDING_ALLOWED`` more. Dims that an op splits
    or joins grow only where the layout asks."""
    repeated = {op.attrs["dim"].name for op in program.body.walk() if op.kind == "repeat"}
    joined = {n for op in program.body.walk() if op.kind in JOINS for n in acted_on(op)}
    products = {1}
    for size in mesh.sizes:
        products |= {p * size for p in products}
    found: dict[str, int] = {}
    for dim in program.dims.values():
        if dim.name in repeated or dim.size == 0:
            continue
        axes = [i for i, names in (given or {}).items() if dim.name in names]
        forced = math.prod(mesh.sizes[i] for i in axes)
        for parts in [forced] if dim.name in joined else sorted(products, reverse=True):
            padded = -(-dim.size // parts) * parts
            if padded % forced == 0 and padded - dim.size <= PADDING_ALLOWED * dim.size:
                break
        else:
            padded = -(-dim.size // forced) * forced
        if padded != dim.size:
            found[dim.name] = padded
    return found


def cuttable(op: Op) -> frozenset[str]:
    """Dims that an axis may cut; of one element (a decode step's seq) there is nothing to cut."""
    space = OPS[op.kind].space(op)
    return frozenset(i.name for i in space.iters if i.kind != SEQUENTIAL and i.size != 1)


def given_layout(given: Mapping[int, tuple[str, ...]]) -> Rules:
    """The rules of a parsed layout."""

    def strategy(op: Op, s: Strategy) -> bool:
        if op.kind == "iota":  # which each reader has as it likes
            return True
        along = dict(OPS[op.kind].space(op).along)
        dims = cuttable(op) | {*along.values()}
        for axis, names in given.items():
            others = {n for a, some in given.items() if a != axis for n in some}
            # A ring cuts another dim too, which no other axis may; naming that asks for it as well.
            here = [n for n in names if n in dims and along.get(n) not in others]
            choice = s.axes[axis]
            if here and choice not in here and along.get(str(choice)) not in here:
                return False
            if not here and isinstance(choice, str):
                return False
        return True

    def rings(op: Op) -> bool:
        around = {name for name, _ in OPS[op.kind].space(op).along}
        return any(n in around for names in given.values() for n in names)

    def stored(info: Input, type: TensorType, layout: Layout) -> bool:
        return all(
            layout.axes[axis] == next((n for n in names if type.has(n)), None)
            for axis, names in given.items()
        )

    return Rules(strategy, stored, rings=rings)


@dataclass(frozen=True)
class Expert:
    """A plan that an expert would try: its name, and its rules on a mesh."""

    name: str
    rules: Rules


Wanted = Callable[[frozenset[str]], Choice]  # iteration dims of an op -> what the axis cuts


def prefer(*order: str) -> Wanted:
    return lambda dims: next((n for n in order if n in dims), None)


def per_axis(wanted: Mapping[int, Wanted]) -> Callable[[Op, Strategy], bool]:
    """Each axis cuts the dim that it wants of every op, or lets partial sums through, so that they
    are added before they are reduced; where it wants none, it is free."""

    def allowed(op: Op, s: Strategy) -> bool:
        dims = cuttable(op)
        wishes = ((s.axes[axis], want(dims)) for axis, want in wanted.items())
        return all(
            wish is None or choice == wish or isinstance(choice, Through) for choice, wish in wishes
        )

    return allowed


def tensor_parallel(mesh: Mesh) -> list[Expert]:
    """Megatron's way of cutting products and the sequence between them, on each axis with data
    parallel on the others; weights and state lie as is best. Its gathers and scatters of
    activations are those that products can hide."""
    axes = [i for i, size in enumerate(mesh.sizes) if size > 1]
    found = []
    for tensor in axes:
        wanted = {i: prefer("batch") for i in axes if i != tensor}
        wanted[tensor] = prefer("heads", "mlp", "expert_hidden", "vocab", "seq")
        rules = Rules(per_axis(wanted), lambda info, type, layout: True)
        found.append(Expert(f"tensor parallel on {mesh.names[tensor]}", rules))
    return found


def experts(mesh: Mesh, dims: Collection[str] = ()) -> list[Expert]:
    """Pure data parallel, FSDP (ZeRO-3), and Megatron's tensor + sequence parallel on each axis
    with data parallel on the others; where a program with these ``dims`` has a mixture of experts,
    GShard's, cut on each axis, with FSDP for the rest. In the dim names of models/gpt.py."""
    axes = [i for i, size in enumerate(mesh.sizes) if size > 1]
    data = per_axis({i: prefer("batch") for i in axes})

    def only_batch(op: Op, s: Strategy) -> bool:
        """Cuts the batch and nothing else: each device updates every weight."""
        return data(op, s) and all(c == "batch" for c in s.axes if isinstance(c, str))

    def replicated(info: Input, type: TensorType, layout: Layout) -> bool:
        return info.role == "data" or not layout.dims

    def sharded(info: Input, type: TensorType, layout: Layout) -> bool:
        if info.role == "data" or not type.dims:
            return True
        uncut = math.prod(mesh.sizes[i] for i in axes if layout.axes[i] is None)
        # A tensor too small to cut further stays as it is.
        return uncut == 1 or type.size // (mesh.size // uncut) < 1024 * uncut

    found = [
        Expert("data parallel", Rules(only_batch, replicated)),
        Expert("FSDP", Rules(data, sharded)),
    ]
    for tensor in axes:
        wanted = {i: prefer("batch") for i in axes if i != tensor}
        wanted[tensor] = prefer("heads", "mlp", "expert_hidden", "vocab", "seq")

        def megatron(info: Input, type: TensorType, layout: Layout, axis: int = tensor) -> bool:
            if info.role != "parameter":
                return True
            cut = ("heads", "mlp", "expert_hidden", "vocab")
            want = next((n for n in cut if type.has(n)), None)
            others = all(layout.axes[i] is None for i in axes if i != axis)
            return others and layout.axes[axis] == want

        name = f"Megatron on {mesh.names[tensor]}"
        found.append(Expert(name, Rules(per_axis(wanted), megatron)))
    for axis in axes if "expert_hidden" in dims else ():
        wanted = {i: prefer("batch") for i in axes}
        wanted[axis] = lambda dims: prefer("experts" if "expert_hidden" in dims else "batch")(dims)

        def gshard(info: Input, type: TensorType, layout: Layout, axis: int = axis) -> bool:
            mine = type.has("expert_hidden")
            return layout.axes[axis] == "experts" if mine else sharded(info, type, layout)

        found.append(Expert(f"GShard on {mesh.names[axis]}", Rules(per_axis(wanted), gshard)))
    return found
