"""Convert a checkpoint: open one of any kind, check it whole, write one of any kind, streaming.

Nothing is written before every tensor of the source was found, in its full length and of the right
shape. What is written is under its name only when all of it is on the disk.
"""

from __future__ import annotations

import dataclasses
import shutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neocc.frontends import huggingface, mesh_tf, model_file
from neocc.frontends.model_file import Model
from neocc.frontends.weights import hf_folder
from neocc.frontends.weights.forms import (
    Form,
    Tensor,
    as_tensor,
    check_tensors,
    dtype_of,
    is_moment,
    model_form,
)
from neocc.ir.errors import NeoccError
from neocc.ir.program import Program
from neocc.ir.text import print_program
from neocc.runtime import (
    CheckpointError,
    ModelOf,
    Planned,
    is_checkpoint,
    leftovers,
    read_checkpoint,
    whole,
    write_checkpoint,
)

KINDS = ("neocc", "hf", "mtf")
# Where the dims of a weight of models/gpt.py are parted into a matrix's sides; others are vectors.
SIDES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("wte", "wpe", "wpe_1", "wpe_2", "head.w", "moe.gate"), (1,)),
    **dict.fromkeys((f"attn.{n}" for n in "qkv"), (1,)),
    "attn.o": (2,),
    **{f"{mlp}.{n}": (1,) for mlp in ("mlp", "macaron") for n in ("fc", "gate", "proj")},
    **dict.fromkeys(("attn.mem_k", "attn.mem_v", "moe.up", "moe.down"), (1, 2)),
}
# Fields of models/gpt.py's Config that no checkpoint decides, and that the forward pass shows.
RUN_FIELDS = ("name", "batch", "z_loss", "dtype", "param_dtype", "recompute", "attention_kernel")
# Weights that GPT-2 has as zeros where the model has none.
ZEROS = ("attn.q_b", "attn.k_b", "attn.v_b")
TORCH = {"float32": "float32", "float64": "float64", "bfloat16": "bfloat16", "float16": "float16"}


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found whole. ``form``: of what is there of ``tensors``; ``step``: how
    many it was trained; ``beside``: files that go along."""

    kind: str
    path: Path
    model: Model
    file: str
    program: Program
    form: Form
    tensors: Mapping[str, Tensor]
    step: int
    beside: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether it has the optimizer's moments."""
        return any(is_moment(w, self.form.parts) for w in self.form.parts)


@dataclass(frozen=True)
class Conversion:
    """What was converted. ``bytes``: of the tensors that were written."""

    source: Source
    kind: str
    path: Path
    tensors: int
    bytes: int
    notes: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    kind: str,
    config: Path | None = None,
    model: str = "gpt.py",
    most: float = 4e9,
) -> Conversion:
    """Writes the checkpoint ``source`` as one of ``kind`` to the folder ``target``.

    ``config``: the GPT-Neo config that a checkpoint of GPT-Neo's own goes with. ``model``: the
    model file that has it. ``most``: bytes of a file, unless one tensor has more.

    Raises:
        NeoccError: what ``source`` is cannot be told, it is not whole or of another model, ``kind``
            cannot have that model, or ``target`` is there already.
    """
    if kind not in KINDS:
        raise NeoccError(f"no kind of checkpoint {kind!r}; one of {', '.join(KINDS)}")
    if target.exists():
        raise NeoccError(f"{target} is there already: give another name, or remove it")
    found = open_source(source, config, model)
    notes = list(found.notes)
    notes += [f"left behind by a conversion that was killed: {p}" for p in leftovers(target)]
    if kind == "hf":
        writer = hf_writer(found, most, notes)
    elif kind == "mtf":
        writer = mtf_writer(found, most, notes)
    else:
        writer = neocc_writer(found, most)
    with whole(target) as folder:
        planned = writer(folder)
        for file in found.beside if kind != "mtf" else ():
            shutil.copyfile(file, folder / file.name)
    return Conversion(
        found, kind, target, len(planned), sum(t.nbytes for t in planned), tuple(notes)
    )


def open_source(path: Path, config: Path | None = None, model: str = "gpt.py") -> Source:
    """The checkpoint at ``path``, of whatever kind it is.

    Raises:
        NeoccError: none of the kinds, or not a whole one of its model.
    """
    prefix = mesh_tf.prefix_of(path)
    if config is not None and (is_checkpoint(path) or hf_folder.is_folder(path)):
        raise NeoccError(f"{path} says itself what model it is of: leave --config out")
    if is_checkpoint(path):
        return open_neocc(path)
    if hf_folder.is_folder(path):
        return open_huggingface(path, model)
    if prefix is not None:
        return open_mesh_tf(prefix, config, model)
    what = "there is nothing at" if not path.exists() else "nothing that neocc knows is at"
    raise NeoccError(
        f"{what} {path}: a checkpoint is a folder of neocc's (manifest.json), of Hugging Face's "
        "(config.json, *.safetensors), or GPT-Neo's model.ckpt-STEP"
    )


