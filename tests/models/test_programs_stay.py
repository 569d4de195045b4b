"""The programs of presets and of GPT-Neo's own configs are the same text as ever: plans that are
stored for them, and weights, hang on that. An option that is off leaves no trace.

A change that is meant changes the digest here, and says so in its commit.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from models import gpt
from models.gpt import PRESETS, Config
from neocc.ir.text import print_program

CONFIGS = Path(__file__).resolve().parents[3] / "shared/data/gptneo_configs"
DIGESTS = {
    "tiny": "e4cb8eba55716fc4",
    "gpt2-small": "d7ec5aed039e461a",
    "gpt2-medium": "0a6277ba1c4c7ad2",
    "gpt2-large": "7de5767ecaccef5f",
    "gpt2-xl": "16abbc5a5a3e3c66",
    "gpt3-small": "58f56aa1eb6a9db6",
    "gpt3-medium": "a54398e4c3ae95f5",
    "gpt3-large": "ea4ed2d0d80616c5",
    "gpt3-xl": "077af24266394b88",
    "gpt3-2.7b": "a4799c2e14322fba",
    "gpt3-6.7b": "98e355780d5b16f0",
    "gpt3-13b": "cc197f22ad29dc89",
    "gpt3-175b": "cbe254ed3c32ac08",
    "gpt-moe": "56d6e1fff0587f16",
    "tiny-moe": "0d232b842e8db406",
    "gpt2_small": "5fc9e2e743ed3b4a",
    "gpt3_13B_256": "5fcc7e92057ef5cb",
    "gpt3_13B_256_Pile": "36cff5fbc23353ae",
    "gpt3_2-7B_256": "52f86c3494bf582d",
    "gpt3_6-7B_256": "1eb61c98bfeb3177",
    "gpt3_PAR_small_256": "7e3af826d8150ba5",
    "gpt3_XL_256_Pile": "0f513b7e6b16d823",
    "gpt3_large_256": "81ec6c64d56d2b95",
    "gpt3_medium_256": "095c95e2660b3384",
    "gpt3_small_256": "23c6ee55a12b88c4",
}


def digest(c: Config) -> str:
    """Of the three programs, without source lines."""
    text = "".join(print_program(make(c)) for make in (gpt.train_step, gpt.init, gpt.forward))
    return hashlib.sha256(re.sub(r"  @ \S+$", "", text, flags=re.M).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", DIGESTS)
def test_its_programs_are_what_they_were(name: str) -> None:
    if name in PRESETS:
        c = PRESETS[name]
    else:
        path = CONFIGS / f"{name}.json"
        if not path.exists():
            pytest.skip("needs GPT-Neo's config files")
        c = gpt.config_from_gptneo(json.loads(path.read_text()), name)
    assert digest(c) == DIGESTS[name]


def test_every_preset_is_here() -> None:
    assert PRESETS.keys() <= DIGESTS.keys()
