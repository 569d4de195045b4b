"""Lower a partitioned program to JAX: one function under ``shard_map``, every collective explicit.

Each op runs under the named scope ``neocc.<kind>.<id>`` with the id of the partitioned program,
so that the ``op_name`` of an HLO instruction names the line of the plan that it comes from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from neocc.cost.algorithms import PRODUCTS, formula
from neocc.cost.rounds import factors
from neocc.ir.errors import IRError, LayoutError
from neocc.ir.mesh import Mesh, Partial
from neocc.ir.ops import COLLECTIVES, HOST_MOVES, OPS, Context
from neocc.ir.ops.attention import ring_axis
from neocc.ir.ops.base import Ring
from neocc.ir.ops.contraction import einsum_spec
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.reference import scan_repeat
from neocc.ir.types import DTYPES, TensorType
from neocc.lower.collectives import ALGORITHMS, Algorithm, Move, axis_groups
from neocc.lower.collectives.products import Factor, Term, gather_products, scatter_products
from neocc.passes.layout.algebra import Strategy
from neocc.passes.layout.liveness import last_use, materialised
from neocc.passes.partition import Partitioned
from neocc.passes.partition.apply import marked
from neocc.passes.partition.groups import Group, groups_of, schedule, together

REDUCE = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}
# An op on a device's own blocks, as ``OpDef.evaluate``; None where it does not take them.
Kernel = Callable[[Op, list[Any], Context], list[Any] | None]
NONE: Mapping[Any, Any] = MappingProxyType({})


def jax_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A JAX mesh of the same axes over ``devices`` in order (default: the first of this process);
    a topology's deviceless ones do.

    Raises:
        LayoutError: there are too few devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < mesh.size:
        raise LayoutError(f"mesh {mesh} needs {mesh.size} devices; there are {len(devices)}")
    return jax.sharding.Mesh(np.array(devices[: mesh.size]).reshape(mesh.sizes), mesh.names)


def partition_spec(type: TensorType, mesh: Mesh) -> PartitionSpec:
    """A whole (not partial) layout in JAX's form: per dim the axes that cut it, outermost first."""
    layout = type.layout
    if layout is None or any(isinstance(p, Partial) for p in layout.axes):
        raise LayoutError(f"{type} is not laid out whole; a program's edges must be")
    cuts = (tuple(mesh.names[i] for i in layout.cuts(name)) for name in type.names)
    return PartitionSpec(*(c[0] if len(c) == 1 else c or None for c in cuts))


