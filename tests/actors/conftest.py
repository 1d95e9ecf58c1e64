"""One local Ray for all actor tests; more logical CPUs than cores, since actors mostly wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ps.cluster import ray_cluster


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with ray_cluster(None, min_cpus=16):
        yield
