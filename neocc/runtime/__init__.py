"""What the commands do: compile a model, train it, and read plans back."""

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

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Compared",
    "Compilation",
    "ModelOf",
    "ModelSource",
    "PlanFile",
    "Planned",
    "Produce",
    "Remedy",
    "Row",
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
    "whole",
    "write_checkpoint",
    "write_shards",
]
