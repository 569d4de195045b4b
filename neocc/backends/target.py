"""Compile a plan for the chip that it was made for, which need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from neocc.backends import backend
from neocc.ir.errors import NeoccError
from neocc.lower.audit import Audit, audit
from neocc.lower.jax import Kernel, Lowered, lower
from neocc.passes.plan import Plan


@dataclass(frozen=True)
class Target:
    """A plan compiled for its chip. Bytes per device: ``peak`` is what is live at the fullest
    point, ``reserved`` the arguments and the block for temporaries that holds it."""

    lowered: Lowered
    hlo: str
    peak: int
    reserved: int


def lower_for_target(
    plan: Plan,
    algorithms: Mapping[str, str] | None = None,
    kernels: Mapping[str, Kernel] | None = None,
) -> Lowered:
    """The plan's program for the devices of a described slice of its chip. ``algorithms``: as in
    ``lower``; those that the chip's backend has a form of run as that. ``kernels``: beside the
    backend's, such as ``neocc.backends.tpu.attention.SPLASH``.

    Raises:
        NeoccError: the chip's devices cannot be described here.
    """
    own = backend(plan.chip.kind)
    mesh = jax.sharding.Mesh(own.devices(plan.topology), plan.mesh.names)
    own_kernels = {**own.kernels, **(kernels or {})}
    return lower(plan.partitioned, mesh, algorithms, own_kernels, own.forms)


def compile_for_target(plan: Plan, options: Mapping[str, Any] | None = None) -> Target:
    """Compiles for the plan's chip with its real compiler, under ``options`` beside the backend's.

    Raises:
        NeoccError: there is no compiler for the chip here, or it refuses the program.
    """
    own = backend(plan.chip.kind)
    lowered = lower_for_target(plan)
    compiled = own.compile(lowered.stage, own.compiler_options(options))
    facts = own.memory(compiled)
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
    own = backend(plan.chip.kind)
    facts = own.read(target.hlo)
    return audit(plan, target.hlo, target.peak, target.reserved, facts, own.calls)
