"""Compile a plan for the chip that it was made for, which need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from neocc.backends.tpu.compile import compile_for_tpu, memory_facts, tpu_devices
from neocc.ir.errors import NeoccError
from neocc.lower.audit import Audit, audit
from neocc.lower.jax import Lowered, lower
from neocc.passes.plan import Plan


@dataclass(frozen=True)
class Target:
    """A plan compiled for its chip. Bytes per device: ``peak`` is what is live at the fullest
    point, ``reserved`` the arguments and the block for temporaries that holds it."""

    lowered: Lowered
    hlo: str
    peak: int
    reserved: int


def lower_for_target(plan: Plan) -> Lowered:
    """The plan's program for the devices of a described slice of its chip.

    Raises:
        NeoccError: there is no deviceless compiler for the chip here.
    """
    if plan.chip.kind != "tpu":
        raise NeoccError(
            f"neocc compiles for TPUs without the device, not yet for {plan.chip.name}; "
            "plan for it without --audit, or give a TPU as --target"
        )
    _, devices = tpu_devices(plan.topology)
    return lower(plan.partitioned, jax.sharding.Mesh(devices, plan.mesh.names))


def compile_for_target(plan: Plan, options: Mapping[str, Any] | None = None) -> Target:
    """Compiles for the plan's chip with its real compiler.

    Raises:
        NeoccError: there is no compiler for the chip here, or it refuses the program.
    """
    lowered = lower_for_target(plan)
    compiled = compile_for_tpu(lowered.function, lowered.shape_structs(), compiler_options=options)
    facts = memory_facts(compiled)
    text = compiled.as_text()
    if text is None:
        raise NeoccError(f"the compiler for {plan.chip.name} does not print what it compiled")
    return Target(lowered, text, facts.live, facts.peak)


def audit_for_target(plan: Plan) -> Audit:
    """Compiles the plan for its chip and holds the plan against the result.

    Raises:
        NeoccError: as ``compile_for_target``.
        HloError: the compiled program holds a collective in a form that is not known.
    """
    target = compile_for_target(plan)
    return audit(plan, target.hlo, target.peak, target.reserved)
