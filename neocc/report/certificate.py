"""What a plan's proof says, and what it does not."""

from __future__ import annotations

from neocc.passes.layout.solve import Solution

MODEL = "roofline at local shapes, alpha-beta collectives over the rings, overlap by region"
SPACE = (
    "strategies from iteration spaces, one per fused cluster; products read whole operands; "
    "single-axis reshards; repeats' dims uncut; one schedule; recomputation as the model says"
)
PROVED = 1e-6  # a gap, as a share of the step, that counts as none


def verdict(solution: Solution) -> str:
    """``optimal``, or how far from it the plan can be."""
    if solution.gap <= PROVED:
        return "proved optimal"
    return f"within {100 * solution.gap:.2g} % of the optimum"
