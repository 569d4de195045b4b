"""Rows of published_runs.json as runs to predict: model, plan and measured step, or why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.dense_models import Dense
from benchmarks.step_time import CASTS, Run
from benchmarks.training_systems import (
    ALPA,
    BRIDGE,
    EAGER_LOSS,
    MAXTEXT,
    MEGATRON_2021,
    MEGATRON_2022,
    MEGATRON_CORE,
    TORCHTITAN,
    TORCHTITAN_ASYNC,
    ZERO_3,
    System,
)
from neocc.cost.hardware import chip

Row = Mapping[str, Any]

CHIPS = {  # how a row's hardware begins -> chip, device family
    "V100": ("v100", "V100"),
    "A100": ("a100-80gb", "A100"),
    "H100 SXM 96GB": ("h100-500w", "H100"),
    "H100": ("h100", "H100"),
    "B200": ("b200", "Blackwell"),
    "GB200": ("gb200", "Blackwell"),
    "B300": ("b300", "Blackwell"),
    "GB300": ("gb300", "Blackwell"),
    "TPU v4": ("v4", "TPU v4"),
    "TPU v5e": ("v5e", "TPU v5e"),
    "TPU v5p": ("v5p", "TPU v5p"),
    "TPU v6e": ("v6e", "TPU v6e"),
    "TPU 2x-v6e": ("v6e", "TPU v6e"),
    "TPU 4x-v6e": ("v6e", "TPU v6e"),
    "TPU7x": ("tpu7x", "TPU 7x"),
}
GEMMA_WINDOW = 1024  # Gemma 3 report, arXiv 2503.19786: local layers see 1024 positions
MICROBATCHES = (1, 2, 4, 8, 16)  # tried where a row does not say; the fastest predicted counts


class Unpredicted(Exception):
    """Why a row is not predicted."""


@dataclass(frozen=True)
class Case:
    """A row to predict. ``runs``: one, or several where the row leaves something open, of which the
    fastest predicted counts. ``opened``: what it leaves open."""

    key: str
    source: str
    model: str
    hardware: str
    family: str
    plan: str
    runs: tuple[Run, ...]
    precision: str
    measured: float
    how: str
    opened: str = ""

    @property
    def train(self) -> bool:
        """Whether the row is of the third that efficiencies are fitted on, by its hash."""
        return int(self.key, 16) % 3 == 0


def key_of(row: Row) -> str:
    """Hash of all that a row states, and so of nothing that is predicted."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]


def flops_of_step(model: Dense, batch: int, convention: str) -> float:
    """FLOPs that a convention counts for a step of ``batch`` sequences.

    ``hardware``: the forward pass a second time for recomputation, attention in full, dense GPT
    (arXiv 2104.04473, eq. 3). ``model, full``: 6 a weight and token, attention in full. ``model,
    half``: attention halved by its causal mask.

    Raises:
        ValueError: another convention.
    """
    tokens = batch * model.seq
    weights = model.layers * model.layer_weights + model.vocab * model.embd
    attention = 12 * model.layers * tokens * model.seq * model.heads * model.head_dim
    match convention:
        case "hardware":
            layers = 8 * tokens * model.layers * model.layer_weights + attention * 4 / 3
            return layers + 6 * tokens * model.vocab * model.embd
        case "model, full":
            return 6 * tokens * weights + attention
        case "model, half":
            return 6 * tokens * weights + attention / 2
    raise ValueError(f"unknown FLOP convention {convention!r}")


def convention_of(row: Row) -> str:
    text = row.get("flops_convention") or ""
    if text.startswith("hardware"):
        return "hardware"
    if "causal" in text or "half" in text:
        return "model, half"
    if text.startswith("model"):
        return "model, full"
    raise Unpredicted("speed in TFLOP/s of an unstated convention")


def measured_step(row: Row, model: Dense) -> tuple[float, str]:
    """Seconds of a step, and what they are from."""
    m, batch = row["measured"], row["global_batch"]
    if m.get("oom"):
        raise Unpredicted("ran out of memory: no time")
    if not batch:
        raise Unpredicted("no global batch")
    tokens = batch * model.seq
    if "step_time_s" in m:
        return m["step_time_s"], "step"
    if "tokens_per_s_total" in m:
        return tokens / m["tokens_per_s_total"], "tokens/s"
    if "tokens_per_s_per_chip" in m:
        return tokens / (m["tokens_per_s_per_chip"] * row["chips"]), "tokens/s"
    convention = convention_of(row)
    rate = m["tflops_per_chip"] * 1e12 * row["chips"]
    return flops_of_step(model, batch, convention) / rate, f"FLOP/s ({convention})"