def open_neocc(path: Path) -> Source:
    saved = read_checkpoint(path)
    model = saved_model(saved.model, path)
    program = model.train_step()
    types = {i.name: v.type for i, v in program.named_inputs if i.role != "data"}
    for name, type in types.items():
        parameter = program_role(program, name) == "parameter"
        if parameter or name in saved.tensors:
            saved.find(name, type)
    if others := sorted(saved.tensors.keys() - types.keys()):
        raise CheckpointError(f"tensor {others[0]!r} of {path} is none of {model.name}")
    saved.verify()
    form = model_form(program, SIDES).only(saved.tensors)
    beside = tuple(path / n for n in hf_folder.BESIDE if (path / n).is_file())
    file = saved.model.file
    return Source("neocc", path, model, file, program, form, saved.tensors, saved.step, beside)


def program_role(program: Program, name: str) -> str:
    return next(i.role for i in program.inputs if i.name == name)


def saved_model(saved: ModelOf, path: Path) -> Model:
    """The model of a checkpoint's manifest.

    Raises:
        NeoccError: its file is not there, or has no such config.
    """
    try:
        file = model_file.find(saved.file)
        module = model_file.run(file)
        kind: Any = type(next(iter(module.PRESETS.values())))
        known = {f.name for f in dataclasses.fields(kind)}
        if strange := sorted(saved.config.keys() - known):
            raise NeoccError(f"the configs of {file} have no field {strange[0]!r}")
        with model_file.blamed_on(file):
            config = restored(kind, saved.config)
    except NeoccError as error:
        raise NeoccError(f"the model of {path}: {error}") from None
    return Model(file, module, saved.name, config)


def restored(kind: Any, fields: Mapping[str, Any]) -> Any:
    """A dataclass of what ``dataclasses.asdict`` and JSON made of it, those inside it too."""
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in fields.items():
        inner = [h for h in (hints[name], *typing.get_args(hints[name])) if is_dataclass(h)]
        made[name] = restored(inner[0], value) if inner and value is not None else tupled(value)
    return kind(**made)


