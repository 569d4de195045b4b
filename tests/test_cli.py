"""The command, from its arguments to its exit code."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import neocc
from neocc.cli import app, bytes_of
from neocc.cost.hardware import chip
from neocc.ir.errors import NeoccError
from neocc.ir.text import parse_partitioned, parse_program
from neocc.lower.audit import Audit
from neocc.report.certificate import PROVED

ROOT = Path(__file__).parent.parent
GPT = str(ROOT / "models" / "gpt.py")
TINY = ("--preset", "tiny", "--mesh", "2x2", "--no-compare")

NEO = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_vocab": 64,
    "n_ctx": 16,
    "train_batch_size": 8,
    "attention_types": [[["global"], 2]],
    "mesh_shape": "x:2,y:2",
    "layout": "batch:x,heads:y,intermediate_expanded:y",
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is written by mistake is found, and no environment of the caller's counts."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("NEOCC_DUMP", "NEOCC_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def neocc_compile(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compile", *arguments])


def refused(*arguments: str) -> str:
    """The message of a call that ends with code 2: no traceback, and nothing written."""
    result = neocc_compile(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(Path.cwd().iterdir()) == []
    message = result.stderr
    assert len(message.strip().splitlines()) <= 2
    return message


def model(tmp_path: Path, source: str) -> str:
    path = tmp_path / "model.py"
    path.write_text(source)
    return str(path)


def config(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**NEO, **changes}))
    return str(path)


# What it prints


def test_compile_shows_the_report():
    result = neocc_compile(GPT, *TINY)
    assert result.exit_code == 0, result.output
    for words in ("27.8 k parameters", "64 tokens a step", "x:2,y:2", "TPU v5e", "proved optimal"):
        assert words in result.stdout
    for part in ("Layout", "Memory of a device", "Collectives", "Time of a step"):
        assert part in result.stdout
    assert result.stderr == ""


def test_a_shipped_model_is_found_by_its_name_from_any_folder():
    assert not Path("gpt.py").exists()
    assert neocc_compile("gpt.py", *TINY).exit_code == 0


def test_a_file_of_that_name_comes_before_the_shipped_one():
    Path("gpt.py").write_text(
        "PRESETS = {'own': 1}\ndef train_step(config):\n  raise KeyError('own')"
    )
    result = neocc_compile("gpt.py", "--mesh", "2x2")
    assert result.exit_code == 2
    assert "gpt.py:3" in result.stderr


def test_a_model_may_import_what_lies_beside_it(tmp_path: Path):
    (tmp_path / "beside_the_model.py").write_text("SIZE = 8\n")
    path = model(
        tmp_path,
        "from beside_the_model import SIZE\nimport neocc\nPRESETS = {'a': SIZE}\n"
        "def train_step(n):\n  g = neocc.Graph('g')\n  w = g.parameter('w', (neocc.Dim('n', n),))\n"
        "  return g.build({'w': w * 0.5})\n",
    )
    result = neocc_compile(path, "--mesh", "2")
    assert result.exit_code == 0, result.output


def test_batch_sets_the_tokens_of_a_step():
    result = neocc_compile(GPT, *TINY, "--batch", "8", "--json")
    assert json.loads(result.stdout)["model"]["tokens_per_step"] == 8 * 16


def test_a_layout_is_obeyed():
    result = neocc_compile(GPT, *TINY, "--layout", "batch:x,heads:y,mlp:y", "--json")
    layouts = json.loads(result.stdout)["plan"]["layouts"]
    assert layouts["h0.attn.q"]["words"] == "heads on y"
    assert layouts["h0.mlp.fc"]["axes"] == {"x": None, "y": "mlp"}
    assert layouts["tokens"]["axes"] == {"x": "batch", "y": None}


def test_print_after_prints_a_program_that_parses_back():
    layout = ("--layout", "batch:x,heads:y")
    result = neocc_compile(GPT, *TINY, *layout, "--print-after", "partition")
    program, mesh = parse_partitioned(result.stdout)
    assert str(mesh) == "x:2,y:2"
    assert any(op.kind == "all_reduce" for op in program.body.walk())


def test_time_passes_names_the_stages():
    result = neocc_compile(GPT, *TINY, "--time-passes")
    for stage in ("build", "simplify", "plan"):
        assert stage in result.stdout.split("Time of each stage")[1]


def test_version():
    assert neocc.__version__ in CliRunner().invoke(app, ["--version"]).stdout


# Configs of GPT-Neo


def test_a_config_is_compiled_with_its_own_mesh_and_layout(tmp_path: Path):
    result = neocc_compile(GPT, "--config", config(tmp_path), "--no-compare", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["plan"]["mesh"] == [{"axis": "x", "size": 2}, {"axis": "y", "size": 2}]
    assert report["plan"]["layouts"]["h0.mlp.fc"]["words"] == "mlp on y"
    assert any("layout are the config's" in note for note in report["notes"])


def test_a_mesh_that_is_given_counts_and_the_config_is_noted(tmp_path: Path):
    result = neocc_compile(
        GPT, "--config", config(tmp_path), "--mesh", "4", "--no-compare", "--json"
    )
    report = json.loads(result.stdout)
    assert report["plan"]["mesh"] == [{"axis": "x", "size": 4}]
    assert any("not used" in note for note in report["notes"])


def test_a_config_key_that_is_unknown_is_told_with_the_nearest(tmp_path: Path):
    message = refused(GPT, "--config", config(tmp_path, n_layers=2), "--mesh", "2x2")
    assert "'n_layers'" in message and "'n_layer'" in message


def test_attention_types_of_the_wrong_length(tmp_path: Path):
    path = config(tmp_path, attention_types=[[["global"], 3]])
    message = refused(GPT, "--config", path, "--mesh", "2x2")
    assert "3 layers" in message and "n_layer is 2" in message


def test_a_config_that_is_no_json(tmp_path: Path):
    (tmp_path / "bad.json").write_text("{")
    assert "not JSON" in refused(GPT, "--config", str(tmp_path / "bad.json"), "--mesh", "2x2")


def test_a_config_that_is_not_there():
    assert "none.json" in refused(GPT, "--config", "none.json", "--mesh", "2x2")


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mesh", "8x"), ["8x", "8x16"]),
        (("--mesh", "0x4"), ["size 0", "at least 1"]),
        (("--mesh", "x:2,x:2"), ["names one axis twice"]),
        ((), ["--mesh 8x16"]),
        (("--mesh", "2x2", "--target", "v5q"), ["v5q", "v5p"]),
        (("--mesh", "2x2", "--preset", "gpt3-xxl"), ["gpt3-xxl", "gpt3-xl"]),
        (("--mesh", "2x2", "--layout", "hedas:x"), ["hedas", "heads"]),
        (("--mesh", "2x2", "--layout", "heads:z"), ["'z'", "x, y"]),
        (("--mesh", "2x2", "--layout", "heads"), ["dim:axis"]),
        (("--mesh", "2x2", "--layout", "batch:x,heads:x"), ["batch", "heads", "'x'", "meet"]),
        (("--mesh", "2x2", "--memory", "lots"), ["lots", "12GiB"]),
        (("--mesh", "2x2", "--emit", "irr", "out"), ["irr", "stablehlo"]),
        (("--mesh", "2x2", "--print-after", "fuse"), ["fuse", "partition"]),
        (("--mesh", "2x2", "--target", "v100", "--audit"), ["v100", "h100"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_told(arguments: tuple[str, ...], said: list[str]):
    preset = () if "--preset" in arguments else ("--preset", "tiny")
    message = refused(GPT, *preset, "--no-compare", *arguments)
    for words in said:
        assert words in message


def test_a_batch_below_one_is_refused():
    result = neocc_compile(GPT, *TINY, "--batch", "0")
    assert result.exit_code == 2
    assert "--batch" in result.stderr


# Bad model files


def test_a_model_that_is_not_there():
    message = refused("none.py", "--mesh", "2x2")
    assert "none.py" in message and "gpt.py" in message


@pytest.mark.parametrize(
    ("source", "line", "said"),
    [
        ("PRESETS = {'a': 1}\ndef train_step(c):\n  return c / 0\n", 3, "ZeroDivisionError"),
        ("import nothing_of_that_name\n", 1, "nothing_of_that_name"),
        ("x = 1\ny = (\n", 2, "syntax error"),
        ("PRESETS = {'a': 1}\nraise RuntimeError('out of order')\n", 2, "out of order"),
    ],
    ids=["raises in train_step", "import fails", "syntax", "raises when loaded"],
)
def test_a_model_that_raises_is_told_with_its_line(
    tmp_path: Path, source: str, line: int, said: str
):
    path = model(tmp_path, source)
    message = refused(path, "--mesh", "2x2")
    assert f"{path}:{line}" in message
    assert said in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("PRESETS = {'a': 1}\n", "train_step"),
        ("def train_step(c):\n  return c\n", "PRESETS"),
        ("PRESETS = {'a': 1}\ndef train_step(c):\n  return 7\n", "returns a int, not a Program"),
    ],
    ids=["no train_step", "no presets", "no program"],
)
def test_a_model_that_lacks_something_is_told(tmp_path: Path, source: str, said: str):
    path = model(tmp_path, source)
    message = refused(path, "--mesh", "2x2")
    assert path in message and said in message


@pytest.mark.parametrize(
    "second", ["g.parameter('b', (Dim('n', 8),))", "iota(a, Dim('n', 8), 'f32')"]
)
def test_two_sizes_under_one_dim_name_are_told_with_the_line(tmp_path: Path, second: str):
    path = model(
        tmp_path,
        "from neocc import Dim, Graph, iota\nPRESETS = {'a': 1}\ndef train_step(c):\n"
        f"  g = Graph('g')\n  a = g.parameter('a', (Dim('n', 4),))\n  b = {second}\n"
        "  return g.build({'c': a + b})\n",
    )
    message = refused(path, "--mesh", "2x2")
    assert f"{path}:6" in message or f"{path}:7" in message
    assert "'n'" in message and "4" in message and "8" in message


# Files


def test_emitted_programs_parse_back_and_the_plan_is_whole(tmp_path: Path):
    out = tmp_path / "out"
    result = neocc_compile(GPT, *TINY, "--emit", "ir,plan", str(out))
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["partitioned.ir", "plan.json", "program.ir"]
    before = parse_program((out / "program.ir").read_text())
    after, mesh = parse_partitioned((out / "partitioned.ir").read_text())
    assert mesh is not None and mesh.size == 4
    assert [i.name for i in before.inputs] == [i.name for i in after.inputs]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["schema"] == 1
    assert {c["id"] for c in plan["report"]["collectives"]} <= {
        op.attrs["id"] for op in after.body.walk() if "id" in op.attrs
    }


def test_every_stage_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEOCC_DUMP", str(tmp_path / "dump"))
    assert neocc_compile(GPT, *TINY).exit_code == 0
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["00-build.ir", "01-simplify.ir", "02-pad.ir", "03-partition.ir", "plan.json"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = refused(GPT, *TINY, "--emit", "ir", str(tmp_path / "file" / "out"))
    assert "cannot write" in message


@pytest.mark.tpu_compiler
def test_stablehlo_is_that_of_the_target(tmp_path: Path):
    out = tmp_path / "out"
    result = neocc_compile(GPT, *TINY, "--emit", "stablehlo", str(out))
    assert result.exit_code == 0, result.output
    assert "stablehlo." in (out / "step.stablehlo.mlir").read_text()


# Does it fit


# What one device holds of x and y shrinks with the batch; the weights stay.
ONE_PRODUCT = """
from dataclasses import dataclass
from neocc import Dim, Graph, einsum
@dataclass(frozen=True)
class Config:
    batch: int = 4096
