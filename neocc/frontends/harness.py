"""EleutherAI's lm-evaluation-harness on neocc's models: ``--model neocc``.

    python -m neocc.frontends.harness --model neocc --model_args checkpoint=DIR,mesh=2x4 --tasks ...

is the harness's own command with this model known to it; in Python, importing this module is enough
for ``lm_eval.simple_evaluate(model="neocc", ...)``. It needs ``pip install 'neocc[eval]'``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neocc.backends import chip
from neocc.data.tokenizer import read_tokenizer
from neocc.frontends.weights.load import end_tokens, loaded
from neocc.ir.errors import NeoccError
from neocc.ir.mesh import Mesh
from neocc.runtime import Choice, Piece, Sampler, Scorer, text_windows

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError:
    raise NeoccError(
        "the lm-evaluation-harness is not installed: pip install 'neocc[eval]'"
    ) from None

NEW = 256  # tokens that a text is continued by, where a task does not say
STEP = 64  # prompts are padded to a multiple of it


@register_model("neocc")
class NeoccLM(TemplateLM):
    """A checkpoint's model on a mesh that this machine's processor simulates, or of the target's.

    Args:
        checkpoint: weights of any kind that ``neocc convert`` reads.
        mesh, target, devices, layout, tokenizer, config, model: as for ``neocc generate``.
        batch_size: pieces, or prompts, at a time.
    """

    def __init__(
        self,
        checkpoint: str,
        mesh: str = "1",
        batch_size: int | str = 8,
        target: str = "v5e",
        devices: str = "simulated",
        layout: str = "",
        tokenizer: str | None = None,
        config: str | None = None,
        model: str = "gpt.py",
        **ignored: Any,
    ):
        super().__init__()
        from neocc.backends.here import here

        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise NeoccError(f"batch_size {batch_size!r} is no number above 0")
        self.batch, self.mesh, self.target = int(batch_size), Mesh.parse(str(mesh)), chip(target)
        # A layout is separated by semicolons here, since commas separate the arguments.
        self.layout = layout.replace(";", ",")
        self.here = here(devices, self.target, self.mesh.size)
        self.files = contextlib.ExitStack()
        path = Path(checkpoint)
        given = Path(config) if config else None
        self.model, self.saved = self.files.enter_context(loaded(path, given, model))
        self.words = read_tokenizer(tokenizer, path, self.model.config.vocab)
        ends = end_tokens(path)
        if not ends:
            raise NeoccError(f"{checkpoint} has no eos_token_id, which the harness needs")
        self.end = min(ends)
        self.scorer = Scorer(
            self.model, self.saved, self.mesh, self.target, self.batch, self.layout, self.here
        )
        self.samplers: dict[tuple[int, int], Sampler] = {}

    @property
    def eot_token_id(self) -> int:
        return self.end

    @property
    def max_length(self) -> int:
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.saved.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.words.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pieces = [Piece(context, tokens) for _, context, tokens in requests]
        return [(s.logp, s.greedy) for s in self.scorer.score(pieces)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        pieces: list[Piece] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            own = text_windows(self.words.encode(request.args[0]), self.end, self.max_length)
            pieces += own
            owner += [i] * len(own)
        found = [0.0] * len(requests)
        for i, score in zip(owner, self.scorer.score(pieces), strict=True):
            found[i] += score.logp
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its ``until`` texts, which is left out."""
        found = [""] * len(requests)
        waiting: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            waiting.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for alike in waiting.values():
            for start in range(0, len(alike), self.batch):
                some = alike[start : start + self.batch]
                options = requests[some[0]].args[1]
                texts = self.continued([requests[i].args[0] for i in some], options, start)
                for i, text in zip(some, texts, strict=True):
                    found[i] = text
        return found

    def continued(self, contexts: list[str], options: dict[str, Any], first: int) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new = int(options.get("max_gen_toks", NEW))
        room = self.max_length - new
        if room < 1:
            raise NeoccError(f"{new} new tokens are as many as the context of {self.max_length}")
        # Of a context that is too long the end counts.
        prompts = [(self.words.encode(text) or [self.end])[-room:] for text in contexts]
        sampler = self.sampler(min(room, -(-max(map(len, prompts)) // STEP) * STEP), new)
        made: list[list[int]] = [[] for _ in prompts]

        def ends(sequence: int, token: int) -> bool:
            text = self.words.decode(made[sequence - first] + [token])
            return any(stop in text for stop in until)

        for token in sampler.generate(prompts, self.choice(options), {self.end}, first, ends):
            if token.token != self.end:
                made[token.sequence - first].append(token.token)
        texts = []
        for tokens in made:
            text = self.words.decode(tokens)
            for stop in until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def choice(self, options: dict[str, Any]) -> Choice:
        """Greedy unless a task asks for samples, as the harness has it."""
        temperature = float(options.get("temperature", 0.0) or 0.0)
        if not options.get("do_sample", temperature > 0):
            temperature = 0.0
        return Choice(temperature, options.get("top_k"), options.get("top_p"))

    def sampler(self, prompt: int, new: int) -> Sampler:
        if (prompt, new) not in self.samplers:
            self.samplers[prompt, new] = Sampler(
                self.model,
                self.saved,
                self.mesh,
                self.target,
                self.batch,
                prompt,
                new,
                self.layout,
                self.here,
            )
        return self.samplers[prompt, new]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
