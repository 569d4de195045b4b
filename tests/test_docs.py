"""What the documents tell a reader to type works, and what they list is what there is."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import jax
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from neocc.cli import PASSES, app
from neocc.cost.hardware import chip
from neocc.passes.layout.within import PATIENCE
from neocc.passes.plan import USABLE
from neocc.report.emit import KINDS
from tests.frontends import hf_models

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLAN = "out/plan.json"  # a command that reads it comes after one that writes it
MAKE_PLAN = "compile models/gpt.py --preset tiny --mesh 4 --no-compare --emit plan out"
HARDWARE = {
    "schema": 1,
    "chip": "h100",
    "device": {"kind": "NVIDIA H100 80GB HBM3", "count": 8},
    "date": "2026-11-25",
    "fields": {"matmul_efficiency": 0.61},
    "nominal": {},
    "row": None,
}
NEO = hf_models.NEO | {"vocab_size": 256, "num_layers": 2, "attention_types": [[["local"], 2]]}
# Folders that the documents write in one command and read in the next.
WRITTEN = {
    "weights": "convert gpt-neo-125m weights",
    "trained": "train gpt.py --mesh 1 --text models/gpt.py --steps 2 --batch 4 --init-from weights "
    "--save trained",
}
HEAVY = ("--audit", "hlo", "gpt3-13b")


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(path.read_text("utf-8")) if found == language]


def commands() -> list[str]:
    """Every neocc command in a shell block, once."""
    found = []
    for path in DOCUMENTS:
        for line in "\n".join(blocks(path, "sh")).splitlines():
            found += [c.strip() for c in line.split("#")[0].split("&&") if "neocc " in c]
    return list(dict.fromkeys(found))


def quick(command: str) -> bool:
    if PLAN in command or command.split()[1] in ("convert", "generate", "evaluate"):
        return True
    return "tiny" in command or "perceptron" in command or command.split()[2] == "models/gpt.py"


def parameters() -> list:
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(c, marks=marks[quick(c)], id=c) for c in commands()]


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: models/ of the repository, and the README's own model."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gpt.py").write_text((ROOT / "models" / "gpt.py").read_text())
    (model,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "perceptron.py").write_text(model)
    (tmp_path / "h100.calibrated.json").write_text(json.dumps(HARDWARE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOCC_DUMP", raising=False)
    jax.devices()  # as many as conftest asks for, whichever command comes first
    return tmp_path


@cache
def plan_text() -> str:
    assert CliRunner().invoke(app, MAKE_PLAN.split()).exit_code == 0
    return Path(PLAN).read_text("utf-8")


def made_plan(folder: Path) -> None:
    """Puts the plan that the documents write where they read it."""
    text = plan_text()
    (folder / "out").mkdir(exist_ok=True)
    (folder / PLAN).write_text(text)


def made_weights(folder: Path, arguments: list[str]) -> None:
    """Puts the checkpoints that a command reads where it reads them."""
    if not {"gpt-neo-125m", *WRITTEN} & set(arguments):
        return
    hf_models.write(folder / "gpt-neo-125m", NEO, hf_models.tensors(NEO))
    written = arguments[2] if arguments[0] == "convert" else option(arguments, "--save")
    for name, command in WRITTEN.items():
        if name == written:
            break
        assert CliRunner().invoke(app, command.split()).exit_code == 0
        if name in arguments:
            break


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


@pytest.mark.parametrize("command", parameters())
def test_a_documented_command_works(command: str, readers_folder: Path):
    name, *arguments = shlex.split(command)
    assert name == "neocc"
    if PLAN in command:
        made_plan(readers_folder)
    made_weights(readers_folder, arguments)
    result = CliRunner().invoke(app, arguments)
    # 1 is an answer too: it does not fit, and the report says what would; a machine is too busy to
    # be calibrated, and the reasons are told.
    fits = "does not fit:" not in result.stdout and "nothing was written" not in result.stderr
    assert result.exit_code == (0 if fits else 1), result.output
    if "--json" in arguments:
        assert json.loads(result.stdout).get("ok", True)
    if "--emit" in arguments:
        assert list((readers_folder / "out").iterdir())


def test_there_are_commands_to_test():
    assert len(commands()) >= 8
    assert any(map(quick, commands()))


def test_the_readme_opens_with_what_the_command_prints():
    """Its figures change with the models; its form is that of today's report."""
    shown = blocks(ROOT / "README.md", "")[0]
    assert shown.startswith("$ neocc compile models/gpt.py --mesh 8x16\n")
    for part in ("Layout", "Memory of a device", "Collectives of a step", "Time of a step",
                 "proved optimal", "What an expert would try", "data parallel", "FSDP",
                 "Megatron"):  # fmt: skip
        assert part in shown


def test_setting_up_is_one_command_each():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "pip install -e '.[dev]' && neocc compile models/gpt.py --mesh 8x16" in text
    assert "pip install -e '.[dev]' && pytest" in text


def options(command: str) -> set[str]:
    found = get_command(app).commands[command].params  # pyright: ignore[reportAttributeAccessIssue]
    return {o for p in found for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}


@pytest.mark.parametrize(
    "command",
    ["compile", "sweep", "explain", "compare", "train", "convert", "generate", "evaluate"],
)
def test_every_option_is_documented_and_none_that_is_not_there(command: str):
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    part = text.split(f"# neocc {command}\n")[1].split("\n# ")[0]
    first = (line.split(" | ")[0] for line in part.splitlines() if line.startswith("| `--"))
    documented = {o for cell in first for o in re.findall(r"`(--[a-z-]+)", cell)}
    assert documented == options(command) - {"--help"}


def test_help_lists_every_option():
    shown = CliRunner().invoke(app, ["compile", "--help"], env={"COLUMNS": "200"}).stdout
    for option in options("compile"):
        assert option in shown


def test_facts_of_the_cli_page():
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for name in re.findall(r"`(\w+)`", text.split("| `--target CHIP` |")[1].split("\n")[0]):
        chip(name)
    for name in PASSES:
        assert f"`{name}`" in text
    for kind in KINDS:
        assert f"`{kind}`" in text
    assert f"{USABLE:.0%}".replace("%", " %") in text
    assert f"within {PATIENCE:g} times" in text.replace("\n", " ")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_files_are_there(path: Path):
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
    for file in re.findall(r"`((?:neocc|models|docs|tests)/[\w./]+)`", text):
        assert (ROOT / file).exists(), file
