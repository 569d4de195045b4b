"""Every key of a GPT-Neo config: what it does, and the same on a mesh.

The tables have each key that ``neocc.frontends.gptneo`` reads; one that is added there without a
row here fails. ``mesh_shape``, ``layout`` and ``tokens_per_mb_per_replica`` change no program but
its plan: ``tests/test_gptneo_keys.py``.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from models import gpt
from models.gpt import Config
from neocc.frontends import gptneo
from neocc.ir.mesh import Mesh
from neocc.ir.text import print_program
from neocc.passes.simplify import simplify
from tests.models.keyed import Key
from tests.models.keys_of_experts import EXPERTS
from tests.models.keys_of_layers import LAYERS
from tests.models.keys_of_training import TRAINING
from tests.models.partitioned import assert_partitioned_equals_whole
from tests.models.values import batch, start

PLANNED = {"mesh_shape", "layout", "tokens_per_mb_per_replica"}
KEYS: dict[str, Key] = LAYERS | TRAINING | EXPERTS
QUICK = ("num_mem_kv", "moe_gating", "mlm_training", "no_weight_tie", "scale_by_in")
ON_A_MESH = [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KEYS]


def test_every_key_that_is_read_is_here() -> None:
    assert KEYS.keys() == (gptneo.MODEL_KEYS | gptneo.MOE_KEYS) - PLANNED


def text(key: Key, keys: dict) -> str:
    """Of the program as the config has it, in its own precision, without source lines."""
    program = getattr(gpt, key.program)(gpt.config_from_gptneo(keys, "keyed"))
    return re.sub(r"  @ \S+$", "", print_program(program), flags=re.M)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_changes_the_program_as_described(x64: None, name: str) -> None:
    key = KEYS[name]
    assert text(key, key.without) != text(key, key.without | key.on)
    key.holds(*key.configs)


@pytest.mark.parametrize("name", ON_A_MESH)
def test_partitioned_equals_unpartitioned(x64: None, name: str) -> None:
    """The program that the key changes, with it."""
    key = KEYS[name]
    c: Config = key.configs[1]
    program = simplify(getattr(gpt, key.program)(c))
    given = start(c, push=0.3) | batch(c) | {"seed": np.uint32(7), "step": np.int32(3)}
    mesh = Mesh.parse("2x2")
    assert_partitioned_equals_whole(program, given, mesh, tolerance=key.tolerance)
