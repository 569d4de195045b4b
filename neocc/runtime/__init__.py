"""What the commands do: compile a model, train it, and read plans back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neocc.runtime.checkpoint import (
    Checkpoint,
    ModelOf,
    is_checkpoint,
    leftovers,
    read_checkpoint,
    whole,
    write_checkpoint,
    write_shards,
)
from neocc.runtime.checkpoint import gather as gather_tensors
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
from neocc.runtime.safetensors import CheckpointError, Planned, Produce, Stored, read_header
from neocc.runtime.sweep import Row, frontier

if TYPE_CHECKING:
    from neocc.runtime.choose import Choice
    from neocc.runtime.evaluate import Piece, Scorer
    from neocc.runtime.evaluate import windows as text_windows
    from neocc.runtime.generate import Sampler

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Choice",
    "Compared",
    "Compilation",
    "ModelOf",
    "ModelSource",
    "Piece",
    "PlanFile",
    "Planned",
    "Produce",
    "Remedy",
    "Row",
    "Sampler",
    "Scorer",
    "Stored",
    "Timing",
    "compile_model",
    "frontier",
    "gather_tensors",
    "is_checkpoint",
    "leftovers",
    "plan_document",
    "read_checkpoint",
    "read_header",
    "read_plan",
    "rival_plan",
    "text_windows",
    "whole",
    "write_checkpoint",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    """What runs models brings JAX, which takes a second to import: only its users wait for it."""
    if name == "Choice":
        from neocc.runtime.choose import Choice

        return Choice
    if name in ("Piece", "Scorer", "text_windows"):
        from neocc.runtime import evaluate

        return getattr(evaluate, name.removeprefix("text_"))
    if name == "Sampler":
        from neocc.runtime.generate import Sampler

        return Sampler
    raise AttributeError(f"module 'neocc.runtime' has no attribute {name!r}")
