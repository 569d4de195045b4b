"""Plans on the command line: written, costed again, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from neocc.cli import app

ROOT = Path(__file__).parent.parent
GPT = str(ROOT / "models" / "gpt.py")


def neocc(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The message of a call that ends with code 2, a line or two and no traceback."""
    result = neocc(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) <= 2
    return result.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that neocc made."""
    out = tmp_path_factory.mktemp("out")
    result = neocc("compile", GPT, "--preset", "tiny", "--mesh", "2x2", "--no-compare",
                   "--layout", "batch:x,mlp:y", "--emit", "plan", str(out))  # fmt: skip
    assert result.exit_code == 0, result.output
    return out / "plan.json"


@pytest.fixture
def plan(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOCC_DUMP", raising=False)
    (tmp_path / "plan.json").write_text(first.read_text())
    return Path("plan.json")


def changed(plan: Path, **changes: Any) -> str:
    data = json.loads(plan.read_text())
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    plan.write_text(json.dumps(data))
    return str(plan)


def test_a_plan_is_costed_again_without_naming_its_model(plan: Path):
    result = neocc("compile", "--plan", str(plan), "--no-compare", "--json")
    assert result.exit_code == 0, result.output
    report, written = json.loads(result.stdout), json.loads(plan.read_text())
    for name in ("step", "compute", "exposed", "hidden", "mfu", "peak_memory"):
        assert report["plan"][name] == written["predicted"][name]
    # The line is told from where the command runs.
    now, then = report["plan"]["collectives"], written["report"]["collectives"]
    assert [{**c, "line": None} for c in now] == [{**c, "line": None} for c in then]
    assert report["plan"]["given"] and report["notes"] == []
    assert "nothing is proved" in report["plan"]["certificate"]["verdict"]


def test_a_plan_that_is_emitted_again_is_the_same_file(plan: Path):
    result = neocc("compile", "--plan", str(plan), "--no-compare", "--emit", "plan", "again")
    assert result.exit_code == 0, result.output
    before, after = (json.loads(p.read_text()) for p in (plan, Path("again/plan.json")))
    del before["report"], after["report"]
    assert after == before


SMALL = """
from neocc import Dim, Graph, einsum
PRESETS = {"small": 0}
def train_step(c):
    g = Graph("small")
    x = g.data("x", (Dim("batch", 4096), Dim("embd", 4096)), "bf16")
    up = g.parameter("up", (Dim("embd", 4096), Dim("mlp", 8192)), "bf16")
    y = einsum(x, up, "batch mlp")
    return g.build({"y": y, "up": up - einsum(x, y, "embd mlp") * 0.1})
