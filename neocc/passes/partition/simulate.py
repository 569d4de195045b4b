"""Run a partitioned program in NumPy on virtual devices, all in one process.

A value is one array with an axis per mesh axis in front of the block's own: element (i, j, ...)
of those is the block of device (i, j, ...). A front axis has size 1 where every device along it
holds the same block, so a replicated value costs no more than an unpartitioned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neocc.ir.errors import IRError, LayoutError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import COLLECTIVES, HOST_MOVES, OPS, Context
from neocc.ir.ops.base import Ring
from neocc.ir.program import Op, Region, Value
from neocc.ir.types import DTYPES, TensorType
from neocc.passes.layout.algebra import Strategy
from neocc.passes.partition.apply import Partitioned

Watch = Callable[[Op, Value, np.ndarray], None]
REDUCE: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def simulate(
    partitioned: Partitioned, inputs: Mapping[str, np.ndarray], watch: Watch | None = None
) -> dict[str, np.ndarray]:
    """Outputs by name, whole, from whole inputs by name.

    ``watch(op, value, array)`` sees each result of each op, once per step of a repeat, as
    the whole tensor, terms of a partial one reduced.

    Raises:
        IRError: an input is missing or has the wrong shape.
        LayoutError: devices that should hold the same block hold different ones, or a block has
            the wrong shape.
    """
    program = partitioned.program
    devices = Devices(partitioned.mesh, watch)
    args = []
    for info, value in program.named_inputs:
        if info.name not in inputs:
            raise IRError(f"program {program.name!r} needs the input {info.name!r}")
        array = np.asarray(inputs[info.name])
        if array.shape != value.type.shape:
            raise IRError(f"input {info.name!r} has shape {array.shape}, not {value.type.shape}")
        args.append(devices.shard(array, value.type))
    outs = devices.region(program.body, args)
    return {
        name: devices.assemble(array, value.type)
        for name, array, value in zip(program.outputs, outs, program.body.outputs, strict=True)
    }


def placed(type: TensorType) -> Layout:
    if type.layout is None:
        raise LayoutError(f"{type} has no layout; apply an assignment first")
    return type.layout


@dataclass(frozen=True)
class Devices:
    """The virtual devices of a mesh."""

    mesh: Mesh
    watch: Watch | None = None

    def region(self, region: Region, args: Sequence[np.ndarray]) -> list[np.ndarray]:
        env = dict(zip(region.args, args, strict=True))
        for op in region.ops:
            operands = [env[v] for v in op.operands]
            for value, array in zip(op.results, self.run(op, operands), strict=True):
                env[value] = self.settled(op, value, array)
                if self.watch:
                    self.watch(op, value, self.assemble(env[value], value.type))
        return [env[v] for v in region.outputs]

    def run(self, op: Op, operands: list[np.ndarray]) -> list[np.ndarray]:
        if op.kind == "repeat":
            return self.repeat(op, operands)
        if op.kind in COLLECTIVES:
            return [self.collective(op, operands[0])]
        strategy: Strategy = op.attrs["strategy"]
        ctx = Context(
            np,
            len(self.mesh),
            lambda name, size: self.block(strategy, name, size),
            ring=lambda name: self.ring(strategy, name),
        )
        with np.errstate(all="ignore"):  # infinities and NaN are values like any other
            return OPS[op.kind].evaluate(op, operands, ctx)

    def settled(self, op: Op, value: Value, array: np.ndarray) -> np.ndarray:
        """The array with front axis 1 wherever it is replicated, which is checked."""
        layout = placed(value.type)
        shape = value.type.local_shape(self.mesh, layout)
        if array.shape[len(self.mesh) :] != shape:
            raise LayoutError(f"{op!r} makes blocks of shape {array.shape}, not {shape}", op.loc)
        for axis, place in enumerate(layout.axes):
            if place is None and array.shape[axis] > 1:
                first = array.take([0], axis)
                same = array == first
                if array.dtype.kind not in "iub":
                    same |= (array != array) & (first != first)
                if not same.all():
                    name = self.mesh.names[axis]
                    raise LayoutError(f"{op!r}: replicas along {name!r} differ", op.loc)
                array = first
        return array

    def block(self, strategy: Strategy, name: str, size: int) -> tuple[int, Any]:
        """Local size and first global index of an iteration dim (see ``Context.block``)."""
        axes = [i for i, choice in enumerate(strategy.axes) if choice == name]
        local = size // math.prod(self.mesh.sizes[i] for i in axes)
        number: Any = 0
        for i in axes:
            count = self.mesh.sizes[i]
            here = np.arange(count, dtype=np.int32)
            number = number * count + here.reshape(self.front(i, count))
        return local, number * local

    def ring(self, strategy: Strategy, name: str) -> Ring | None:
        """The devices of the axis that cuts an iteration dim."""
        if name not in strategy.axes:
            return None
        axis = strategy.axes.index(name)
        size = self.mesh.sizes[axis]

        def permute(x: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
            source = [s for s, _ in sorted(pairs, key=lambda pair: pair[1])]
            return self.along(x, axis).take(source, axis)

        return Ring(size, np.arange(size, dtype=np.int32).reshape(self.front(axis, size)), permute)

    def front(self, axis: int, size: int) -> tuple[int, ...]:
        return (1,) * axis + (size,) + (1,) * (len(self.mesh) - axis - 1)

    def repeat(self, op: Op, operands: list[np.ndarray]) -> list[np.ndarray]:
        carries, stacked, dim = op.attrs["carries"], op.attrs["stacked"], op.attrs["dim"]
        lead = len(self.mesh)
        region = op.regions[0]
        carry, consts = operands[:carries], operands[carries + stacked :]
        stacks = []
        for v, x in zip(op.operands[carries:], operands[carries:][:stacked], strict=False):
            stacks.append(np.moveaxis(x, lead + v.type.names.index(dim.name), 0))
        steps = range(dim.size)
        slices: list[list[np.ndarray]] = [[] for _ in op.results[carries:]]
        for i in reversed(steps) if op.attrs["reverse"] else steps:
            out = self.region(region, [*carry, *(s[i] for s in stacks), *consts])
            carry = out[:carries]
            for made, x in zip(slices, out[carries:], strict=True):
                made.append(x)
        results = list(carry)
        for value, made in zip(op.results[carries:], slices, strict=True):
            made = made[::-1] if op.attrs["reverse"] else made
            if made:
                results.append(np.stack(np.broadcast_arrays(*made), axis=lead))
            else:
                shape = (1,) * lead + value.type.local_shape(self.mesh)
                results.append(np.zeros(shape, DTYPES[value.type.dtype]))
        return results

    def collective(self, op: Op, x: np.ndarray) -> np.ndarray:
        type, kind = op.operands[0].type, op.kind
        if kind in HOST_MOVES:
            return x
        axis = self.mesh.index(op.attrs["axis"])
        if kind in ("all_reduce", "reduce_scatter"):
            x = self.reduce(x, axis, op.attrs["reduction"])
        if kind in ("all_gather", "all_to_all"):
            x = self.gather(x, axis, type.names.index(op.attrs["dim"]))
        if kind in ("local_slice", "reduce_scatter", "all_to_all"):
            dim = op.attrs["to"] if kind == "all_to_all" else op.attrs["dim"]
            x = self.scatter(x, axis, type.names.index(dim))
        return x

    def along(self, x: np.ndarray, axis: int) -> np.ndarray:
        """``x`` with a block for each device along a mesh axis."""
        shape = (*x.shape[:axis], self.mesh.sizes[axis], *x.shape[axis + 1 :])
        return np.broadcast_to(x, shape)

    def reduce(self, x: np.ndarray, axis: int, reduction: str) -> np.ndarray:
        return (
            REDUCE[reduction]
            .reduce(self.along(x, axis), axis=axis, keepdims=True)
            .astype(x.dtype, copy=False)
        )

    def gather(self, x: np.ndarray, axis: int, dim: int) -> np.ndarray:
        """Joins the blocks of tensor dim number ``dim`` along a mesh axis."""
        at = len(self.mesh) + dim
        count = self.mesh.sizes[axis]
        x = np.moveaxis(self.along(x, axis), axis, at - 1)  # right before the dim's own axis
        x = x.reshape((*x.shape[: at - 1], count * x.shape[at], *x.shape[at + 1 :]))
        return np.expand_dims(x, axis)

    def scatter(self, x: np.ndarray, axis: int, dim: int) -> np.ndarray:
        """Gives each device along a mesh axis its block of a tensor dim, which all hold."""
        at = len(self.mesh) + dim
        count = self.mesh.sizes[axis]
        if x.shape[axis] != 1:
            raise LayoutError(f"slice along {self.mesh.names[axis]!r}: replicas differ")
        x = x.reshape((*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :]))
        return np.moveaxis(np.squeeze(x, axis), at - 1, axis)

    def shard(self, array: np.ndarray, type: TensorType) -> np.ndarray:
        """The blocks of a whole tensor."""
        x = np.asarray(array).reshape((1,) * len(self.mesh) + array.shape)
        for axis, place in enumerate(placed(type).axes):
            if isinstance(place, Partial):
                raise LayoutError(f"an input cannot be partial: {type}")
            if place is not None:
                x = self.scatter(x, axis, type.names.index(place))
        return x

    def assemble(self, x: np.ndarray, type: TensorType) -> np.ndarray:
        """The whole tensor from its blocks, terms of a partial one reduced."""
        for axis, place in reversed(list(enumerate(placed(type).axes))):
            if isinstance(place, Partial):
                x = self.reduce(x, axis, place.op)
            elif place is not None:
                x = self.gather(x, axis, type.names.index(place))
        return x.reshape(type.shape)
