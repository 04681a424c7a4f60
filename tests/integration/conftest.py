"""A cluster for the tests of a file; it ends with them, since others look for what is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_rig import Rig, cluster_of_three


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with cluster_of_three() as rig:
        yield rig
