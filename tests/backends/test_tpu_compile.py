"""The real TPU compiler, run without a TPU."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neocc.backends.base import memory_facts
from neocc.backends.tpu import compile as tpu
from neocc.backends.tpu.compile import (
    ONE_FOR_ONE,
    TpuCompileError,
    compile_for_tpu,
    tpu_devices,
    tpu_topology,
)
from neocc.cost.hardware import HardwareError, chip
from neocc.cost.mappings import mappings
from neocc.lower.hlo import axes_of, axes_of_pairs, read_hlo

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_a_missing_compiler_is_named_with_its_cure(monkeypatch) -> None:
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TpuCompileError, match=r"pip install 'neocc\[tpu\]'"):
        tpu_topology("v5e", (4, 4))


def test_what_is_no_tpu_or_needs_several_slices_is_refused() -> None:
    with pytest.raises(TpuCompileError, match="h100 is not a TPU"):
        tpu_topology("h100", (8,))
    with pytest.raises(HardwareError, match="v5p"):
        tpu_topology("v5pp", (8,))
    with pytest.raises(TpuCompileError, match="mesh 32x32 needs 4 slices of v5e"):
        tpu_topology("v5e", (32, 32))


@needs_libtpu
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("chip", "sizes", "name"),
    [
        ("v5e", (8, 16), "v5e:8x16"),
        ("v5p", (8, 16), "v5p:4x4x8"),
        ("v6e", (16, 16), "v6e:16x16"),
        ("v4", (8, 16), "v4:4x4x8"),
        ("v3", (8, 16), "v3:8x8"),
        ("tpu7x", (4, 4), "tpu7x:2x2x2"),
        ("v5e", (1,), "v5e:1x1"),
        ("v5p", (4, 2, 2), "v5p:2x2x4"),
        ("v5e", (3, 3), "v5e:3x3"),
    ],
)
def test_a_mesh_gets_each_device_of_a_slice_once(chip, sizes, name) -> None:
    found, devices = tpu_topology(chip, sizes)
    assert found == name
    assert devices.shape == sizes
    places = {(*device.coords, device.core_on_chip) for device in devices.flat}
    assert len(places) == math.prod(sizes)


@needs_libtpu
@pytest.mark.tpu_compiler
def test_neighbours_on_a_mesh_axis_that_has_a_ring_are_joined_by_a_wire() -> None:
    _, devices = tpu_topology("v5p", (8, 16))
    for row in range(7):
        a, b = devices[row, 3].coords, devices[row + 1, 3].coords
        assert sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 1


@needs_libtpu
@pytest.mark.tpu_compiler
def test_each_mapping_of_a_mesh_is_built_as_it_was_costed() -> None:
    """Along a mesh axis that lies on one torus axis, neighbours are `stride` chips apart on it."""
    seen = set()
    for laid in mappings(chip("v5p"), (8, 16)):
        name, devices = tpu_devices(laid)
        assert name == "v5p:4x4x8"
        assert devices.shape == (8, 16)
        places = [tuple(device.coords) for device in devices.flat]
        assert len(set(places)) == 128
        seen.add(tuple(places))
        for parts, (a, b) in zip(
            laid.parts, [(devices[0, 0], devices[1, 0]), (devices[0, 0], devices[0, 1])],
            strict=True,
        ):  # fmt: skip
            innermost = parts[-1]
            apart = [abs(i - j) for i, j in zip(a.coords, b.coords, strict=True)]
            assert apart == [innermost.stride * (axis == innermost.axis) for axis in (1, 2, 3)]
    assert len(seen) > 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(tpu_topology("v5p", (4, 4))[1], ("x", "y"))


def compiled(mesh: Mesh, function, args, specs, out_specs, **options):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(args, specs, strict=True)
    ]
    return compile_for_tpu(jax.jit(mapped), shapes, **options)


def step(x, up, down, small):
    """A scan over layers, gathered and scattered by hand, and every other kind of collective."""

    def layer(x, weights):
        up, down = weights
        up = lax.all_gather(up, "x", axis=0, tiled=True)
        down = lax.all_gather(down, "x", axis=1, tiled=True)
        whole = lax.all_gather(x, "y", axis=1, tiled=True)
        out = jnp.tanh(whole @ up) @ down
        return x + lax.psum_scatter(out, "y", scatter_dimension=1, tiled=True), None

    y, _ = lax.scan(layer, x, (up, down))
    moved = lax.all_to_all(y, "x", split_axis=1, concat_axis=0, tiled=True)
    moved = lax.ppermute(moved, "y", [(i, (i + 1) % 4) for i in range(4)])
    sums = lax.psum(small, "x"), lax.psum(small * small, "x"), lax.psum(small.sum(), ("x", "y"))
    return y, moved, sums, lax.pmax(small, "y")


@needs_libtpu
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("options", [{}, ONE_FOR_ONE], ids=["default", "one for one"])
def test_collectives_and_flops_come_out_as_written(mesh, options) -> None:
    batch, embd, mlp, layers = 1024, 2048, 4096, 5
    specs = (P("x", "y"), P(None, "x", "y"), P(None, "y", "x"), P())
    bf16 = jnp.bfloat16
    shapes = [((batch, embd), bf16), ((layers, embd, mlp), bf16), ((layers, mlp, embd), bf16)]
    program = compiled(
        mesh,
        step,
        [*shapes, ((16, 128), jnp.float32)],
        specs,
        (P("x", "y"), P("x", "y"), P(), P()),
        compiler_options=options,
    )
    text = program.as_text()
    assert text is not None
    hlo = read_hlo(text)
    found = Counter()
    for c in hlo.collectives:
        where = axes_of_pairs if c.kind == "collective-permute" else axes_of
        found[c.kind, where(c.groups, (4, 4)), c.operand_bytes, c.trip_count] += 1
    assert found == {
        ("all-gather", (0,), embd // 4 * mlp // 4 * 2, layers): 2,
        ("all-gather", (1,), batch // 4 * embd // 4 * 2, layers): 1,
        ("reduce-scatter", (1,), batch // 4 * embd * 2, layers): 1,
        ("all-to-all", (0,), batch // 4 * embd // 4 * 2, 1): 1,
        ("collective-permute", (1,), batch // 4 * embd // 4 * 2, 1): 1,
        ("all-reduce", (0,), 16 * 128 * 4, 1): 2,
        ("all-reduce", (0, 1), 4, 1): 1,
        ("all-reduce", (1,), 16 * 128 * 4, 1): 1,
    }
    combined = max(c.operand_count for c in hlo.collectives)
    assert combined == (1 if options else 2)
    assert hlo.flops == layers * 2 * 2 * (batch // 4) * embd * (mlp // 4)
    assert hlo.estimated_cycles > 0 and not hlo.unknown_loops


@needs_libtpu
@pytest.mark.tpu_compiler
def test_memory_counts_arguments_outputs_and_donation(mesh) -> None:
    size = 4 * 2**20
    shape = ((size // 4,), jnp.float32)
    program = compiled(mesh, lambda a, b: a + b, [shape, shape], (P(), P()), P())
    memory = memory_facts(program)
    assert (memory.argument, memory.output, memory.alias) == (2 * size, size, 0)
    assert memory.peak == 3 * size + memory.temp


@needs_libtpu
@pytest.mark.tpu_compiler
def test_a_program_that_does_not_fit_says_so(mesh) -> None:
    shape = ((50 * 2**28,), jnp.float32)  # 50 GiB each: two in, one out, no temporary
    with pytest.raises(TpuCompileError, match=r"does not fit: needs 150\.00G of 95\.\d+G HBM"):
        compiled(mesh, lambda a, b: a + b, [shape, shape], (P(), P()), P())


@needs_libtpu
@pytest.mark.tpu_compiler
def test_an_unknown_compiler_option_is_an_error(mesh) -> None:
    with pytest.raises(TpuCompileError, match="xla_tpu_no_such_option"):
        compiled(
            mesh,
            lambda a: a + 1,
            [((8,), jnp.float32)],
            (P(),),
            P(),
            compiler_options={"xla_tpu_no_such_option": 1},
        )