def tupled(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def open_huggingface(path: Path, model: str) -> Source:
    data, tensors = hf_folder.open_folder(path)
    where = str(path / hf_folder.CONFIG)
    made = model_of(model, "config_from_huggingface", data, path.resolve().name, where, tensors)
    program = made.train_step()
    weights = parameters(model_form(program, SIDES))
    family = huggingface.read_config(data).family
    form = huggingface.tensor_form(family, weights)
    check_tensors(str(path), f"{family.architecture} of these sizes", form, tensors)
    beside = tuple(path / n for n in hf_folder.BESIDE if (path / n).is_file())
    return Source("hf", path, made, model, program, form, tensors, 0, beside)


def model_of(
    file: str, function: str, data: dict, name: str, where: str, tensors: Mapping[str, Tensor] = {}
) -> Model:
    """The model that a function of the model file makes of a config."""
    path = model_file.find(file)
    module = model_file.run(path)
    if not callable(getattr(module, function, None)):
        raise NeoccError(f"{path} defines no {function}, which such a checkpoint needs")
    try:
        with model_file.blamed_on(path):
            config = getattr(module, function)(data, name)
    except NeoccError as error:
        first = next(iter(tensors), None)
        own = f" (of its tensors, {first!r} is the first)" if first else ""
        raise NeoccError(f"{where}: {error.message}{own}") from None
    return Model(path, module, name, config)


def open_mesh_tf(prefix: Path, config: Path | None, model: str) -> Source:
    if config is None:
        raise NeoccError(f"{prefix} does not say what model it is of: give its --config FILE")
    made = model_file.load(model, None, config)
    program = made.train_step()
    every = model_form(program, SIDES)
    form = mesh_tf.variable_form(every.weights, *mesh_tf.made_by(made.config))
    variables = mesh_tf.open_checkpoint(prefix, form.shapes)
    step = variables.pop(mesh_tf.STEP, None)
    others = [n for n in variables if mesh_tf.SLOT.fullmatch(n) and n not in form.shapes]
    for name in others:
        del variables[name]
    notes = []
    if others:
        kind = "Adafactor" if mesh_tf.ADAFACTOR.fullmatch(others[0]) else "Adam"
        notes.append(
            f"{kind}'s state is left out: the state of {made.name}'s optimizer has other tensors"
        )
    state = {p.tensor for w, p in form.parts.items() if is_moment(w, form.parts)}
    if not state & variables.keys():
        form = form.only(form.shapes.keys() - state)
    check_tensors(str(prefix), made.name, form, variables)
    taken = int(step.value()) if step is not None else 0
    return Source("mtf", prefix, made, model, program, form, variables, taken, notes=tuple(notes))


def parameters(form: Form) -> dict[str, tuple[int, ...]]:
    """The weights of a form that are no moments."""
    return {w: shape for w, shape in form.weights.items() if not is_moment(w, form.weights)}


def plan(to: Form, source: Source) -> list[Planned]:
    """The tensors to write, each in the dtype that it has in the source."""
    default = next(iter(source.tensors.values())).dtype
    return [
        Planned(n, dtype_of(to, n, source.form, source.tensors, default), shape)
        for n, shape in to.shapes.items()
    ]


def produced(to: Form, source: Source, constants: Mapping[str, np.ndarray] | None = None) -> Any:
    def produce(tensor: Planned) -> Iterator[np.ndarray]:
        if constants and tensor.name in constants:
            return iter([constants[tensor.name]])
        return as_tensor(to, tensor.name, source.form, source.tensors, tensor.dtype)

    return produce


def neocc_writer(source: Source, most: float) -> Any:
    every = model_form(source.program, SIDES)
    form = every.only(
        n for n, held in every.held.items() if all(w in source.form.parts for w in held)
    )
    tensors = plan(form, source)
    types = {i.name: v.type for i, v in source.program.named_inputs}
    constants = {}
    if source.trained and "step" in types:
        constants["step"] = np.asarray(source.step, np.int32)
        tensors.append(Planned("step", np.dtype(np.int32), ()))
    dims = {t.name: [(d.name, d.size) for d in types[t.name].dims] for t in tensors}
    saved = ModelOf(source.file, source.model.name, dataclasses.asdict(source.model.config))
    produce = produced(form, source, constants)

    def write(folder: Path) -> list[Planned]:
        write_checkpoint(folder, saved, source.step, tensors, dims, produce, most)
        return tensors

    return write


def hf_writer(source: Source, most: float, notes: list[str]) -> Any:
    c = source.model.config
    first = next(iter(source.tensors.values())).dtype
    family, config = huggingface.write_config(c, TORCH[first.name])
    weights = parameters(source.form)
    if family is huggingface.GPT2:
        fill = {f"h{i}.{z}": (c.embd,) for i in range(c.layers) for z in ZEROS}
        if not weights.keys() >= fill.keys():
            notes.append("GPT-2 has biases of queries, keys and values; this model none: zeros")
        weights |= {w: shape for w, shape in fill.items() if w not in weights}
    form = huggingface.tensor_form(family, weights)
    check_same_model(source, family, config)
    if source.trained:
        notes.append("Hugging Face's checkpoints have no optimizer state: left out")
    tensors = plan(form, source)

    def write(folder: Path) -> list[Planned]:
        hf_folder.write_folder(folder, config, tensors, produced(form, source), most)
        return tensors

    return write


def check_same_model(source: Source, family: huggingface.Family, config: Mapping[str, Any]) -> None:
    """Whether a Hugging Face config, read back, makes the very program of the source's model.

    Raises:
        NeoccError: it makes another: the model has an option that the config has no word for.
    """
    module, c = source.model.module, source.model.config
    back = module.config_from_huggingface(dict(config), source.model.name)
    back = dataclasses.replace(back, **{n: getattr(c, n) for n in RUN_FIELDS})
    wanted = dataclasses.replace(c, qkv_bias=True) if family is huggingface.GPT2 else c
    if print_program(module.forward(back)) == print_program(module.forward(wanted)):
        return
    fields = [f.name for f in dataclasses.fields(c) if f.name not in RUN_FIELDS]
    differing = []
    for name in fields:
        if getattr(wanted, name) != getattr(back, name):
            other = dataclasses.replace(back, **{name: getattr(wanted, name)})
            if print_program(module.forward(other)) != print_program(module.forward(back)):
                differing.append(f"{name} = {getattr(wanted, name)!r}")
    raise NeoccError(
        f"{family.architecture} cannot compute what {source.model.name} does: "
        f"{', '.join(differing) or 'its forward pass is another'}"
    )


def mtf_writer(source: Source, most: float, notes: list[str]) -> Any:
    mesh_tf.tensorflow()
    form = mesh_tf.variable_form(source.form.weights, *mesh_tf.made_by(source.model.config))
    if len(form.parts) < len(source.form.parts):
        notes.append("Adafactor's state of mlp_glu has no place in GPT-Neo's checkpoints: left out")
    constants = {mesh_tf.STEP: np.asarray(source.step, np.int64)}
    tensors = [*plan(form, source), Planned(mesh_tf.STEP, np.dtype(np.int64), ())]
    produce = produced(form, source, constants)
    notes.append("GPT-Neo's checkpoints do not say what model they are of: keep its config")

    def write(folder: Path) -> list[Planned]:
        mesh_tf.write_checkpoint(folder, f"model.ckpt-{source.step}", tensors, produce, most)
        return tensors

    return write