"""


def test_a_given_plan_claims_no_optimum_and_shows_its_distance_from_it(plan: Path):
    Path("small.py").write_text(SMALL)
    made = neocc("compile", "small.py", "--mesh", "4", "--layout", "batch:x", "--no-compare",
                 "--emit", "plan", "out")  # fmt: skip
    assert made.exit_code == 0, made.output
    result = neocc("compile", "--plan", "out/plan.json")
    assert result.exit_code == 0, result.output
    headline = result.stdout.splitlines()[1]
    assert "as given: nothing is proved of it" in headline and "optimal" not in headline
    assert "slower than neocc's own plan" in result.stdout.replace("\n", " ")
    report = json.loads(neocc("compile", "--plan", "out/plan.json", "--json").stdout)
    assert report["best"]["step"] < report["plan"]["step"]
    assert report["best"]["verdict"] == "proved optimal"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--collectives", "best"], "collectives 'best'; one of auto, standard"),
        (["--collective", "all_gather"], "write KIND=ALGORITHM: all_gather=ring2"),
        (["--collective", "all_reduce=torus"], "no axis of mesh x:2,y:2 is one"),
    ],
)
def test_collectives_that_cannot_run_are_refused(options: list[str], said: str):
    message = refused("compile", GPT, "--preset", "tiny", "--mesh", "2x2", *options)
    assert said in message.replace("\n", " ")


def test_what_runs_collectives_is_told_with_what_the_standard_ones_would_cost(plan: Path):
    made = neocc("compile", GPT, "--preset", "tiny", "--mesh", "2x4", "--no-compare", "--layout",
                 "batch:x,mlp:y", "--collective", "all-reduce=ring2", "--json")  # fmt: skip
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)["plan"]["collectives"]
    sums = [c for c in found if c["kind"] == "all_reduce"]
    assert sums and {c["algorithm"] for c in sums} == {"ring2"}
    assert all(c["seconds"] > c["standard_seconds"] > 0 for c in sums)
    twice = refused("compile", "--plan", str(plan), "--collectives", "auto")
    assert "collectives: leave them out" in twice.replace("\n", " ")


def test_a_changed_plan_is_costed_as_it_says(plan: Path):
    path = changed(plan, stored={"h0.mlp.fc": "embd:x"})
    report = json.loads(neocc("compile", "--plan", path, "--no-compare", "--json").stdout)
    assert report["plan"]["layouts"]["h0.mlp.fc"]["words"] == "embd on x"
    assert any("edited by hand" in note for note in report["notes"])


def test_a_weight_stored_otherwise_than_its_update_cuts_it_is_explained(plan: Path):
    path = changed(plan, stored={"h0.mlp.fc": "embd:x"})
    result = neocc("explain", path, "--tensor", "h0.mlp.fc", "--seconds", "0", "--json")
    assert result.exit_code == 0, result.output
    assert sum(o["how"] == "chosen" for o in json.loads(result.stdout)["options"]) == 1


def test_an_illegal_plan_ends_with_2_and_says_what_and_why(plan: Path):
    message = refused("compile", "--plan", changed(plan, stored={"h0.mlp.fc": "heads:x"}))
    assert "plan.json" in message and "'h0.mlp.fc'" in message and "'heads'" in message


def test_plans_for_something_else_are_told(plan: Path):
    path = str(plan)
    assert "not for x:4" in refused("compile", "--plan", path, "--mesh", "4")
    assert "not for h100" in refused("compile", "--plan", path, "--target", "h100")
    message = refused("compile", GPT, "--preset", "gpt2-small", "--plan", path)
    assert "another model" in message and "64 there and 50257 here" in message
    assert "batch is 4 there and 8 here" in refused("compile", "--plan", path, "--batch", "8")
    assert "not both" in refused("compile", "--plan", path, "--layout", "batch:x")
    assert "name the model" in refused("compile", "--plan", path, "--preset", "tiny")


def test_a_plan_whose_model_is_gone_says_which(plan: Path):
    path = changed(plan, model={"file": "lost.py"})
    message = refused("compile", "--plan", path)
    assert "the model of plan.json" in message and "lost.py" in message
    assert neocc("compile", GPT, "--preset", "tiny", "--plan", path, "--no-compare").exit_code == 0


def test_a_model_may_lie_beside_its_plan(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.py").write_text(Path(GPT).read_text())
    path = changed(plan, model={"file": "mine.py"})
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    result = neocc("compile", "--plan", str(tmp_path / path), "--no-compare")
    assert result.exit_code == 0, result.output


def test_the_config_and_the_batch_of_a_model_come_back(plan: Path):
    neo = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_vocab": 64, "n_ctx": 16}
    Path("small.json").write_text(json.dumps(neo))
    made = neocc("compile", GPT, "--config", "small.json", "--batch", "8", "--mesh", "2",
                 "--no-compare", "--emit", "plan", "out")  # fmt: skip
    assert made.exit_code == 0, made.output
    source = json.loads(Path("out/plan.json").read_text())["model"]
    assert source["config"] == "small.json" and source["fields"] == {"batch": 8}
    back = neocc("compile", "--plan", "out/plan.json", "--no-compare", "--json")
    assert json.loads(back.stdout)["notes"] == []


def test_memory_that_a_given_plan_does_not_fit(plan: Path):
    result = neocc("compile", "--plan", str(plan), "--memory", "100KiB", "--no-compare")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout and "without --plan" in result.stdout


def test_no_model_and_no_plan():
    assert "say which MODEL" in refused("compile", "--mesh", "2x2")


# Explain


def explained(*arguments: str) -> dict[str, Any]:
    result = neocc("explain", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_op_is_explained_with_its_alternatives(plan: Path):
    Path("small.py").write_text(SMALL)
    (other,) = [o for o in SMALL.splitlines() if "embd mlp" in o]
    line = SMALL.splitlines().index(other) + 1
    asked = ("small.py", "--mesh", "4", "--op", f"einsum :{line}")
    found = explained(*asked)
    assert found["name"].startswith(f"einsum small.py:{line}")
    assert found["region"] == "outside layers"
    (chosen,) = [o for o in found["options"] if o["chosen"]]
    assert chosen["option"] == found["strategy"] != ""
    assert {o["option"] for o in found["options"]} == {"", "batch:x", "embd:x", "mlp:x"}
    assert {o["how"] for o in found["options"]} == {"chosen", "solved again"}
    assert min(o["step"] for o in found["options"]) == chosen["step"]
    assert found["compute"]["formula"] and found["hardware"]
    result = neocc("explain", *asked, "--seconds", "0")
    for words in ("It reads", "It makes", "What it could have been", "From the hardware table"):
        assert words in result.stdout


def test_a_tensor_is_explained_with_its_moves_to_the_link(plan: Path):
    Path("small.py").write_text(SMALL)
    made = neocc("compile", "small.py", "--mesh", "4", "--layout", "batch:x", "--no-compare",
                 "--emit", "plan", "out")  # fmt: skip
    assert made.exit_code == 0, made.output
    path = changed(Path("out/plan.json"), stored={"up": "embd:x"})
    found = explained(path, "--tensor", "up", "--seconds", "1")
    (stored,) = found["where"]
    assert stored["layout"] == "embd:x" and stored["region"] == "outside layers"
    assert len(stored["read"]) == 2
    (gather,) = [m for m in stored["moves"] if m["kind"] == "all_gather"]
    assert (gather["before"], gather["after"]) == ("embd:x", "")
    assert gather["bytes"] * 4 == gather["result_bytes"]
    assert "torus.link.bandwidth" in gather["seconds"]["formula"]
    assert "GB/s" in gather["link"]
    assert "torus.link.bandwidth" in {s["field"] for s in found["hardware"]}
    assert {o["option"] for o in found["options"]} == {"", "embd:x", "mlp:x"}
    text = neocc("explain", path, "--tensor", "up", "--seconds", "0").stdout
    assert "read by" in text and "all-gather" in text


@pytest.mark.parametrize("figure", ["step", "memory"])
def test_a_figure_is_explained(plan: Path, figure: str):
    found = explained(str(plan), "--figure", figure)
    written = json.loads(plan.read_text())["predicted"]
    key = {"memory": "peak_memory"}.get(figure, figure)
    if key in written:
        assert found["value"] == pytest.approx(written[key], rel=1e-9)
    assert neocc("explain", str(plan), "--figure", figure).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "einsum"), ["may be", "say more"]),
        (("--op", "einsum gpt.py:9999"), ["no op", "nearest"]),
        (("--tensor", "h0.mlp.fq"), ["no tensor", "h0.mlp.fc"]),
        (("--figure", "speed"), ["no figure", "mfu"]),
        (("--op", "einsum", "--figure", "step"), ["one thing at a time"]),
        (("--mesh", "4"), ["not for x:4"]),
    ],
)
def test_what_cannot_be_explained_is_told(plan: Path, arguments: tuple[str, ...], said: list[str]):
    message = refused("explain", str(plan), *arguments)
    for words in said:
        assert words in message


# Compare


@pytest.fixture
def pair(plan: Path) -> tuple[str, str]:
    """Two plans of one model: batch cut, mlp cut."""
    Path("small.py").write_text(SMALL)
    for layout in ("batch", "mlp"):
        made = neocc("compile", "small.py", "--mesh", "4", "--layout", f"{layout}:x",
                     "--no-compare", "--emit", "plan", layout)  # fmt: skip
        assert made.exit_code == 0, made.output
    return "batch/plan.json", "mlp/plan.json"


def test_two_plans_are_compared_and_what_differs_is_named(pair: tuple[str, str]):
    found = json.loads(neocc("compare", *pair, "--json").stdout)
    written = [json.loads(Path(p).read_text())["predicted"] for p in pair]
    for side, predicted in zip((found["a"], found["b"]), written, strict=True):
        for name in ("step", "compute", "exposed", "hidden", "mfu"):
            assert side[name] == predicted[name]
        assert side["peak"] == predicted["peak_memory"]
    (up,) = [d for d in found["stored"] if d["what"] == "up"]
    assert (up["a"], up["b"]) == ("", "mlp:x") and up["cost_a"] == 4 * up["cost_b"]
    assert {d["what"] for d in found["collectives"]} == {"all-reduce on x"}
    assert sum(d["cost_a"] for d in found["collectives"]) == pytest.approx(
        sum(d["cost_a"] for d in found["moves"])
    )
    assert any("einsum" in d["what"] and d["a"] == "batch:x" for d in found["ops"])
    text = neocc("compare", *pair).stdout
    for words in ("than batch/plan.json", "Collectives", "Tensors stored otherwise"):
        assert words in text


def test_a_plan_and_itself_do_not_differ(pair: tuple[str, str]):
    found = json.loads(neocc("compare", pair[0], pair[0], "--json").stdout)
    assert found["a"] == found["b"]
    assert not any(found[kind] for kind in ("collectives", "ops", "moves", "stored"))
    assert "as fast as" in neocc("compare", pair[0], pair[0]).stdout


@pytest.mark.parametrize("who", ["neocc", "FSDP", "megatron"])
def test_a_plan_is_compared_with_who_would_plan_in_its_place(pair: tuple[str, str], who: str):
    result = neocc("compare", pair[1], who, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["b"]["verdict"] == "proved optimal"
    if who == "neocc":
        assert found["b"]["step"] <= found["a"]["step"]


def test_what_cannot_be_compared_is_told(plan: Path):
    assert "no plan file 'FSDP'" in refused("compare", "FSDP", str(plan))
    message = refused("compare", str(plan), "Alpa")
    assert "'Alpa'" in message and "'FSDP'" in message


def test_a_plan_of_a_decode_step_is_read_back_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    common = ("gpt.py", "--preset", "tiny", "--mesh", "2x2", "--no-compare")
    made = neocc("compile", *common, "--program", "decode", "--emit", "plan", "out")
    assert made.exit_code == 0, made.output
    assert "to read weights and cache once" in made.stdout
    again = neocc("compile", "--plan", "out/plan.json")
    assert again.exit_code == 0 and "to read weights and cache" in again.stdout
    assert neocc("compile", *common[:3], "--plan", "out/plan.json").exit_code == 0
    assert "tokens a step" in neocc("compile", *common, "--program", "prefill").stdout
    assert "--plan decides program" in refused(
        "compile", "--plan", "out/plan.json", "--program", "train"
    )
    assert "one of train, prefill, decode" in refused("compile", *common, "--program", "sample")
