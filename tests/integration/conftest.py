"""One Ray cluster for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_rig import Rig, cluster_of_three


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    with cluster_of_three() as rig:
        yield rig
