"""Every test runs JAX on the CPU, with eight host devices to build meshes from."""

from __future__ import annotations

import os

# Before anything imports jax: it reads these once, when its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("NPROC", "16")  # threads of XLA's: more than devices that wait for each other
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the TPU compiler in several workers

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "neocc",
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.load_profile("neocc")


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX keeps float64 as float64 while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)