PRESETS = {"one": Config()}
def train_step(c):
    g = Graph("one")
    w = g.parameter("w", (Dim("embd", 64), Dim("mlp", 64)))
    x = g.data("x", (Dim("batch", c.batch), Dim("embd", 64)), "f32")
    y = einsum(x, w, "batch mlp")
    return g.build({"y": y})
"""


def test_a_plan_that_does_not_fit_says_what_would(tmp_path: Path):
    path = model(tmp_path, ONE_PRODUCT)
    arguments = (path, "--mesh", "2", "--no-compare", "--memory", "600KiB")
    result = neocc_compile(*arguments)
    assert result.exit_code == 1, result.output
    for words in ("does not fit", "largest at the fullest point", "it fits with", "--batch"):
        assert words in result.stdout
    report = json.loads(neocc_compile(*arguments, "--json").stdout)
    assert report["ok"] is False
    assert report["plan"]["memory"]["peak"] > 600 * 1024
    assert {r["arguments"].split()[0] for r in report["remedies"]} == {"--batch", "--mesh"}
    for remedy in report["remedies"]:
        again = neocc_compile(*arguments, *remedy["arguments"].split(), "--json")
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["plan"]["peak_memory"] == remedy["peak"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("600KiB", 600 * 1024), ("14e9", 14e9), ("12 GiB", 12 * 2**30), ("16GB", 16e9), ("1", 1)],
)
def test_amounts_of_memory(text: str, size: float):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "-1GiB", "GiB", "12 quarts", "nan"])
def test_what_is_no_amount_of_memory(text: str):
    with pytest.raises(NeoccError):
        bytes_of(text)


# The audit's exit code, and faults of our own


@pytest.mark.parametrize("ok", [True, False])
def test_a_failed_audit_ends_with_1(ok: bool, monkeypatch: pytest.MonkeyPatch):
    def fake(plan: neocc.Plan) -> Audit:
        flops, peak = plan.flops, plan.memory.peak
        return Audit((), flops, flops if ok else 2 * flops, peak, peak, peak, (), {})

    monkeypatch.setattr("neocc.backends.target.audit_for_target", fake)
    result = neocc_compile(GPT, *TINY, "--audit")
    assert result.exit_code == (0 if ok else 1), result.output
    assert ("DIFFER" in result.stdout) is not ok


def test_a_bug_is_told_with_where_its_traceback_is(monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: Any) -> None:
        raise AssertionError("the roof is off")

    monkeypatch.setattr("neocc.cli.compile_model", broken)
    result = neocc_compile(GPT, *TINY)
    assert result.exit_code == 3
    assert "bug in neocc" in result.stderr and "the roof is off" in result.stderr
    log = Path(result.stderr.split("The traceback is in ")[1].split(";")[0])
    assert "AssertionError" in log.read_text()
    os.unlink(log)


# The public API


def test_the_example_of_the_package_docstring():
    from models import gpt

    step = neocc.simplify(gpt.train_step(gpt.PRESETS["tiny"]))
    plan = neocc.make_plan(step, neocc.Mesh.parse("2x2"), neocc.chip("v5p"))
    assert plan.timeline.step > 0 and plan.memory.peak > 0
    assert plan.solution.gap < PROVED
    assert plan.chip is chip("v5p")


def test_every_public_name_is_there():
    for name in neocc.__all__:
        assert getattr(neocc, name) is not None
    with pytest.raises(AttributeError):
        _ = neocc.nothing


def test_the_default_preset_is_one():
    from models import gpt

    assert gpt.DEFAULT in gpt.PRESETS
    assert dataclasses.is_dataclass(gpt.PRESETS[gpt.DEFAULT])


def test_chips_find_the_mesh_and_say_what_was_searched(tmp_path: Path):
    done = CliRunner().invoke(app, ["compile", "gpt.py", *TINY_ON_CHIPS, "--no-compare"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "outer choices: 2 meshes, axes in ascending order, on every mapping" in text


def test_a_sweep_prints_a_line_a_mesh_and_json():
    done = CliRunner().invoke(app, ["sweep", "gpt.py", *TINY_ON_CHIPS, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)
    assert {row["mesh"] for row in rows} == {"x:4", "x:2,y:2"}
    assert any(row["frontier"] for row in rows)
    shown = CliRunner().invoke(app, ["sweep", "gpt.py", *TINY_ON_CHIPS])
    assert "seconds a step against GiB a device" in shown.output


TINY_ON_CHIPS = ("--preset", "tiny", "--chips", "4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compile", "gpt.py", "--chips", "4", "--mesh", "2x2"], "give --chips or --mesh"),
        (["compile", "gpt.py", "--mesh", "2x2", "--microbatches", "few"], "a number above 0"),
        (["compile", "gpt.py", "--preset", "tiny", "--mesh", "2", "--microbatches", "3"], "divide"),
        (["sweep", "gpt.py", "--chips", "4,none"], "no list of numbers above 0"),
    ],
)
def test_outer_choices_that_make_no_sense_are_refused(arguments: list[str], says: str):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and says in done.output
