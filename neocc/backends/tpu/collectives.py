"""The ring collectives of a TPU's own: remote DMAs in one kernel, for any shape.

An all-gather sends blocks as they lie in memory. A reduce-scatter and an all-reduce add, and adding
goes in whole tiles: a piece whose last dim is not whole lanes, or whose rows are not whole tiles,
is padded with zeros inside, which costs a copy. Dtypes of 1, 2 and 4 bytes; two bytes are added in
float32, one in int32, and rounded or wrapped each time, as the permutes of
``neocc.lower.collectives.rings`` do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from neocc.backends.tpu import rings
from neocc.backends.tpu.blocks import as_matrices, from_matrices, matrix_of
from neocc.backends.tpu.ring import ways_round
from neocc.cost.algorithms import FORMULAS, KERNEL_DTYPES, KERNEL_RING
from neocc.ir.errors import LayoutError
from neocc.ir.mesh import Mesh
from neocc.ir.program import Op
from neocc.ir.types import DTYPES
from neocc.lower.collectives import COMBINE, Algorithm, Group, Groups, Move, grids
from neocc.lower.kernels import Call, messages

DMA = "dma"
NAMES = (*(DTYPES[name].name for name in KERNEL_DTYPES), "int8", "uint8")


def refused(dtype: Any, group: Group) -> str | None:
    """Why a ring of a TPU's own does not take an array, if so; then one of permutes does."""
    if jnp.dtype(dtype).name not in NAMES:
        return f"{jnp.dtype(dtype).name} is not among {', '.join(NAMES)}"
    if group.size > KERNEL_RING:
        return f"a ring of {group.size} devices; kernels are for at most {KERNEL_RING}"
    return None


def collective_number(group: Group) -> int:
    """Of the barrier that kernels along one mesh axis share: kernels that meet other neighbours
    need another one."""
    return jax.sharding.get_abstract_mesh().axis_names.index(group.axis)


def checked(x: Any, group: Group) -> None:
    reason = refused(x.dtype, group)
    if reason:
        raise LayoutError(reason)


def _differentiable(
    run: Callable[..., Any], back: Callable[..., Any]
) -> Callable[[Any, Group, Move, int], Any]:
    """``run(x, group, move, ways)`` whose gradient is ``back(x, group, move, ways, dout)``."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
    def f(x: Any, group: Group, move: Move, ways: int) -> Any:
        checked(x, group)
        return x if group.size == 1 else run(x, group, move, ways)

    def forward(x: Any, group: Group, move: Move, ways: int) -> Any:
        return f(x, group, move, ways), x

    def backward(group: Group, move: Move, ways: int, x: Any, dout: Any) -> Any:
        return (dout if group.size == 1 else back(x, group, move, ways, dout),)

    f.defvjp(forward, backward)
    return f


def _gather(x: Any, group: Group, move: Move, ways: int) -> Any:
    return grids.merge(rings.gather(x, group, ways, collective_number(group)), move.at, 1)


def _scatter(x: Any, group: Group, move: Move, ways: int) -> Any:
    pieces = grids.split(x, move.at, (group.size,))
    return rings.scatter(pieces, group, ways, collective_number(group), COMBINE[move.reduction])


def _reduce(x: Any, group: Group, move: Move, ways: int) -> Any:
    number, n = collective_number(group), group.size
    rows, columns = piece = reduced_piece(x.shape, x.dtype, n)
    pieces = as_matrices(x, 0, (n * rows, columns)).reshape(n, *piece)
    mine = rings.scatter(pieces, group, ways, number, COMBINE[move.reduction])
    whole = rings.gather(mine, group, ways, number).reshape(-1, columns)
    return from_matrices(whole, 0, x.shape)


def reduced_piece(shape: tuple[int, ...], dtype: Any, n: int) -> tuple[int, int]:
    """What each of ``n`` devices sums of an all-reduce, as a matrix."""
    columns = matrix_of(shape, dtype).shape[1]
    rows = -(-math.prod(shape) // columns)
    return matrix_of((-(-rows // n), columns), dtype).shape


def _by_permutes(form: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the same in permutes, where it is more than a sum's."""

    def back(x: Any, group: Group, move: Move, ways: int, dout: Any) -> Any:
        _, pull = jax.vjp(lambda v: form(v, (group,), move, ways), x)
        return pull(dout)[0]

    return back


def _scatter_permutes(x: Any, groups: Groups, move: Move, ways: int) -> Any:
    return grids.reduce_scatter(x, groups, move.at, COMBINE[move.reduction], ways)


def _reduce_permutes(x: Any, groups: Groups, move: Move, ways: int) -> Any:
    return grids.all_reduce(x, groups, COMBINE[move.reduction], ways)


def _gather_back(x: Any, group: Group, move: Move, ways: int, dout: Any) -> Any:
    return _scatter(dout, group, Move(move.at), ways)


def _scatter_back(x: Any, group: Group, move: Move, ways: int, dout: Any) -> Any:
    if move.reduction != "sum":
        return _by_permutes(_scatter_permutes)(x, group, move, ways, dout)
    return _gather(dout, group, move, ways)


def _reduce_back(x: Any, group: Group, move: Move, ways: int, dout: Any) -> Any:
    if move.reduction != "sum":
        return _by_permutes(_reduce_permutes)(x, group, move, ways, dout)
    return _reduce(dout, group, move, ways)


RUN = {
    "all_gather": _differentiable(_gather, _gather_back),
    "reduce_scatter": _differentiable(_scatter, _scatter_back),
    "all_reduce": _differentiable(_reduce, _reduce_back),
}


def run(kind: str, x: Any, groups: Groups, move: Move, ways: int = 2) -> Any:
    """A collective of ``neocc.lower.collectives`` on one ring.

    Raises:
        LayoutError: what ``refused`` says.
    """
    (group,) = groups
    return RUN[kind](x, group, move, ways)


FORMS = {(kind, DMA): Algorithm(FORMULAS[kind, DMA], functools.partial(run, kind)) for kind in RUN}
"""In place of the same algorithms made of permutes."""


def calls(op: Op, mesh: Mesh) -> list[Call]:
    """The kernels that a collective of a plan runs as."""
    if op.attrs.get("algorithm") != DMA:
        return []
    before, after = (v.type.local_shape(mesh) for v in (op.operands[0], op.result))
    dtype, axis = DTYPES[op.result.type.dtype], op.attrs["axis"]
    n = mesh.sizes[mesh.index(axis)]
    if not math.prod(before):
        return []

    def call(kind: str, piece: tuple[int, ...]) -> Call:
        one = math.prod(piece) * dtype.itemsize
        rounds = FORMULAS[kind, DMA].rounds(n * math.prod(piece), dtype.itemsize, (n,))
        sent = tuple(messages(rounds, (n,), mesh, axis))
        if kind == "all_gather":
            return Call(rings.GATHER, (one,), (n * one,), sent)
        landing = 2 * len(ways_round(n, 2)) * one
        return Call(rings.SCATTER, (n * one,), (one, landing), sent)

    if op.kind == "all_gather":
        return [call("all_gather", before)]
    piece = (
        matrix_of(after, dtype).shape
        if op.kind == "reduce_scatter"
        else reduced_piece(before, dtype, n)
    )
    made = [call("reduce_scatter", piece)]
    return [*made, call("all_gather", piece)] if op.kind == "all_reduce" else made
