"""Random legal layout decisions: not what a solver would choose, but what must be right too."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.program import Program, Region, Value
from neocc.ir.types import TensorType
from neocc.passes.layout.algebra import (
    Assignment,
    Boundary,
    Through,
    layouts,
    op_layouts,
    strategies,
)

Choose = Callable[[Sequence[Any]], Any]


def reachable(source: Layout, target: Layout) -> bool:
    """Every reshard is possible, except that nothing makes a whole value partial again."""
    return all(
        not isinstance(t, Partial) or s == t for s, t in zip(source.axes, target.axes, strict=True)
    )


def random_assignment(program: Program, mesh: Mesh, choose: Choose) -> Assignment:
    """A legal decision for everything; ``choose`` picks one of a list."""
    assignment = Assignment({}, {})

    def whole_layout(type: TensorType) -> Layout:
        return choose(list(layouts(type, mesh)))

    def region(body: Region, args: list[Layout], outputs: dict[int, Layout], nested: bool) -> None:
        """Decides a region whose argument and some of whose output layouts are given."""
        made: dict[Value, Layout] = dict(zip(body.args, args, strict=True))
        for op in body.ops:
            if op.kind == "repeat":
                inner, carries = op.regions[0], op.attrs["carries"]
                entering = [whole_layout(v.type) for v in inner.args]
                region(inner, entering, dict(enumerate(entering[:carries])), True)
                results = assignment.boundaries[inner].outputs
            else:
                legal = []
                for s in strategies(op, mesh):
                    wanted = op_layouts(op, s)[0]
                    pairs = zip(op.operands, wanted, strict=True)
                    if all(reachable(made[v], layout) for v, layout in pairs):
                        legal.append(s)
                # Few strategies pass partial sums on; take them often.
                through = [s for s in legal if any(isinstance(c, Through) for c in s.axes)]
                strategy = choose(through if through and choose([True, False]) else legal)
                assignment.strategies[op] = strategy
                results = op_layouts(op, strategy)[1]
            made.update(zip(op.results, results, strict=True))
        ends = []
        for i, value in enumerate(body.outputs):
            if i in outputs:
                ends.append(outputs[i])
                continue
            options = [
                o for o in layouts(value.type, mesh, partial=nested) if reachable(made[value], o)
            ]
            partial = [o for o in options if o.partial_axes]
            ends.append(choose(partial if partial and choose([True, False]) else options))
        assignment.boundaries[body] = Boundary(tuple(args), tuple(ends))

    names = [i.name for i in program.inputs]
    args = [whole_layout(v.type) for v in program.body.args]
    replaced = {i: args[names.index(o)] for i, o in enumerate(program.outputs) if o in names}
    region(program.body, args, replaced, False)
    return assignment


def drawn(data: st.DataObject) -> Choose:
    """Choices that hypothesis makes, and so can shrink."""
    return lambda options: options[data.draw(st.integers(0, len(options) - 1))]


def seeded(seed: int) -> Choose:
    return random.Random(seed).choice
