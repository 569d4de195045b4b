"""A checkpoint of any kind, to run its model."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from neocc.frontends.model_file import Model
from neocc.frontends.weights.convert import convert, saved_model
from neocc.runtime import Checkpoint, is_checkpoint, read_checkpoint


@contextlib.contextmanager
def loaded(
    path: Path, config: Path | None = None, model: str = "gpt.py"
) -> Iterator[tuple[Model, Checkpoint]]:
    """The model of a checkpoint and its tensors. One that is not neocc's own is converted, as
    ``convert`` does, to a temporary folder, which is there while the context is.

    Raises:
        NeoccError: as ``convert``, or the model of neocc's own is not there.
    """
    with contextlib.ExitStack() as stack:
        if not is_checkpoint(path) or config is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neocc-")))
            path = convert(path, folder / path.resolve().name, "neocc", config, model).path
        saved = read_checkpoint(path)
        saved.verify()
        yield saved_model(saved.model, path), saved


def end_tokens(checkpoint: Path) -> frozenset[int]:
    """The tokens that end a text, by what lies beside the weights; none where nothing says so."""
    for name in ("generation_config.json", "config.json"):
        try:
            ends = json.loads((checkpoint / name).read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found = ends if isinstance(ends, list) else [ends]
        if all(isinstance(e, int) for e in found):
            return frozenset(found)
    return frozenset()
