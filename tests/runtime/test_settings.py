"""``key=value`` sets fields of a config, by the fields' own types."""

from __future__ import annotations

from typing import Any

import pytest

from models import gpt
from neocc.ir.errors import NeoccError
from neocc.runtime.settings import parse_settings


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("layers=3", "layers", 3),
        ("lr=3e-4", "lr", 3e-4),
        ("lr=1", "lr", 1.0),
        ("dtype=f32", "dtype", "f32"),
        ("recompute=true", "recompute", True),
        ("clip=none", "clip", None),
        ("clip=2", "clip", 2.0),
        (" lr_decay = linear ", "lr_decay", "linear"),
        ("attention=((('global','local'),1),)", "attention", ((("global", "local"), 1),)),
    ],
)
def test_a_value_of_the_fields_type(text: str, name: str, value: Any):
    made = parse_settings(gpt.TINY, [text])
    assert made == {name: value} and type(made[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("layrs=3", "no field 'layrs'; did you mean 'layers'"),
        ("layers=3.5", "'3.5' is not of the type int"),
        ("layers=true", "'true' is not of the type int"),
        ("lr=fast", "'fast' is not of the type float"),
        ("clip=much", "'much' is not of the type float or none"),
        ("recompute=1", "'1' is not of the type bool"),
    ],
)
def test_refused(text: str, message: str):
    with pytest.raises(NeoccError, match=message):
        parse_settings(gpt.TINY, [text])


def test_a_config_without_fields_is_refused():
    with pytest.raises(NeoccError, match="not a dataclass"):
        parse_settings({"layers": 2}, ["layers=3"])
