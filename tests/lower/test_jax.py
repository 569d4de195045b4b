"""Partitioned programs through shard_map: the same numbers, and the collectives of the plan."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from neocc.ir.builder import Graph, dot, exp, repeat
from neocc.ir.errors import IRError, LayoutError
from neocc.ir.mesh import Layout, Mesh
from neocc.ir.program import Program
from neocc.ir.types import Dim, TensorType
from neocc.lower.hlo import Collective, read_hlo
from neocc.lower.jax import Lowered, jax_mesh, lower, partition_spec, passing_over
from neocc.passes.layout.algebra import SUM, Assignment, Boundary, Strategy
from neocc.passes.partition import Partitioned, apply
from tests.numpy_executor import run_numpy
from tests.passes.partition.samples import block_program, moves_program
from tests.passes.partition.samples import inputs_for as sample_inputs
from tests.random_assignments import drawn, random_assignment, seeded
from tests.random_programs import assert_close, inputs_for, meshes, programs

QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
BATCH, EMBD, LAYERS = Dim("batch", 8), Dim("embd", 8), Dim("layers", 3)
EMBD2 = Dim("embd2", 8)
HLO = {"all_gather", "all_reduce", "reduce_scatter", "all_to_all"}


def run(partitioned: Partitioned, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    lowered = lower(partitioned)
    outputs = lowered.compile(QUICK)(*lowered.place(inputs))
    return dict(zip(partitioned.program.outputs, outputs, strict=True))


def check_random(data: st.DataObject, max_ops: int) -> None:
    # No dims of size 0: XLA makes every block of such an output the whole of it, and JAX then
    # fails to assemble them. The virtual devices take them.
    program = data.draw(programs(max_ops=max_ops))
    mesh = data.draw(meshes(big=False).filter(lambda m: m.size <= 8))
    partitioned = apply(program, mesh, random_assignment(program, mesh, drawn(data)))
    inputs = inputs_for(program, np.random.default_rng(0))
    outputs = run(partitioned, inputs)
    for name, array in run_numpy(program, inputs).items():
        assert_close(outputs[name], array)


@given(st.data())
@settings(max_examples=10)
def test_random_programs_and_layouts_on_host_devices(x64: None, data: st.DataObject) -> None:
    check_random(data, 6)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200)
def test_random_programs_and_layouts_on_host_devices_at_length(
    x64: None, data: st.DataObject
) -> None:
    check_random(data, 12)


@pytest.mark.parametrize("text", ["4", "2x4", "2x1x2"])
@pytest.mark.parametrize("make", [block_program, moves_program])
def test_a_language_model_and_index_ops_on_host_devices(x64: None, make, text: str) -> None:
    program, mesh = make(), Mesh.parse(text)
    inputs = sample_inputs(program)
    outputs = run(apply(program, mesh, random_assignment(program, mesh, seeded(1))), inputs)
    for name, array in run_numpy(program, inputs).items():
        assert_close(outputs[name], array)


def fsdp(shared: bool) -> Partitioned:
    """A repeat whose weight is gathered in every step; ``shared``: one weight for all steps."""
    g = Graph("fsdp")
    x = g.data("x", (BATCH, EMBD), "f32")
    wide = Dim("wide", 8)
    w = g.parameter("w", (EMBD, wide) if shared else (LAYERS, EMBD, wide), "f32")

    def body(x, stacked):
        y = exp(dot(x, w if shared else stacked["w"], "embd") * 0.1)
        return y.rename(wide="embd")

    program = g.build({"x": repeat(LAYERS, body, x, {} if shared else {"w": w})})
    region = next(op for op in program.body.ops if op.kind == "repeat").regions[0]
    rows, cut = Layout(("batch",)), Layout(("wide",))
    steps = {o: Strategy(("batch" if o.result.type.dims else None,)) for o in region.ops}
    boundary = Boundary((rows, cut), (rows,))
    decided = Assignment(steps, {program.body: boundary, region: boundary})
    return apply(program, Mesh.parse("4"), decided)


def scopes(text: str) -> set[tuple[str, int]]:
    found = re.findall(r"neocc\.(\w+)\.(\d+)/(?!neocc)", text)
    return {(kind, int(id)) for kind, id in found}


def test_every_collective_and_product_is_named_by_its_line_of_the_plan(x64: None) -> None:
    program, mesh = block_program(), Mesh.parse("2x2")
    partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(2)))
    planned = {
        (op.kind, op.attrs["id"])
        for op in partitioned.program.body.walk()
        if op.kind in HLO or op.kind == "einsum"
    }
    assert planned <= scopes(lower(partitioned).stablehlo())


@pytest.mark.parametrize("shared", [True, False])
def test_what_the_plan_gathers_in_a_loop_is_gathered_in_the_loop(shared: bool) -> None:
    partitioned = fsdp(shared)
    assert [(op.kind, n) for op, n in partitioned.collectives()] == [("all_gather", 3)]
    (gather,) = collectives(lower(partitioned))
    assert (gather.kind, gather.trip_count) == ("all-gather", 3)
    assert "neocc.all_gather." in gather.op_name


def collectives(lowered: Lowered) -> tuple[Collective, ...]:
    text = lowered.compile().as_text()
    assert text is not None
    return read_hlo(text).collectives


def test_inputs_that_outputs_replace_are_donated() -> None:
    lowered = lower(fsdp(shared=False))
    inputs = {n: np.ones(v.type.shape, np.float32) for n, v in named(lowered.partitioned.program)}
    x, w = lowered.place(inputs)
    (out,) = lowered.function(x, w)
    assert x.is_deleted() and not w.is_deleted()
    assert out.sharding == lowered.in_shardings[0] == lowered.out_shardings[0]


def named(program: Program) -> list:
    return [(i.name, v) for i, v in program.named_inputs]


def test_lowering_needs_no_arrays() -> None:
    lowered = lower(fsdp(shared=False))
    x, w = lowered.shape_structs()
    assert (x.shape, x.sharding.spec) == ((8, 8), P("x", None))
    assert (w.shape, w.sharding.spec) == ((3, 8, 8), P(None, None, "x"))
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None and analysis.alias_size_in_bytes == 8 * 8 * 4 // 4


def test_a_partition_spec_lists_axes_outermost_first() -> None:
    mesh = Mesh.parse("2x2x2")
    t = TensorType((BATCH, EMBD), "f32", Layout(("embd", None, "embd")))
    assert partition_spec(t, mesh) == P(None, ("x", "z"))
    with pytest.raises(LayoutError, match="laid out whole"):
        partition_spec(t.with_layout(Layout((SUM, None, None))), mesh)


def test_the_wrong_mesh_and_too_few_devices_are_refused() -> None:
    partitioned = fsdp(shared=False)
    with pytest.raises(LayoutError, match="for the mesh x:4"):
        lower(partitioned, jax_mesh(Mesh.parse("8")))
    with pytest.raises(LayoutError, match="needs 64 devices"):
        jax_mesh(Mesh.parse("8x8"))


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    lowered = lower(fsdp(shared=False))
    good = {n: np.ones(v.type.shape, np.float32) for n, v in named(lowered.partitioned.program)}
    with pytest.raises(IRError, match="needs the input 'w'"):
        lowered({"x": good["x"]})
    with pytest.raises(IRError, match="input 'w' is float64"):
        lowered(good | {"w": good["w"].astype(np.float64)})


def test_f64_without_64_bit_mode_is_refused() -> None:
    program, mesh = moves_program(), Mesh.parse("2")
    with pytest.raises(IRError, match="jax_enable_x64"):
        lower(apply(program, mesh, random_assignment(program, mesh, seeded(0))))


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("shared", [True, False])
def test_the_tpu_compiler_takes_it_with_no_tpu(shared: bool) -> None:
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    partitioned = fsdp(shared)
    (gather,) = collectives(lower(partitioned, jax_mesh(partitioned.mesh, devices)))
    assert (gather.kind, gather.trip_count) == ("all-gather", 3)


def test_a_loop_waits_for_products_that_only_later_ops_read() -> None:
    """Else XLA runs them behind the loop, and holds their operands through it."""
    g = Graph("waits")
    x = g.data("x", (BATCH, EMBD), "f32")
    w, later = g.parameter("w", (LAYERS, EMBD, EMBD2)), g.parameter("later", (EMBD, EMBD2))
    product = dot(x, later, "embd")
    looped = repeat(LAYERS, lambda h, wl: dot(exp(h), wl, "embd").rename(embd2="embd"), x, w)
    program = g.build({"y": looped, "z": exp(product)})
    mesh = Mesh.parse("1")
    partitioned = apply(program, mesh, random_assignment(program, mesh, seeded(0)))
    body = partitioned.program.body
    (loop,) = (op for op in body.ops if op.kind == "repeat")
    (held,) = passing_over(body)[loop]
    assert held.type.names == ("batch", "embd2")
    text = lower(partitioned).stablehlo()
    waits = re.search(r"optimization_barrier (.*?) :", text)
    assert waits is not None
    assert len(waits[1].split(",")) == len(loop.operands) + 1
