"""What a Pallas kernel in a compiled program sends to other devices, read off its body.

The HLO that libtpu prints holds each kernel as Mosaic was given it: MLIR, in base64. Its remote
DMAs stand there one by one, and to whom each goes is arithmetic on the number of the device that
runs it, done here for all devices at once.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxlib.mlir import ir  # jaxlib is pinned to one version
from jaxlib.mosaic.python import tpu

from neocc.lower.hlo import HloFacts, Message, read_hlo
from neocc.lower.hlo_text import HloError

DIALECT = "stable_mosaic."
DEVICE = 4  # which of an enqueue_dma's operands names a device, of those that it may have
INLINE = "tpu.region"
ORDER = (np.less, np.less_equal, np.greater, np.greater_equal)
COMPARE = (np.equal, np.not_equal, *ORDER, *ORDER)  # by predicate: of integers, and unsigned
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
    "remsi": np.fmod,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "select": lambda which, a, b: np.where(which, a, b),
    "extui": lambda a: a.astype(np.int64),
    "index_cast": lambda a: a,
}


def read(text: str) -> HloFacts:
    """``read_hlo`` with what each kernel sends.

    Raises:
        HloError: as ``read_hlo``; or a kernel sends in a way that is not known here.
    """
    facts = read_hlo(text)
    kernels = (replace(k, sent=sent(k.body, facts.devices)) for k in facts.kernels)
    return replace(facts, kernels=tuple(kernels))


@lru_cache(maxsize=256)
def sent(body: str, devices: int) -> tuple[Message, ...]:
    """The remote DMAs of one run of a kernel on each of so many devices.

    Raises:
        HloError: one is in a loop or a branch, or its target is no arithmetic on the device.
    """
    context = ir.Context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(base64.b64decode(body))
        found: list[Message] = []
        for function in module.body.operations:
            visit(function.regions[0].blocks[0], {}, np.arange(devices), found, top=True)
    return tuple(found)


def visit(block: Any, known: dict[Any, Any], every: Any, found: list[Message], top: bool) -> None:
    """Adds the messages of a block; ``known``: values of scalars on every device."""
    for op in block.operations:
        name = op.operation.name.removeprefix(DIALECT)
        if name == "tpu.enqueue_dma":
            found += message(op, known, every, top)
        elif name == "tpu.device_id":
            known[op.result] = every
        elif name.startswith("arith."):
            value = scalar(name.removeprefix("arith."), op, known)
            if value is not None:
                known[op.result] = np.broadcast_to(value, every.shape)
        for region in op.regions:
            for inner in region.blocks:
                visit(inner, known, every, found, top and name == INLINE)


def scalar(name: str, op: Any, known: dict[Any, Any]) -> Any:
    """An integer that an op makes, if that can be known."""
    if name == "constant":
        value = op.attributes["value"]
        plain = isinstance(value, ir.IntegerAttr | ir.BoolAttr)
        return np.int64(int(value.value)) if plain else None
    args = [known.get(v) for v in op.operands]
    if any(a is None for a in args):
        return None
    if name == "cmpi":
        return COMPARE[op.attributes["predicate"].value](*args)
    return ARITHMETIC[name](*args) if name in ARITHMETIC else None


def message(op: Any, known: dict[Any, Any], every: Any, top: bool) -> list[Message]:
    """What a DMA sends, if it goes to another device."""
    counts = list(op.attributes["operandSegmentSizes"])
    if not counts[DEVICE]:
        return []
    target = known.get(op.operands[sum(counts[:DEVICE])])
    if not top or target is None:
        raise HloError("a kernel sends in a loop or branch, or to a device that is not known")
    source = ir.MemRefType(op.operands[0].type)
    bits = ir.IntegerType if isinstance(source.element_type, ir.IntegerType) else ir.FloatType
    size = math.prod(source.shape) * bits(source.element_type).width // 8
    return [Message(frozenset(zip(every.tolist(), target.tolist(), strict=True)), size)]
