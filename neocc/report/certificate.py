"""What a plan's proof says, and what it does not."""

from __future__ import annotations

from neocc.passes.layout.within import PATIENCE
from neocc.passes.plan import Plan
from neocc.passes.search import Searched

MODEL = "roofline at local shapes, alpha-beta collectives over the rings, overlap by region"
SPACE = (
    "strategies from iteration spaces, one per fused cluster; products read whole operands; "
    "single-axis reshards; repeats' dims uncut; products kept or recomputed one by one where the "
    "model leaves it open; one schedule"
)
PROVED = 1e-6  # a gap, as a share of the step, that counts as none


def verdict(plan: Plan) -> str:
    """``proved optimal``, or how far from it the plan can be, or what is proved of all plans."""
    if plan.given:
        return "as given: nothing is proved of it"
    if not plan.fits:
        return f"no layout fits whose step is within {PATIENCE:g} times the fastest one's"
    apart = " of plans whose collectives run by themselves" if plan.overlaps else ""
    if plan.solution.gap <= PROVED:
        return f"proved optimal{apart}" + (", some then put inside products" if apart else "")
    return f"within {100 * plan.solution.gap:.2g} % of the optimum{apart}"


def outer(searched: Searched) -> str:
    """What the outer search went through, and what it proves."""
    meshes = dict.fromkeys(t.mesh for t in searched.tried)
    most = max((t.microbatches for t in searched.tried), default=1)
    what = (
        f"{len(meshes)} mesh{'es' if len(meshes) > 1 else ''}, axes in ascending order, on every "
    )
    what += f"mapping onto the wires, with 1 to {most} microbatches" if most > 1 else "mapping"
    if searched.gap <= PROVED:
        return f"{what}: none is faster"
    return f"{what}: none is faster by more than {gap_text(searched.gap)}"


def gap_text(gap: float) -> str:
    """A gap in per cent; what rounding leaves of none is none."""
    return f"{100 * gap:.2g} %" if gap > 1e-12 else "0 %"
