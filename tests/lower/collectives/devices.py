"""Programs of a mesh without devices: ``vmap`` binds the axes, and permutes are gathers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from neocc.lower.collectives import Groups, axis_groups, mesh_groups

QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
NAMES = ("x", "y", "z")


def mapped(f: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """``f`` of blocks as a function of arrays with an axis per mesh axis in front."""
    for name in reversed(NAMES[:axes]):
        f = jax.vmap(f, axis_name=name)
    return f


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled with little effort."""
    return jax.jit(f, compiler_options=QUICK)


def on_devices(f: Callable[..., Any], axes: int, *arrays: Any) -> Any:
    """What every device's ``f`` gives."""
    return quick(mapped(f, axes))(*arrays)


def along(x: np.ndarray, mesh: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """[*mesh, ...] to [others, n, ...]: the devices of some axes in order, of the others apart."""
    others = [i for i in range(len(mesh)) if i not in axes]
    x = np.moveaxis(x, [*others, *axes], range(len(mesh)))
    n = math.prod(mesh[i] for i in axes)
    return x.reshape(-1, n, *x.shape[len(mesh) :])


def splits(n: int, count: int) -> list[tuple[int, ...]]:
    """Every way to write ``n`` as ``count`` factors."""
    if count == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in splits(n // d, count - 1)]


@st.composite
def grids_on_meshes(
    draw: st.DrawFn, rings: tuple[int, int], most: int
) -> tuple[tuple[int, ...], tuple[int, ...], Groups]:
    """A mesh of 1 to 3 axes and up to ``most`` devices, the axes that a collective runs over, and
    these as a grid of ``rings``: whole axes, or the factors of one."""
    mesh: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        left = most // math.prod(mesh)
        mesh.append(draw(st.integers(1, min(16, left))))
    least, top = rings
    many = [k for k in range(least, min(top, len(mesh)) + 1) if k > 1]
    if many and draw(st.booleans()):
        count = draw(st.sampled_from(many))
        axes = tuple(sorted(draw(st.permutations(range(len(mesh))))[:count]))
        groups = mesh_groups([(NAMES[i], mesh[i]) for i in axes])
    else:
        axis = draw(st.integers(0, len(mesh) - 1))
        count = draw(st.integers(least, min(top, 3)))
        axes = (axis,)
        groups = axis_groups(NAMES[axis], draw(st.sampled_from(splits(mesh[axis], count))))
    return tuple(mesh), axes, groups


def permutes(jaxpr: Any) -> Iterator[Any]:
    """Every ppermute of a traced function, also in the functions that it calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from permutes(inner)
