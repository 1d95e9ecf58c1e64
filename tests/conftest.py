"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests with actors; more logical CPUs than cores, for they wait."""
    from ps.cluster import ray_cluster

    with ray_cluster(None, min_cpus=16):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `ml-100k/` and `criteo/`; their licences keep them out of the project."""
    folder = os.environ.get("MANTA_DATA_DIR")
    if not folder:
        pytest.skip("MANTA_DATA_DIR is not set: no real data sets on this machine")
    return Path(folder)