@dataclass(frozen=True)
class Lowered:
    """A partitioned program as a JAX function of its inputs, in order, to a tuple of outputs.

    An input that an output replaces is donated.
    """

    partitioned: Partitioned
    mesh: jax.sharding.Mesh
    function: Any  # jax.jit(...), with shardings and donation

    @property
    def in_shardings(self) -> tuple[NamedSharding, ...]:
        return shardings(self.partitioned, self.mesh, self.partitioned.program.body.args)

    @property
    def out_shardings(self) -> tuple[NamedSharding, ...]:
        return shardings(self.partitioned, self.mesh, self.partitioned.program.body.outputs)

    def shape_structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes, dtypes and shardings of the inputs: enough to lower with no arrays."""
        values = self.partitioned.program.body.args
        return tuple(
            jax.ShapeDtypeStruct(v.type.shape, DTYPES[v.type.dtype], sharding=s)
            for v, s in zip(values, self.in_shardings, strict=True)
        )

    @functools.cached_property
    def stage(self) -> jax.stages.Lowered:
        return self.function.lower(*self.shape_structs())

    def stablehlo(self) -> str:
        return self.stage.as_text(debug_info=True)

    def compile(self, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """Compiles for the mesh's devices, which need not be attached."""
        return self.stage.compile(compiler_options=dict(options) if options else None)

    def place(self, inputs: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        """Inputs by name as arrays on the mesh, in the program's order.

        Raises:
            IRError: one is missing, or has another shape or dtype.
        """
        arrays = []
        program = self.partitioned.program
        for (info, value), sharding in zip(program.named_inputs, self.in_shardings, strict=True):
            if info.name not in inputs:
                raise IRError(f"program {program.name!r} needs the input {info.name!r}")
            array = inputs[info.name]
            dtype = DTYPES[value.type.dtype]
            if (np.shape(array), array.dtype) != (value.type.shape, dtype):
                raise IRError(
                    f"input {info.name!r} is {array.dtype}{list(np.shape(array))}; the program "
                    f"takes {dtype}{list(value.type.shape)}"
                )
            if isinstance(array, np.ndarray) and not sharding.is_fully_addressable:
                # Every process has the whole; to put it, JAX would compare them all.
                array = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            arrays.append(jax.device_put(array, sharding))
        return tuple(arrays)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Outputs by name from inputs by name. Donated inputs that lie on the mesh already are
        used up.

        Raises:
            IRError: an input does not fit, or one array is given for a donated input and another.
        """
        program = self.partitioned.program
        arrays = self.place(inputs)
        seen: dict[int, str] = {}
        for info, array in zip(program.inputs, arrays, strict=True):
            other = seen.setdefault(id(array), info.name)
            if other != info.name and {other, info.name} & set(program.outputs):
                raise IRError(
                    f"inputs {other!r} and {info.name!r} are one array, which the program "
                    "overwrites; copy it"
                )
        return dict(zip(program.outputs, self.function(*arrays), strict=True))


def shardings(
    partitioned: Partitioned, mesh: jax.sharding.Mesh, values: Sequence[Value]
) -> tuple[NamedSharding, ...]:
    return tuple(NamedSharding(mesh, partition_spec(v.type, partitioned.mesh)) for v in values)


def lower(
    partitioned: Partitioned,
    mesh: jax.sharding.Mesh | None = None,
    algorithms: Mapping[str, str] | None = None,
    kernels: Mapping[str, Kernel] = NONE,
    forms: Mapping[tuple[str, str], Algorithm] = NONE,
) -> Lowered:
    """The program as a function under ``shard_map`` on ``mesh`` (default: this process's
    devices).

    ``algorithms``: per kind of collective the one of ``neocc.lower.collectives`` that runs it on
    every axis, in place of XLA's own, wherever it can: a lossy one sums of floats alone,
    ``products`` what has products beside it. ``kernels`` and
    ``forms``: how the mesh's kind of device computes kinds of ops and runs algorithms by itself
    (``neocc.backends.base.Backend``).

    Raises:
        LayoutError: the JAX mesh is not of the program's axes and sizes.
        IRError: the program computes in f64 and JAX's 64-bit mode is off; or there is no such
            algorithm.
    """
    program = partitioned.program
    known_algorithms = {**ALGORITHMS, **forms}
    for key in (algorithms or {}).items():
        if key not in known_algorithms:
            known = ", ".join(f"{kind}={name}" for kind, name in known_algorithms)
            raise IRError(f"there is no algorithm {key[0]}={key[1]}; there are {known}")
    mesh = jax_mesh(partitioned.mesh) if mesh is None else mesh
    if tuple(mesh.shape.items()) != partitioned.mesh.axes:
        raise LayoutError(f"the program is for the mesh {partitioned.mesh}, not for {mesh}")
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    if any(v.type.dtype == "f64" for v in program.values()) and not x64:
        raise IRError("the program computes in f64; set jax_enable_x64")

    platform = mesh.devices.flat[0].platform
    program = forced(partitioned, algorithms or {})
    device = Device(
        partitioned.mesh, platform == "tpu", platform != "cpu", known_algorithms, kernels
    )

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(device.region(program.body, args))

    replaced = tuple(i for i, x in enumerate(program.inputs) if x.name in program.outputs)
    ins = shardings(partitioned, mesh, program.body.args)
    outs = shardings(partitioned, mesh, program.body.outputs)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(s.spec for s in ins),
        out_specs=tuple(s.spec for s in outs),
        check_vma=False,
    )
    mapped.__name__ = program.name  # the compiled module is called after it
    # The plan says what runs in every step (a weight that all layers share, gathered at use). XLA
    # would hoist it and hold the result through the whole loop; it drops optimization barriers
    # before it does, so that pass is turned off where it would matter.
    hoists = any(repeats_communication(op) for op in program.body.walk() if op.kind == "repeat")
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if hoists else None
    function = jax.jit(
        mapped,
        in_shardings=ins,
        out_shardings=outs,
        donate_argnums=replaced,
        compiler_options=options,
    )
    return Lowered(partitioned, mesh, function)


@dataclass(frozen=True)
class Device:
    """What each device of the mesh runs; traced once for all of them."""

    mesh: Mesh
    rounds: bool  # casts that may keep excess precision
    accelerator: bool  # it has memory of its own beside its host's
    algorithms: Mapping[tuple[str, str], Algorithm]  # by kind and name
    kernels: Mapping[str, Kernel]  # of kinds of ops, in place of what they mean in JAX; of an
    # op that a plan has run by one, attention=splash

    def region(self, region: Region, args: Sequence[Any]) -> list[Any]:
        env = dict(zip(region.args, args, strict=True))
        passing = passing_over(region)
        for op in ordered(region):
            operands = [env[v] for v in op.operands]
            if isinstance(op, Group):
                env.update(zip(op.results, self.group(op, env), strict=True))
                continue
            with jax.named_scope(f"neocc.{op.kind}.{op.attrs['id']}"):
                if op.kind == "repeat":
                    waits = (*operands, *(env[v] for v in passing[op]))
                    operands = list(lax.optimization_barrier(waits))[: len(operands)]
                results = self.run(op, operands)
            env.update(zip(op.results, results, strict=True))
        return [env[v] for v in region.outputs]

    def group(self, group: Group, env: Mapping[Value, Any]) -> list[Any]:
        """A collective and its products as one: ``neocc.lower.collectives.products``."""
        op = group.collective
        size = self.mesh.sizes[self.mesh.index(op.attrs["axis"])]
        (ring,) = axis_groups(op.attrs["axis"], (size,))
        with jax.named_scope(f"neocc.{op.kind}.{op.attrs['id']}"):
            if group.gathers:
                factors = [factor(p, op, env) for p in group.products]
                whole, made = gather_products(env[op.operands[0]], factors, ring, whole=group.whole)
                return [whole, *made]
            return [scatter_products([term(p, op, env) for p in group.products], ring)]

    def run(self, op: Op, operands: list[Any]) -> list[Any]:
        if op.kind == "repeat":
            return scan_repeat(op, operands, self.region)
        if op.kind in COLLECTIVES:
            return [self.collective(op, operands[0])]
        strategy: Strategy = op.attrs["strategy"]
        ctx = Context(
            jnp,
            0,
            lambda name, size: self.block(strategy, name, size),
            self.rounds,
            lambda name: self.ring(strategy, name),
        )
        ring = ring_axis(op, strategy) is not None or "zigzag" in op.attrs
        name = f"{op.kind}={op.attrs['kernel']}" if "kernel" in op.attrs else op.kind
        kernel = None if ring else self.kernels.get(name)
        made = kernel(op, operands, ctx) if kernel else None
        return OPS[op.kind].evaluate(op, operands, ctx) if made is None else made

    def block(self, strategy: Strategy, name: str, size: int) -> tuple[int, Any]:
        """Local size and first global index (i32) of an iteration dim (see ``Context.block``)."""
        axes = [i for i, choice in enumerate(strategy.axes) if choice == name]
        local = size // math.prod(self.mesh.sizes[i] for i in axes)
        number: Any = 0
        for i in axes:
            number = number * self.mesh.sizes[i] + lax.axis_index(self.mesh.names[i])
        return local, number * local

    def ring(self, strategy: Strategy, name: str) -> Ring | None:
        """The devices of the axis that cuts an iteration dim."""
        if name not in strategy.axes:
            return None
        axis, size = self.mesh.axes[strategy.axes.index(name)]
        return Ring(size, lax.axis_index(axis), lambda x, pairs: lax.ppermute(x, axis, pairs))

    def collective(self, op: Op, x: Any) -> Any:
        type, attrs = op.operands[0].type, op.attrs
        if op.kind in HOST_MOVES:
            space = jax.memory.Space.Host if op.kind == "to_host" else jax.memory.Space.Device
            return jax.device_put(x, space) if self.accelerator else x
        axis = attrs["axis"]
        if x.size == 0:  # nothing to move, and XLA refuses to gather it
            return jnp.zeros(op.result.type.local_shape(self.mesh), x.dtype)
        if "algorithm" in attrs:
            dim, to = (type.names.index(attrs[n]) if n in attrs else 0 for n in ("dim", "to"))
            move = Move(dim, to, attrs.get("reduction", "sum"))
            return self.algorithms[op.kind, attrs["algorithm"]](x, axis, attrs["grid"], move)
        if op.kind == "all_reduce":
            return REDUCE[attrs["reduction"]](x, axis)
        at = type.names.index(attrs["dim"])
        if op.kind == "all_gather":
            return lax.all_gather(x, axis, axis=at, tiled=True)
        if op.kind == "reduce_scatter":
            return lax.psum_scatter(x, axis, scatter_dimension=at, tiled=True)
        if op.kind == "all_to_all":
            to = type.names.index(attrs["to"])
            return lax.all_to_all(x, axis, split_axis=to, concat_axis=at, tiled=True)
        local = x.shape[at] // self.mesh.sizes[self.mesh.index(axis)]
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * local, local, at)


def forced(partitioned: Partitioned, algorithms: Mapping[str, str]) -> Program:
    """The program with every collective of a kind by one algorithm, where it can run by that and
    has no other already."""
    mesh, inside = partitioned.mesh, {k for k, name in algorithms.items() if name == PRODUCTS}
    grouped = {
        g.collective
        for region in (partitioned.program.body, *regions_of(partitioned.program.body))
        for g in together(region, inside, groups_of(region))
    }

    def attrs(op: Op) -> Mapping[str, object]:
        name = algorithms.get(op.kind)
        if name is None or "algorithm" in op.attrs or (op.kind in inside and op not in grouped):
            return {}
        f, type = formula(op.kind, name), op.operands[0].type
        if not f.takes(type.dtype, op.attrs.get("reduction", "sum")):
            return {}
        size = mesh.sizes[mesh.index(op.attrs["axis"])]
        return {"algorithm": name, "grid": factors(size, f.rings[0])}

    return marked(partitioned.program, attrs) if algorithms else partitioned.program


def regions_of(region: Region) -> list[Region]:
    inner = [r for op in region.ops for r in op.regions]
    return [*inner, *(r for one in inner for r in regions_of(one))]


def ordered(region: Region) -> list[Op | Group]:
    """The steps of a region: each collective inside products with them."""
    found = schedule(region, groups_of(region))
    if found is None:
        raise IRError("no order of a region runs all that it has inside products")
    return found


def factor(product: Op, gather: Op, env: Mapping[Value, Any]) -> Factor:
    a, b = product.operands
    gathered, other = (a, b) if a is gather.result else (b, a)
    spec, letter = einsum_spec((gathered.type, other.type), product.result.type)
    dtype = DTYPES[product.result.type.dtype]
    return Factor(spec, env[other], letter[gather.attrs["dim"]], dtype)


def term(product: Op, scatter: Op, env: Mapping[Value, Any]) -> Term:
    a, b = product.operands
    spec, letter = einsum_spec((a.type, b.type), product.result.type)
    dtype = DTYPES[product.result.type.dtype]
    return Term(spec, env[a], env[b], letter[scatter.attrs["dim"]], dtype)


def passing_over(region: Region) -> dict[Op, list[Value]]:
    """Per repeat, what products, scatters and collectives before it made for later ops.

    XLA's scheduler would put a product that only the optimizer reads (the gradient of the
    vocabulary's matrix) behind the backward loop, and hold its operands, the logits, through all
    of it. So the loop waits for these, as the plan's order says: a step of gpt2-xl on v5e 8x8
    peaks at 2.27 GB and not 3.17.
    """
    last = last_use(region, materialised(region))
    found: dict[Op, list[Value]] = {}
    made: list[Value] = []
    for i, op in enumerate(region.ops):
        if op.kind == "repeat":
            found[op] = [v for v in made if last.get(v, -1) > i and v not in op.operands]
        elif op.kind in COLLECTIVES or op.kind in ("einsum", "scatter_add"):
            made += op.results
    return found


def repeats_communication(op: Op) -> bool:
    """Whether a repeat's region has communication that does the same in every step."""
    (region,) = op.regions
    same = set(region.args[op.attrs["carries"] + op.attrs["stacked"] :])
    for inner in region.ops:
        if same.issuperset(inner.operands):
            same.update(inner.results)
            nested = (o for r in inner.regions for o in r.walk())
            if {o.kind for o in (inner, *nested)} & (COLLECTIVES - {"local_slice"}):
                return True
    return False
