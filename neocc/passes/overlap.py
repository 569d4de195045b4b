"""Layouts that are good with their collectives inside products, tried beside the best one.

A layout is solved for with collectives that run by themselves. One that gathers and scatters
activations, which nothing hides, may be slower so, and faster with its collectives inside products.
"""

from __future__ import annotations

from dataclasses import replace

from neocc.ir.errors import NeoccError
from neocc.passes.layout.rules import tensor_parallel
from neocc.passes.plan import Plan, costed, laid_out


def overlapped(plan: Plan) -> Plan:
    """The fastest of a plan and of tensor parallel ones on the same mesh and wires, where
    collectives may run inside products; a layout that was asked for is kept. The bound of what is
    returned is the plan's: of steps without."""
    ready = replace(plan.ready, products=True)
    if plan.given or not ready.cost.collectives.products:
        return plan
    best = costed(ready, plan.problem, plan.solution, plan.memory, plan.memory_limit)
    best = replace(best, saved=plan.saved)
    if ready.layout or not plan.fits:
        return best
    for way in tensor_parallel(plan.mesh):
        try:
            other = laid_out(ready, way.rules, plan.memory_limit)
        except NeoccError:  # the mesh does not cut the model so
            continue
        if other.fits and other.timeline.step < best.timeline.step:
            best = replace(other, solution=replace(other.solution, bound=plan.solution.bound))
    return best
