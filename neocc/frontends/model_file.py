"""A user's model file: finding it, loading it, building its training step.

The file defines ``PRESETS`` (name -> config, a dataclass) and ``train_step(config) -> Program``; if
it likes ``DEFAULT`` (a preset's name), ``config_from_gptneo(dict) -> config`` and ``init(config) ->
Program``; and, for a model that is sampled, ``decode_step`` and ``prefill``. Whatever goes wrong in
it is told with its file and line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import neocc
from neocc.frontends import gptneo
from neocc.ir.errors import Loc, NeoccError
from neocc.ir.json_object import read_object
from neocc.ir.program import Program

# GPT-Neo's dims, where this project's models call them otherwise.
GPTNEO_DIMS = {
    "sequence": "seq",
    "length": "seq",
    "embed_sequence": "seq",
    "memory_length": "memory",
    "intermediate_expanded": "mlp",
}


@dataclass(frozen=True)
class Model:
    """A configured model of a user's file.

    ``builds``: the function of the file that makes the program to plan. ``mesh`` and ``layout``:
    what its config file asks for, in this project's dim names; ``tokens`` of a microbatch on each
    replica, if it says that; ``notes`` for the report.
    """

    path: Path
    module: ModuleType
    name: str
    config: Any
    mesh: str | None = None
    layout: str | None = None
    notes: tuple[str, ...] = ()
    tokens: int | None = None
    builds: str = "train_step"

    def program(self) -> Program:
        """The program that is planned, by the function ``builds`` of the file; raises as
        ``train_step``, and where the file has no such function."""
        if not callable(getattr(self.module, self.builds, None)):
            raise NeoccError(f"{self.path} defines no {self.builds}(config) -> Program")
        return self._program(self.builds)

    def train_step(self) -> Program:
        """The program of one training step.

        Raises:
            NeoccError: the file's function raises, or returns something else; with file and line.
        """
        return self._program("train_step")

    def init(self) -> Program:
        """The program that makes the initial parameters and state; raises as ``train_step``."""
        if not hasattr(self.module, "init"):
            raise NeoccError(f"{self.path} defines no init(config): nothing to start training from")
        return self._program("init")

    def sampling(self, prompt: int, slots: int) -> tuple[Program, Program]:
        """The programs that sample: ``prefill`` of prompts of so many tokens at most, and
        ``decode_step``, with a cache of ``slots``; raises as ``program``."""
        for name in ("prefill", "decode_step"):
            if not callable(getattr(self.module, name, None)):
                raise NeoccError(f"{self.path} defines no {name}: its models cannot be sampled")
        return self._program("prefill", prompt, slots), self._program("decode_step", slots)

    def scoring(self, length: int) -> Program:
        """The program ``score`` of ``length`` tokens; raises as ``program``."""
        if not callable(getattr(self.module, "score", None)):
            raise NeoccError(f"{self.path} defines no score: its models cannot be evaluated")
        return self._program("score", length)

    def _program(self, function: str, *sizes: int) -> Program:
        with blamed_on(self.path):
            program = getattr(self.module, function)(self.config, *sizes)
        if not isinstance(program, Program):
            kind = type(program).__name__
            raise NeoccError(f"{self.path}: {function}(config) returns a {kind}, not a Program")
        return program

    def with_fields(self, **fields: Any) -> Model:
        """This model with some of its config's fields set.

        Raises:
            NeoccError: the config has no such field, or refuses the value.
        """
        for name in fields:
            if not self.has(name):
                raise NeoccError(f"the configs of {self.path} have no field {name!r} to set")
        with blamed_on(self.path):
            return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))

    def has(self, field: str) -> bool:
        """Whether the config has this field."""
        return dataclasses.is_dataclass(self.config) and hasattr(self.config, field)


def find(name: str) -> Path:
    """The file called ``name``: as a path, or among the models that ship with the package.

    Raises:
        NeoccError: neither; says what ships.
    """
    package = Path(neocc.__file__).parent
    shipped = [package / "models" / "shipped", package.parent / "models"]
    for path in (Path(name), *(folder / name for folder in shipped)):
        if path.is_file():
            return path
    known = sorted(p.name for folder in shipped for p in folder.glob("*.py"))
    raise NeoccError(
        f"no file {name!r}, here or among the models that ship with neocc ({', '.join(known)})"
    )


def load(name: str, preset: str | None = None, config: Path | None = None) -> Model:
    """The model of a file, with the config of a preset or of a GPT-Neo config file.

    Raises:
        NeoccError: there is no such file, preset or config; or the file raises, or lacks what it
            has to define. With the user's file and line where there is one.
    """
    path = find(name)
    if preset is not None and config is not None:
        raise NeoccError("give --preset or --config, not both")
    module = run(path)
    if not callable(getattr(module, "train_step", None)):
        raise NeoccError(
            f"{path} defines no train_step(config) -> Program; see 'Write a model' in the README"
        )
    if config is not None:
        return from_gptneo(path, module, config)
    presets = getattr(module, "PRESETS", None)
    if not isinstance(presets, Mapping) or not presets:
        raise NeoccError(f"{path} defines no PRESETS, a dict from a name to a config")
    chosen = preset or getattr(module, "DEFAULT", next(iter(presets)))
    if chosen not in presets:
        near = difflib.get_close_matches(chosen, presets, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise NeoccError(f"{path} has no preset {chosen!r}; {hint}it has {', '.join(presets)}")
    return Model(path, module, chosen, presets[chosen])


def run(path: Path) -> ModuleType:
    """The file as a module. Its folder is importable while it runs and after."""
    name = f"neocc_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NeoccError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses look their module up
    with blamed_on(path):
        spec.loader.exec_module(module)
    return module


def from_gptneo(path: Path, module: ModuleType, config: Path) -> Model:
    if not callable(getattr(module, "config_from_gptneo", None)):
        raise NeoccError(f"{path} defines no config_from_gptneo(dict), which --config needs")
    data = read_object(config)
    try:
        said = gptneo.read(data)
        with blamed_on(path):
            made = module.config_from_gptneo(data)
    except NeoccError as error:
        raise NeoccError(f"{config}: {error}") from None
    if dataclasses.is_dataclass(made) and hasattr(made, "name"):
        made = dataclasses.replace(made, name=config.stem)  # pyright: ignore[reportArgumentType]
    mesh, layout, notes = said.mesh, said.layout, list(said.notes)
    if mesh:
        mesh = ",".join(p.strip() for p in mesh.replace(";", ",").split(",") if p.strip())
    if layout:
        layout = our_dims(layout)
    return Model(path, module, config.stem, made, mesh, layout, tuple(notes), said.tokens)


def our_dims(layout: str) -> str:
    """A GPT-Neo layout string in this project's dim names."""
    rules = []
    for rule in filter(None, (r.strip() for r in layout.replace(";", ",").split(","))):
        dim, _, axis = (part.strip() for part in rule.partition(":"))
        rules.append(f"{GPTNEO_DIMS.get(dim, dim)}:{axis}")
    return ",".join(dict.fromkeys(rules))


@contextlib.contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Whatever is raised inside becomes an error that names the user's file and line.

    Raises:
        NeoccError: in place of any exception.
    """
    try:
        yield
    except SyntaxError as error:
        where = Loc(error.filename or str(path), error.lineno or 1)
        raise NeoccError(f"syntax error: {error.msg}", where) from error
    except NeoccError as error:
        if error.loc is not None:
            raise
        raise NeoccError(error.message, line_in(path, error)) from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise NeoccError(text, line_in(path, error)) from error


def line_in(path: Path, error: BaseException) -> Loc:
    """The innermost line of the file, or of one beside it, that an exception came through."""
    folder = path.resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve() == path.resolve()]
    beside = [f for f in frames if Path(f.filename).resolve().parent == folder]
    frame = (beside or own or [None])[-1]
    if frame is None or frame.lineno is None:
        return Loc(str(path), 1)
    inside = Path(frame.filename).resolve() == path.resolve()
    return Loc(str(path) if inside else frame.filename, frame.lineno)
