"""Native tests run once for each instruction set that this processor has, on three threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

kernels = pytest.importorskip("shoal_kernels", reason="csrc was not built: no compiler")


@pytest.fixture(params=kernels.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.choose_isa(request.param)
    kernels.set_num_threads(3)
    yield request.param
    kernels.choose_isa(before)
    kernels.set_num_threads(1)
