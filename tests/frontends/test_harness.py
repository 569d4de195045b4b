"""neocc's models under the real lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from tests.frontends import hf_models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval not installed: pip install 'neocc[eval]'",
)
CONFIG = hf_models.NEO | {
    "vocab_size": 256, "max_position_embeddings": 48, "num_layers": 1, "eos_token_id": 10,
    "attention_types": [[["local"], 1]],
}  # fmt: skip
TEXTS = ["It was a dark night", "the end of it all"]


def model(folder: Path, **more: Any) -> Any:
    from neocc.frontends.harness import NeoccLM

    jax.devices()
    path = hf_models.write(folder / "neo", CONFIG, hf_models.tensors(CONFIG))
    return NeoccLM(str(path), batch_size=2, tokenizer="bytes", **more)


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_its_likelihoods_add_up_and_are_the_same_on_a_mesh(tmp_path: Path):
    one, grid = (
        model(tmp_path, mesh="1"),
        model(tmp_path / "2", mesh="2x2", layout="batch:x;heads:y"),
    )
    pairs = [asked("It was", " dark"), asked("It was ", "dark"), asked("", "dark")]
    found = one.loglikelihood(pairs, disable_tqdm=True)
    for (a, _), (b, _) in zip(found, grid.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert found[0] == found[1]
    rolled = one.loglikelihood_rolling([asked("dark"), asked("x" * 100)])
    assert rolled[0] == pytest.approx(found[2][0], rel=1e-5)
    assert rolled[1] < rolled[0] < 0


def test_it_continues_until_a_text(tmp_path: Path):
    lm = model(tmp_path)
    options = {"max_gen_toks": 8, "until": []}
    whole = lm.generate_until([asked(t, options) for t in [*TEXTS, "x" * 100]])
    stop = whole[0][3]
    ended = lm.generate_until([asked(t, {**options, "until": [stop]}) for t in TEXTS])
    assert ended == [text.split(stop)[0] for text in whole[:2]]
    drawn = {"max_gen_toks": 8, "until": [], "temperature": 1.0, "do_sample": True}
    assert lm.generate_until([asked(TEXTS[0], drawn)]) != whole[:1]


def test_the_harness_itself_evaluates_it(tmp_path: Path):
    """A task of each kind from local files, in the forms of lambada_openai and wikitext."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from neocc.runtime.measures import wikitext

    pytest.importorskip("datasets")
    (tmp_path / "tasks").mkdir()
    rows = [{"text": t, "page": f"{t} , ( so ) it is ."} for t in TEXTS]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }  # fmt: skip
    last = {
        "task": "last_word", "output_type": "loglikelihood", **source,
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }  # fmt: skip
    pages = {
        "task": "pages", "output_type": "loglikelihood_rolling", **source, "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    for task in (last, pages):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(task))
    lm = model(tmp_path)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["last_word", "pages"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    from neocc.runtime.measures import corpus, lambada

    ours = lambada(lm.scorer, TEXTS, lm.tok_encode, lambda done, of: None)
    assert found["last_word"]["perplexity,none"] == pytest.approx(ours.perplexity, rel=1e-6)
    assert found["last_word"]["acc,none"] == ours.accuracy
    whole = corpus(lm.scorer, [r["page"] for r in rows], lm.tok_encode, 10, lambda done, of: None)
    assert found["pages"]["bits_per_byte,none"] == pytest.approx(whole.bits_per_byte, rel=1e-6)
    words = found["pages"]["word_perplexity,none"]
    assert math.log(words) == pytest.approx(math.log(whole.word_perplexity), rel=1e-6)
    assert wikitext(rows[0]["page"]) == f"{TEXTS[0]}, (so) it is ."


def test_wikitext_is_cleaned_as_the_harness_does():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from neocc.runtime.measures import wikitext

    raw = (
        " = Robert <unk> = \n \n Robert <unk> is an English film , television and theatre actor . "
        "He had a guest @-@ starring role ( in the series \" The Bill \" ) in 2 @,@ 000 . ' N ' "
        "= = Career = = \n It 's 3 @.@ 5 \u00b0 C ; the actors ' own [ sic ] ! \n"
    )
    assert wikitext(raw) == wikitext_detokenizer({"page": raw})


def test_it_is_known_to_the_harness_and_says_what_is_wrong(tmp_path: Path):
    from lm_eval.api.registry import get_model

    from neocc.frontends.harness import NeoccLM
    from neocc.ir.errors import NeoccError

    assert get_model("neocc") is NeoccLM
    with pytest.raises(NeoccError, match="batch_size 'auto' is no number"):
        NeoccLM("gone", batch_size="auto")
    with pytest.raises(NeoccError, match="there is nothing at gone"):
        NeoccLM("gone")
    config = {k: v for k, v in CONFIG.items() if k != "eos_token_id"}
    path = hf_models.write(tmp_path / "endless", config, hf_models.tensors(config))
    with pytest.raises(NeoccError, match="no eos_token_id, which the harness needs"):
        NeoccLM(str(path), tokenizer="bytes")
