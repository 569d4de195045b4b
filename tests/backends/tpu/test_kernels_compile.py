"""Kernels under the real TPU compiler, which needs no TPU."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import gpt
from neocc.backends import chip
from neocc.backends.target import lower_for_target
from neocc.backends.tpu import BACKEND, collectives, products
from neocc.backends.tpu.compile import compile_for_tpu, tpu_topology
from neocc.ir.mesh import Mesh
from neocc.lower.collectives import Move, axis_groups
from neocc.lower.hlo import read_hlo
from neocc.passes.layout.rules import experts
from neocc.passes.plan import make_plan

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.tpu_compiler,
]
KERNEL = 'custom_call_target="tpu_custom_call"'
NAMES = ("x", "y", "z")


def text_of(name: str, sizes: tuple[int, ...], f: Any, *arrays: tuple[Any, str]) -> str:
    """The HLO of ``f`` of whole arrays on each device of a slice."""
    slice_name, devices = tpu_topology(name, sizes)
    assert slice_name in ("v5e:2x4", "v5p:2x2x2")
    mesh = jax.sharding.Mesh(devices, NAMES[: len(sizes)])
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    whole = NamedSharding(mesh, P())
    shapes = [jax.ShapeDtypeStruct(s, d, sharding=whole) for s, d in arrays]
    return compile_for_tpu(jax.jit(mapped), shapes).as_text() or ""


def every(n: int, axis: str, piece: tuple[int, ...], dtype: str) -> tuple[Any, list[Any]]:
    """All kernels in one program, and its arrays."""
    groups = axis_groups(axis, (n,))
    floats = dtype in products.FLOATS
    rows, k = piece[-2:]
    spec = "ab,bc->ac"

    def f(x: Any, pieces: Any, wide: Any, w: Any) -> Any:
        found = [
            collectives.run("all_gather", x, groups, Move(0)),
            collectives.run("reduce_scatter", pieces, groups, Move(0)),
            collectives.run("all_reduce", x, groups, Move(reduction="max")),
        ]
        if floats:
            found.append(products.gather_product(spec, wide[:rows], w, "a", groups[0]))
            found.append(products.scatter_product(spec, wide, w, "a", groups[0]))
        return found

    arrays = [piece, (n * piece[0], *piece[1:]), (n * rows, k), (k, 2 * k)]
    return f, [(shape, dtype) for shape in arrays]


CASES = [("v5e", (2, 4)), ("v5p", (2, 2, 2))]


def check(name: str, sizes: tuple[int, ...], piece: tuple[int, ...], dtype: str) -> None:
    f, arrays = every(sizes[-1], NAMES[len(sizes) - 1], piece, dtype)
    text = text_of(name, sizes, f, *arrays)
    assert text.count(KERNEL) == (6 if dtype in products.FLOATS else 4)  # an all-reduce is two
    assert not any(k in text for k in ("all-gather(", "all-reduce(", "collective-permute"))


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_every_kernel_compiles_for_a_slice(name: str, sizes: tuple[int, ...]) -> None:
    check(name, sizes, (3, 70), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("piece", [(5, 7), (2, 3, 1600), (8, 2048, 1600), (4096, 8192)])
def test_every_kernel_compiles_for_large_and_uneven_shapes(
    name: str, sizes: tuple[int, ...], dtype: str, piece: tuple[int, ...]
) -> None:
    """Up to some 100 MB a device, where the chip's own memory is 128 and a kernel has 16."""
    check(name, sizes, piece, dtype)


def test_a_training_step_with_kernels_forced_compiles_for_a_slice() -> None:
    """A kernel for each gather and scatter of the plan, two for each all-reduce, and no other."""
    mesh = Mesh.parse("2x4")
    (fsdp,) = (e.rules for e in experts(mesh) if e.name == "FSDP")
    config = replace(gpt.PRESETS["tiny"], batch=8)
    plan = make_plan(gpt.train_step(config), mesh, chip("v5e"), rules=fsdp)
    kinds = {kind for kind, _ in BACKEND.forms}
    here = Counter(op.kind for op in plan.partitioned.program.body.walk() if op.kind in kinds)
    assert set(here) == kinds
    lowered = lower_for_target(plan, dict.fromkeys(kinds, "dma"))
    compiled = BACKEND.compile(lowered.stage, BACKEND.compiler_options())
    text = compiled.as_text() or ""
    assert text.count(KERNEL) == here.total() + here["all_reduce"]
    assert read_hlo(text).collectives == ()
