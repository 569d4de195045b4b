"""Hardware files: what ``neocc calibrate`` writes, and a chip with its figures.

A file gives values for fields of a chip's row in hardware.json, by their paths
(``nvlink.link.efficiency``), or has a whole row of its own. It is checked when it is read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neocc.cost.hardware import Calibration, Chip, HardwareError, chip_of_row, table_row
from neocc.ir.json_object import read_object

SCHEMA = 1
FITTED = ("efficiency", "latency", "overhead")  # how the fields that a file may set end
RATES = {"matmul_efficiency": "peak_flops.bf16", "hbm_efficiency": "hbm_bandwidth"}


def get_field(row: Mapping[str, Any], path: str) -> float:
    """A number in a row: ``torus.link.latency``.

    Raises:
        HardwareError: the row has no such field.
    """
    node: Any = row
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            raise HardwareError(f"a chip's row has no field {path!r}")
        node = node[key]
    return node


def set_fields(row: Mapping[str, Any], fields: Mapping[str, float]) -> dict[str, Any]:
    """A copy of a row with these fields set.

    Raises:
        HardwareError: the row has no such field.
    """
    made = copy.deepcopy(dict(row))
    for path, value in fields.items():
        get_field(made, path)
        *keys, last = path.split(".")
        node = made
        for key in keys:
            node = node[key]
        node[last] = value
    return made


def nominal_rates(row: Mapping[str, Any], fields: Mapping[str, float]) -> dict[str, float]:
    """The rates of a row that fitted fields are fractions of."""
    paths = []
    for path in fields:
        if path in RATES:
            paths.append(RATES[path])
        elif path.endswith(".efficiency"):
            paths.append(path.removesuffix("efficiency") + "bandwidth")
    return {path: get_field(row, path) for path in paths}


def read_row(path: Path) -> tuple[str, dict[str, Any]]:
    """A nominal row for a chip that the table does not have: an object in the form of a row of
    hardware.json. The chip's name is its ``name``, or else that of the file.

    Raises:
        HardwareError: the file cannot be read, or is no such row.
    """
    row = read_object(path, HardwareError)
    name = str(row.get("name", path.stem))
    chip_of_row(name, row)
    return name, row


def chip_of_file(path: Path) -> Chip:
    """The chip that a hardware file calibrates, with the fitted figures.

    Raises:
        HardwareError: the file cannot be read, has another schema, sets a field that is no fitted
            one or to a value out of range, or was fitted to a row that has changed since.
    """
    document = read_object(path, HardwareError)
    if document.get("schema") != SCHEMA:
        raise HardwareError(
            f"{path} is no hardware file of schema {SCHEMA}: write one with neocc calibrate"
        )
    try:
        name, row, fields = document["chip"], document["row"], document["fields"]
        where = document["device"]
        calibration = Calibration(str(where["kind"]), int(where["count"]), str(document["date"]))
        nominal = dict(document["nominal"])
        fields = dict(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise HardwareError(f"{path} is not whole: {error!r}; calibrate again") from None
    base = table_row(name) if row is None else row
    for key, value in fields.items():
        check_field(path, base, key, value)
    for key, value in nominal.items():
        if not math.isclose(get_field(base, key), value, rel_tol=1e-9):
            raise HardwareError(
                f"{path} was fitted with {key} = {value:.4g}, and {name} has "
                f"{get_field(base, key):.4g}: calibrate again"
            )
    made = set_fields(base, fields)
    made["assumptions"] = {
        key: why for key, why in base.get("assumptions", {}).items() if key not in fields
    }
    return chip_of_row(name, made, calibration)


def check_field(path: Path, row: Mapping[str, Any], key: str, value: Any) -> None:
    """One entry of a file's ``fields`` is a fitted field of the row, and in range.

    Raises:
        HardwareError: it is not.
    """
    get_field(row, key)
    last = key.rpartition(".")[2]
    if not last.endswith(FITTED) and not key.startswith("peak_flops."):
        raise HardwareError(f"{path} sets {key}, which no calibration fits")
    top = 1.05 if last.endswith("efficiency") else math.inf
    low = 0.0 if last.endswith(("latency", "overhead")) else 1e-9
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= top:
        raise HardwareError(f"{path} sets {key} to {value!r}, which is out of range")
