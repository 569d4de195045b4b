"""Converts a checkpoint of a chosen size both ways and reports time and peak memory.

    python -m benchmarks.convert_memory                # 0.3 GB, from the repository's root
    python -m benchmarks.convert_memory --bytes 20e9   # needs three times as much disk

The checkpoint is a GPT-Neo in Hugging Face's layout: random bytes in its tensors' shapes, in shards
of 2 GB, written without ever being held. Each conversion runs in a process of its own, whose peak
resident memory is what Linux counted (``VmHWM``), Python and its libraries included; a
conversion of a tiny model tells how much of it those are. Figures go to
benchmarks/results/convert_memory.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neocc.runtime.checkpoint import write_shards
from neocc.runtime.safetensors import CHUNK, Planned

RESULTS = Path(__file__).parent / "results"
SHARD = 2e9
# Runs a conversion, then says how much memory its process had at most. ru_maxrss would not do: it
# counts the parent's, from before the new program began.
CHILD = """
import json, re, sys
from pathlib import Path
from neocc.frontends.weights.convert import convert
done = convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], most=float(sys.argv[4]))
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"bytes": done.bytes, "tensors": done.tensors, "peak": peak}))
"""


def config(size: float) -> dict[str, Any]:
    """A GPT-Neo of about so many bytes in float32, of the proportions of its family."""
    layers = max(2, 2 * round(12 * min(1.0, math.log10(max(size, 1e6)) / 10)))
    embd = max(64, 64 * round(math.sqrt(size / 4 / (12 * layers)) / 64))
    return {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        "vocab_size": 50257 if size > 1e8 else 512,
        "max_position_embeddings": 2048,
        "hidden_size": embd,
        "num_layers": layers,
        "num_heads": embd // 64,
        "attention_types": [[["global", "local"], layers // 2]],
        "window_size": 256,
        "torch_dtype": "float32",
    }


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    e = c["hidden_size"]
    layer = {f"attn.attention.{n}_proj.weight": (e, e) for n in ("q", "k", "v", "out")}
    layer |= {"attn.attention.out_proj.bias": (e,), "ln_1.weight": (e,), "ln_1.bias": (e,)}
    layer |= {"mlp.c_fc.weight": (4 * e, e), "mlp.c_fc.bias": (4 * e,)}
    layer |= {"mlp.c_proj.weight": (e, 4 * e), "mlp.c_proj.bias": (e,)}
    layer |= {"ln_2.weight": (e,), "ln_2.bias": (e,)}
    found = {"wte.weight": (c["vocab_size"], e), "wpe.weight": (2048, e)}
    for i in range(c["num_layers"]):
        found |= {f"h.{i}.{n}": shape for n, shape in layer.items()}
    found |= {"ln_f.weight": (e,), "ln_f.bias": (e,)}
    return {f"transformer.{n}": shape for n, shape in found.items()}


def make(folder: Path, size: float) -> int:
    """Writes the checkpoint; its bytes."""
    c = config(size)
    tensors = [Planned(n, np.dtype(np.float32), s) for n, s in shapes(c).items()]
    rng = np.random.default_rng(0)
    block = rng.integers(0, 255, CHUNK, np.uint8, endpoint=True).view(np.float32)

    def produce(tensor: Planned) -> Iterator[np.ndarray]:
        left = math.prod(tensor.shape)
        while left:
            # Another start each time, so that tensors differ.
            at = int(rng.integers(0, len(block)))
            part = np.roll(block, at)[:left]
            left -= len(part)
            yield part

    folder.mkdir(parents=True)
    files, _ = write_shards(folder, "model", tensors, produce, SHARD, {"format": "pt"})
    if len(set(files.values())) > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(c))
    return sum(t.nbytes for t in tensors)


def run(source: Path, target: Path, kind: str) -> dict[str, Any]:
    """A conversion in a process of its own: bytes, tensors, peak memory, seconds."""
    begun = time.perf_counter()
    arguments = [sys.executable, "-c", CHILD, str(source), str(target), kind, str(SHARD)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"seconds": round(time.perf_counter() - begun, 1)}


def measure(size: float, scratch: Path) -> dict[str, Any]:
    """Both ways, of a checkpoint of ``size`` bytes and of a tiny one."""
    make(scratch / "tiny", 1e6)
    floor = run(scratch / "tiny", scratch / "tiny.neocc", "neocc")["peak"]
    total = make(scratch / "hf", size)
    largest = 4 * max(math.prod(s) for n, s in shapes(config(size)).items() if ".h." in n)
    there = run(scratch / "hf", scratch / "neocc", "neocc")
    shutil.rmtree(scratch / "hf")
    back = run(scratch / "neocc", scratch / "back", "hf")
    return {
        "bytes": total,
        "largest_matrix_of_a_layer": largest,
        "floor": floor,
        "to_neocc": there,
        "to_hf": back,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=float, default=3e8, help="of the checkpoint, about")
    parser.add_argument("--scratch", type=Path, help="a folder with room for it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        found = measure(asked.bytes, Path(folder))
    found |= {"python": platform.python_version(), "cpus": os.cpu_count()}
    print(json.dumps(found, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "convert_memory.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
