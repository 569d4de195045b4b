"""A piece of a benchmark in a process of its own: libtpu ends the process on some errors, and the
end of the process is the way to end libtpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def run_apart(
    name: str, command: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """The last JSON object that ``python -m command`` prints on a line; None, and a line that says
    why, where it fails or takes more than ``timeout`` seconds. ``environment``: beside this one."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment, "JAX_PLATFORMS": "cpu"},
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: not compiled within {timeout:.0f} s", file=sys.stderr)
        return None
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"{name}: {last[0][:400]}", file=sys.stderr)
        return None
    return json.loads(rows[-1])