def dense_model(row: Row) -> Dense:
    m = row["model"]
    if m.get("experts") or (row.get("ep") or 1) > 1 or "tokendrop" in m["name"]:
        raise Unpredicted("mixture of experts")
    missing = [k for k in ("layers", "d_model", "heads", "d_ff", "vocab", "seq") if not m.get(k)]
    if missing:
        raise Unpredicted("the row lacks " + ", ".join(missing))
    name = m["name"]
    gpt = name.startswith(("GPT", "MT-NLG"))
    two_matrices = gpt or "2-matrix" in m.get("mlp", "")
    return Dense(
        layers=m["layers"],
        embd=m["d_model"],
        heads=m["heads"],
        kv_heads=m.get("kv_heads") or m["heads"],
        head_dim=m.get("head_dim")
        or (256 if name == "maxtext-52B" else m["d_model"] // m["heads"]),
        mlp=m["d_ff"],
        vocab=m["vocab"],
        seq=m["seq"],
        gated=not two_matrices,
        rms=not gpt,
        rope=not gpt,
        tied=gpt,
        parallel=name.startswith("PaLM"),
        window=GEMMA_WINDOW if "local" in m.get("attn", "") else 0,
        local_share=5 / 6 if "local" in m.get("attn", "") else 0.0,
    )


def recompute_of(row: Row) -> str:
    text = row.get("recompute")
    if text in (None, "none"):
        return "none"
    if text == "full" or text == "custom (layer input offload)":
        return "full"
    if text == "custom (layer input on device)":
        return "full"
    if text == "minimal":  # MaxText keeps every projection and runs the attention kernel again
        return "selective"
    if text == "qkv_proj_offloaded" or text == "custom, qkv remat":
        return "all but qkv"
    if text.startswith("custom: decoder_layer_input+qkv(+out)"):
        return "all but qkv and out"
    raise Unpredicted(f"recomputation policy {text!r} is not known")


def low_of(row: Row) -> str | None:
    text = (row.get("precision") or "").lower()
    if "nvfp4" in text:
        return "f4"
    if "int8" in text:
        return "i8"
    return "f8" if "fp8" in text or "float8" in text else None


def cast_of(row: Row) -> float:
    text = (row.get("precision") or "").lower()
    if "nvfp4" in text:
        return CASTS["nvfp4"]
    if "rowwise" in text or row["hardware"].startswith("TPU"):
        return CASTS["rowwise"]
    if "mx" in text and "cs" not in text:
        return CASTS["block"]
    return CASTS["delayed" if "hybrid" in text else "current"]


def system_of(row: Row) -> System:
    source, note = row["source"], row.get("note") or ""
    if source.startswith("Alpa"):
        if "dp" not in row:
            raise Unpredicted("the plan is the one that Alpa's solver found, and is not given")
        return replace(ALPA, sharded="zero_2" in note)
    if source.startswith("Megatron-LM SC'21"):
        return ZERO_3 if row.get("fsdp") else MEGATRON_2021
    if source.startswith("MT-NLG"):
        return MEGATRON_2021
    if source.startswith("Megatron-Core"):
        return MEGATRON_CORE
    if source.startswith("Megatron-LM examples"):
        return replace(BRIDGE, loss=EAGER_LOSS)
    if "Megatron-Bridge" in source:
        return BRIDGE
    if source.startswith("torchtitan"):
        return TORCHTITAN_ASYNC if "async" in note.lower() else TORCHTITAN
    if source.startswith("NeMo AutoModel"):
        return TORCHTITAN
    if source.startswith(("MaxText", "Google", "PaLM")):
        return MAXTEXT
    raise Unpredicted(f"nothing is known of the system behind {source!r}")


def hardware_of(row: Row) -> tuple[str, str]:
    for begins in sorted(CHIPS, key=len, reverse=True):
        if row["hardware"].startswith(begins):
            return CHIPS[begins]
    raise Unpredicted(f"no chip for {row['hardware']!r}")


def case_of(row: Row) -> Case:
    """A row as a case.

    Raises:
        Unpredicted: the row cannot be predicted, and why.
    """
    model = dense_model(row)
    measured, how = measured_step(row, model)
    name, family = hardware_of(row)
    runs, opened = (tpu_runs if family.startswith("TPU") else gpu_runs)(row, model, name)
    return Case(
        key=key_of(row),
        source=row["source"],
        model=row["model"]["name"],
        hardware=name,
        family=family,
        plan=describe(row, runs[0]),
        runs=runs,
        precision=row.get("precision") or "",
        measured=measured,
        how=how,
        opened=opened,
    )


def describe(row: Row, run: Run) -> str:
    parts = [f"n{row['chips']} b{row['global_batch']}"]
    parts += [f"{k}{row[k]}" for k in ("tp", "pp", "vp", "cp", "dp", "fsdp") if row.get(k)]
    if row.get("microbatch"):
        parts.append(f"mb{row['microbatch']:g}")
    return " ".join([*parts, run.recompute, row.get("precision") or run.dtype])


def gpu_runs(row: Row, model: Dense, name: str) -> tuple[tuple[Run, ...], str]:
    tensor, stages, context = (row.get(k) or 1 for k in ("tp", "pp", "cp"))
    system, fsdp = system_of(row), bool(row.get("fsdp"))
    data = row["chips"] // (tensor * stages * context)
    per_replica = row["global_batch"] / data
    opened = []
    micro = (row["microbatch"],) if row.get("microbatch") else MICROBATCHES
    if row["source"].startswith("Alpa"):
        micro = (per_replica,)  # its "microbatch" is the whole batch: no accumulation
    elif row["source"].startswith("torchtitan") and not row.get("microbatch"):
        micro = (1,)  # its pipeline schedules cut the local batch, here of 8, into single sequences
        opened.append("microbatch of 1")
    elif not row.get("microbatch"):
        opened.append("microbatch")
    chunks: tuple[int, ...] = (row.get("vp") or 1,)
    if system.send_overlap and stages > 1 and not row.get("vp"):
        # Sends overlap only in the interleaved schedule, and the source says that they do.
        chunks = tuple(v for v in range(1, 33) if model.layers % (stages * v) == 0)
        opened.append("chunks")
    found = [
        Run(
            model=model,
            chip=chip(name),
            system=system,
            data=data,
            batch=int(b),
            microbatches=int(per_replica / b),
            tensor=tensor,
            context=context,
            stages=stages,
            chunks=v,
            fsdp=fsdp,
            recompute=recompute_of(row),
            low=low_of(row),
            cast=cast_of(row),
            dtype="f16" if name == "v100" else "bf16",
        )
        for b in micro
        for v in chunks
        if per_replica / b >= 1 and per_replica % b == 0
    ]
    if not found:
        raise Unpredicted("the batch does not divide by the plan")
    return tuple(found), " and ".join(opened)


def tpu_runs(row: Row, model: Dense, name: str) -> tuple[tuple[Run, ...], str]:
    opened = ""
    tensor, fsdp, slices = (row.get(k) or 1 for k in ("tp", "fsdp", "dp"))
    if row["model"]["name"].startswith("PaLM"):
        tensor, fsdp, slices = 12, 256, 2
        opened = "12 x 256 in each pod, from memory of the paper; recomputation by HFU / MFU"
    elif not row.get("fsdp"):
        raise Unpredicted("no stated plan")
    run = Run(
        model=model,
        chip=chip(name),
        system=system_of(row),
        data=fsdp,
        batch=row["global_batch"] // (slices * fsdp),
        microbatches=1,
        tensor=tensor,
        fsdp=True,
        slices=slices,
        recompute="full" if opened else recompute_of(row),
        low=low_of(row),
        cast=cast_of(row),
    )
    return (run,), opened


# arXiv 2205.05198, table 5: seconds an iteration, full recomputation and sequence parallelism with
# selective recomputation. Layers, embd, heads; tensor, stages, chunks; batch, microbatch (table 3).
SELECTIVE = (
    ("22B", (48, 6144, 64), (8, 1, 1), (4, 4), (1.42, 1.10)),
    ("175B", (96, 12288, 96), (8, 8, 3), (64, 1), (18.13, 13.75)),
    ("530B", (105, 20480, 128), (8, 35, 3), (280, 1), (49.05, 37.83)),
    ("1T", (128, 25600, 160), (8, 64, 1), (512, 1), (94.42, 71.49)),
)


def selective_cases() -> list[Case]:
    found = []
    for name, (layers, embd, heads), (tp, pp, vp), (batch, micro), times in SELECTIVE:
        model = Dense(layers, embd, heads, heads, embd // heads, 4 * embd, 51200, 2048)
        for recompute, measured in zip(("full", "selective"), times, strict=True):
            system = replace(MEGATRON_2022, sequence=recompute == "selective")
            run = Run(
                model=model,
                chip=chip("a100-80gb"),
                system=system,
                data=1,
                batch=micro,
                microbatches=batch // micro,
                tensor=tp,
                stages=pp,
                chunks=vp,
                recompute=recompute,
            )
            plan = f"n{tp * pp} b{batch} tp{tp} pp{pp} vp{vp} mb{micro} {recompute}"
            source = "Megatron, arXiv 2205.05198 table 5"
            key = key_of({"source": source, "model": name, "plan": plan, "seconds": measured})
            found.append(
                Case(
                    key=key,
                    source=source,
                    model=f"GPT-{name}",
                    hardware="a100-80gb",
                    family="A100",
                    plan=plan,
                    runs=(run,),
                    precision="fp16",
                    measured=measured,
                    how="step",
                )
            )
    return found
