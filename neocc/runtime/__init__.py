"""What the commands do: compile a model, train it, and read plans back."""

from neocc.runtime.compilation import (
    Compared,
    Compilation,
    Remedy,
    Timing,
    compile_model,
    rival_plan,
)
from neocc.runtime.plan_file import ModelSource, PlanFile
from neocc.runtime.plan_file import document as plan_document
from neocc.runtime.plan_file import read as read_plan
from neocc.runtime.sweep import Row, frontier

__all__ = [
    "Compared",
    "Compilation",
    "ModelSource",
    "PlanFile",
    "Remedy",
    "Row",
    "Timing",
    "compile_model",
    "frontier",
    "plan_document",
    "read_plan",
    "rival_plan",
]
