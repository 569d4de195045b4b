"""ir <- cost <- passes <- lower <- backends <- runtime <- cli; the others hang off the side."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "neocc"

# Parts on one line are of one rank and may import each other.
RANKS = (
    {"version"},
    {"ir"},
    {"nn", "optim"},  # what models are written with
    {"cost"},
    {"passes"},
    {"lower"},
    {"backends"},
    {"runtime", "models", "data"},
    {"cli"},
)
SIDE = {"frontends", "report"}  # may import anything but the cli and the runtime's internals
TOP = {"__init__", "__main__"}  # the public API and the entry point may import anything


def rank(part: str) -> int:
    found = [i for i, parts in enumerate(RANKS) if part in parts]
    assert found, f"neocc.{part} has no place in the order: give it one in RANKS or SIDE"
    return found[0]


def parts() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__pycache__"
    }


def imported(source: str, module: str) -> set[str]:
    """The dotted neocc modules that a module's source imports, wherever in it they are.

    ``from neocc import ir`` counts as ``neocc.ir``; a relative import is resolved against
    ``module``, whose last component is the file's own name (``__init__`` for a package).
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return {name for name in found if name.split(".")[0] == "neocc"}


def violations(source: str, module: str) -> list[str]:
    """Imports in a module's source that the order does not allow."""
    part = module.split(".")[1]
    if part in TOP:
        return []
    return [
        f"{module} imports {name}"
        for name in sorted(imported(source, module))
        if not allowed(part, name.split("."))
    ]


def allowed(part: str, names: list[str]) -> bool:
    """Whether code in ``neocc.<part>`` may import the module with these dotted names."""
    target = names[1] if len(names) > 1 else "__init__"
    if target == part:
        return True
    if target not in SIDE | set().union(*RANKS):  # a name out of the public API, neocc itself
        return part in SIDE or rank(part) == rank("cli")
    if part in SIDE:
        # The public face of the runtime is `from neocc.runtime import Name`.
        return target != "cli" and not (target == "runtime" and len(names) > 3)
    if target in SIDE:
        return rank(part) == rank("cli")
    return rank(target) <= rank(part)


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_every_part_of_the_package_has_a_rank():
    known = SIDE | TOP | set().union(*RANKS)
    assert parts() <= known, f"give these a place in the order: {sorted(parts() - known)}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=[m for m, _ in modules()])
def test_module_imports_only_from_below(module: str, path: Path):
    assert violations(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import neocc.passes", "neocc.ir.program"),
        ("from neocc.cost import hardware", "neocc.ir.ops.base"),
        ("from neocc import cost", "neocc.ir"),
        ("def f():\n    from neocc.lower import audit", "neocc.cost.roofline"),
        ("from ...lower import audit", "neocc.passes.layout.solve"),
        ("from ..cli import main", "neocc.runtime.train"),
        ("import neocc.cli", "neocc.report.terminal"),
        ("from neocc.runtime.train import step", "neocc.report.terminal"),
        ("from neocc.report import terminal", "neocc.passes.simplify"),
        ("from neocc import Mesh", "neocc.passes.simplify"),
        ("import neocc", "neocc.ir.types"),
    ],
)
def test_an_import_against_the_order_is_found(source: str, module: str):
    assert violations(source, module) != []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from neocc.ir import mesh\nimport math", "neocc.cost.topology"),
        ("from . import types", "neocc.ir.program"),
        ("from neocc.cost.hardware import chip", "neocc.passes.layout.problem"),
        ("from neocc.passes import layout\nfrom neocc import lower", "neocc.report.terminal"),
        ("from neocc.report import terminal\nimport neocc.runtime.train", "neocc.cli"),
        ("from neocc.cli import main", "neocc.__main__"),
    ],
)
def test_an_import_along_the_order_passes(source: str, module: str):
    assert violations(source, module) == []
