"""Native tests run once for each instruction set that this processor has, on three threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

kernels = pytest.importorskip("shoal_kernels", reason="csrc was not built: no compiler")


@pytest.fixture(params=kernels.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.choose_isa(request.param)
    kernels.set_num_threads(3)
    yield request.param
    kernels.choose_isa(before)
    kernels.set_num_threads(1)


def by_avx2_and_avx512(compute: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What both make of it; the test is skipped where one of them is not there."""
    if "avx512-vnni" not in kernels.isas():
        pytest.skip("this processor has no VNNI")
    before, computed = kernels.isa(), []
    try:
        for name in ("avx2", "avx512-vnni"):
            kernels.choose_isa(name)
            computed.append(compute())
    finally:
        kernels.choose_isa(before)
    return computed
