"""The programs on which the cost model is held against the TPU compiler.

Models, meshes, layouts and chips that people use, at the depth they have it (a loop compiles once);
batches are such that most need gigabytes of a device, since what lies in on-chip memory is not
HBM. A few small ones stay in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models import gpt
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.passes.layout.problem import Rules
from neocc.passes.layout.rules import experts

MEGATRON = "batch:x,heads:y,mlp:y,vocab:y"


@dataclass(frozen=True)
class Case:
    """A preset with some fields changed, on a mesh of a chip. ``layout``: rules in Mesh
    TensorFlow's syntax, an expert's name, or nothing: the planner's choice."""

    chip: str
    mesh: str
    preset: str
    layout: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        special = {"attention": " local", "attention_kernel": " unfused"}
        fields = "".join(special.get(k, f" {k}={v}") for k, v in self.fields.items())
        return f"{self.chip} {self.mesh} {self.preset}{fields} [{self.layout or 'plan'}]"

    @property
    def config(self) -> gpt.Config:
        return replace(gpt.PRESETS[self.preset], **self.fields)

    @property
    def rules(self) -> Rules | None:
        """An expert's, where the layout names one.

        Raises:
            NeoccError: no expert of that name.
        """
        if not self.layout or ":" in self.layout:
            return None
        known = {e.name: e.rules for e in experts(Mesh.parse(self.mesh))}
        if self.layout not in known:
            raise NeoccError(f"no expert {self.layout!r}; known: {', '.join(known)}")
        return known[self.layout]


def case(chip: str, mesh: str, preset: str, layout: str = "", **fields: Any) -> Case:
    return Case(chip, mesh, preset, layout, fields)


def unfused(chip: str, mesh: str, preset: str, layout: str = "", **fields: Any) -> Case:
    """With scores that are stored: memory and vector units have more to do."""
    return Case(chip, mesh, preset, layout, {**fields, "attention_kernel": "unfused"})


LOCAL = ((("global", "local"), 12),)

CASES: tuple[Case, ...] = (
    # One core, 16 GB: v5e.
    case("v5e", "4", "gpt2-small", batch=64, seq=512),
    unfused("v5e", "2x4", "gpt2-medium", batch=64),
    case("v5e", "4x4", "gpt2-large", MEGATRON, batch=128),
    unfused("v5e", "8x8", "gpt2-xl", batch=256),
    case("v5e", "8", "gpt3-small", "FSDP", batch=64, seq=1024),
    unfused("v5e", "4x8", "gpt3-medium", "Megatron on y", batch=64),
    case("v5e", "8x8", "gpt3-large", batch=256),
    unfused("v5e", "8x16", "gpt3-xl"),
    case("v5e", "8x16", "gpt3-xl", "FSDP"),
    unfused("v5e", "8x16", "gpt3-xl", "Megatron on y", batch=256),
    case("v5e", "2x4", "gpt3-xl", batch=64, layers=8),
    unfused("v5e", "16x16", "gpt3-2.7b"),
    case("v5e", "8x16", "gpt3-2.7b", "FSDP", batch=256),
    unfused("v5e", "16x16", "gpt3-6.7b", MEGATRON, batch=256),
    case("v5e", "16x16", "gpt3-xl", batch=256, recompute=False),
    unfused("v5e", "4x4", "gpt3-xl", "batch:x,embd:y", batch=32, layers=12),
    case("v5e", "8x8", "gpt2-medium", batch=256, dtype="f32"),
    unfused("v5e", "8x8", "gpt3-xl", batch=128, attention=LOCAL),
    case("v5e", "2x2", "gpt2-small", batch=32, attn_dropout=0.1, res_dropout=0.1),
    unfused("v5e", "16x16", "gpt3-small"),
    # Two cores joined, 95 GB: v5p.
    case("v5p", "8x16", "gpt3-175b"),
    unfused("v5p", "16x8", "gpt3-13b", "Megatron on y", batch=128),
    case("v5p", "16x16", "gpt3-175b", "FSDP"),
    unfused("v5p", "8x8", "gpt3-13b", batch=256),
    case("v5p", "4x4x4", "gpt3-13b", "batch:x,heads:y,mlp:y,vocab:y,embd:z", batch=128),
    unfused("v5p", "4x8", "gpt3-6.7b", batch=96, recompute=False),
    case("v5p", "32", "gpt3-6.7b", "FSDP", batch=128),
    unfused("v5p", "16", "gpt3-2.7b", "data parallel", batch=64),
    case("v5p", "4", "gpt3-xl", batch=32),
    unfused("v5p", "2x2", "gpt3-xl", "Megatron on y", batch=32),
    case("v5p", "8x16", "gpt3-13b", batch=256, embd=8192, heads=64, layers=48),
    unfused("v5p", "4x8", "gpt3-6.7b", MEGATRON, batch=64, heads=64),
    case("v5p", "4x4x8", "gpt3-13b", "batch:x,batch:y,heads:z,mlp:z,vocab:z", batch=128),
    unfused("v5p", "8x8", "gpt3-xl", "batch:x,seq:y", batch=64, seq=8192),
    # v6e: a matrix unit twice as wide.
    case("v6e", "8x8", "gpt3-2.7b", batch=256),
    unfused("v6e", "16x16", "gpt3-6.7b", batch=512),
    case("v6e", "16x8", "gpt3-13b", MEGATRON, batch=64),
    unfused("v6e", "4x4", "gpt3-xl", "FSDP", batch=64),
    case("v6e", "2x4", "gpt2-large", "data parallel", batch=32, recompute=False),
    unfused("v6e", "16", "gpt3-large", batch=64),
    # Megacore, 32 GB: v4.
    case("v4", "4x4", "gpt3-xl", batch=64),
    unfused("v4", "8x8", "gpt3-6.7b", "FSDP", batch=256),
    case("v4", "8x16", "gpt3-13b", batch=256),
    unfused("v4", "2x2x4", "gpt3-2.7b", "batch:x,batch:y,heads:z,mlp:z,vocab:z", batch=32),
    case("v4", "8", "gpt3-medium", batch=32, recompute=False),
    unfused("v4", "4x8", "gpt3-large", "Megatron on y", batch=64),
)
