"""Generation on a mesh: against the whole model without a cache, and the same on every mesh."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neocc.cost.hardware import chip
from neocc.frontends.weights.load import loaded
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.runtime.choose import Choice
from neocc.runtime.generate import Sampler
from tests.frontends import hf_models

NEO = hf_models.NEO | {"max_position_embeddings": 24}
GREEDY = Choice(temperature=0)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8], [9, 7, 9], [3, 2, 3, 8, 4]]
NEW = 12


LAYOUTS = {"1": "", "2x4": "batch:x,heads:y,mlp:y,vocab:y", "4x2": "slot:x,embd:y"}
CONFIGS = {"neo": NEO, "gpt2": hf_models.GPT2 | {"n_positions": 20}}


@cache
def sampler(name: str = "neo", mesh: str = "1", batch: int = 5) -> Sampler:
    """One for all tests of a kind: to compile it takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIGS[name]
        path = hf_models.write(Path(folder) / "theirs", config, hf_models.tensors(config))
        with loaded(path) as (model, saved):
            grid, layout = Mesh.parse(mesh), LAYOUTS[mesh]
            return Sampler(model, saved, grid, chip("v5e"), batch, 8, NEW, layout)


def texts(made: Sampler, prompts: list[list[int]], choice: Choice, **more: Any) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for token in made.generate(prompts, choice, **more):
        found.setdefault(token.sequence, []).append(token.token)
    return [found[i] for i in sorted(found)]


def plainly(config: dict[str, Any], prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy, the whole of it run again for each token, in float64."""
    w, tokens = hf_models.tensors(config), list(prompt)
    for _ in range(new):
        tokens.append(int(hf_models.logits(config, w, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


GPT2 = pytest.param("gpt2", "2x4", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "mesh"), [*(("neo", mesh) for mesh in LAYOUTS), GPT2])
def test_greedy_equals_the_model_without_a_cache(name: str, mesh: str):
    """Prompts of unequal length, past the local window of 5, dims that do not divide."""
    found = texts(sampler(name, mesh), PROMPTS, GREEDY)
    assert found == [plainly(CONFIGS[name], p) for p in PROMPTS]


def test_one_seed_gives_the_same_text_on_every_mesh_and_in_any_batch():
    choice = Choice(0.8, top_k=20, top_p=0.9, seed=11)
    alone = texts(sampler(), PROMPTS, choice)
    for mesh in ("2x4", "4x2"):
        assert texts(sampler(mesh=mesh), PROMPTS, choice) == alone
    pairs = sampler(batch=2)
    found = [texts(pairs, PROMPTS[i : i + 2], choice, first=i) for i in range(0, 5, 2)]
    assert [text for some in found for text in some] == alone
    assert texts(sampler(), PROMPTS, Choice(0.8, 20, 0.9, seed=12)) != alone


def test_a_stop_token_ends_a_text_and_no_other():
    made = sampler()
    whole = texts(made, PROMPTS, GREEDY)
    stop = whole[0][4]
    ends = {}
    for token in made.generate(PROMPTS, GREEDY, {stop}):
        assert token.sequence not in ends
        if token.last:
            ends[token.sequence] = token.last
    cut = [t[: t.index(stop) + 1] if stop in t else t for t in whole]
    assert texts(made, PROMPTS, GREEDY, stop={stop}) == cut
    assert ends == {i: "stop" if stop in t else "length" for i, t in enumerate(whole)}


def test_tokens_come_one_step_at_a_time():
    made = sampler(batch=2)
    seen = [t.sequence for t in made.generate(PROMPTS[:2], GREEDY)]
    assert seen == [0, 1] * NEW


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 has 0 tokens; at least 1 and at most 8"),
        ([[1] * 9], "prompt 0 has 9 tokens"),
        ([[1]] * 6, "6 prompts for a batch of 5"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: Any, message: str):
    made = sampler()
    with pytest.raises(NeoccError, match=message):
        next(made.generate(prompts, GREEDY))


def test_more_than_the_context_is_refused(tmp_path: Path):
    config = hf_models.NEO
    path = hf_models.write(tmp_path / "neo", config, hf_models.tensors(config))
    message = "8 tokens and 12 new ones: the context of neo is 16"
    with loaded(path) as (model, saved), pytest.raises(NeoccError, match=message):
        Sampler(model, saved, Mesh.parse("1"), chip("v5e"), 1, 8, NEW)


def test_weights_and_cache_lie_alike_in_both_programs():
    made = sampler(mesh="2x4")
    later, first = made.lowered["decode"], made.lowered["prefill"]
    types = {i.name: v.type for i, v in later.partitioned.program.named_inputs}
    program = first.partitioned.program
    for info, value in program.named_inputs:
        if info.role == "parameter":
            assert value.type == types[info.name]
    caches = [n for n in program.outputs if n != "logits"]
    assert len(caches) == 4 and not any(i.role == "state" for i in program.inputs)
    for name in caches:
        assert program.output_value(name).type == types[name]
        assert types[name].layout is not None and "heads" in types[name].layout.dims
