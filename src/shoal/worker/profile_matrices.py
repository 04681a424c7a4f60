"""How fast matrices are gone through, in Shoal's own linear layers.

The matrices are 2048 x 2048 and so many that no cache holds them: they are read from memory, as a
model's are. What a call costs whatever the size of its matrix is in the overhead of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from shoal.cluster.hardware import MatrixRate
from shoal.compute.affine import quantize_affine4
from shoal.compute.kernels import choose_scheme
from shoal.compute.linear import Linear, make_linear
from shoal.config import Quantize
from shoal.worker.stopwatch import Timing, time_in_turn

_SIZE = 2048
# 100 million elements: 60 MB in 4 bits, 400 MB in float32.
_NUM_MATRICES = 24
_MIN_MATRICES = 4
# From so many rows on arithmetic limits, and a few matrices tell as much as many.
_MANY_ROWS = 64
# Packing takes as long as measuring; it must not eat the time of the passes.
_BUILD_SHARE = 0.5
_READ_BYTES = 256 * 2**20


def measure_matrices(
    precision: Quantize, rows: Sequence[int], *, budget_s: float, device: str, memory_bytes: int
) -> tuple[MatrixRate, ...]:
    """Rates by rising rows, with the layers that `--quantize PRECISION` makes.

    Raises ConfigError if those cannot run here.
    """
    started_s = time.perf_counter()
    linears = _linears(precision, _BUILD_SHARE * budget_s, device, memory_bytes)
    left_s = budget_s - (time.perf_counter() - started_s)
    dtype = choose_scheme("auto", precision).dtype
    rows = sorted(set(rows))
    used = [linears[: _MIN_MATRICES if count >= _MANY_ROWS else None] for count in rows]
    inputs = [torch.randn(count, _SIZE, dtype=dtype, device=device) for count in rows]
    series = [
        [partial(linear, x_MK) for linear in some] for some, x_MK in zip(used, inputs, strict=True)
    ]
    timings = time_in_turn(series, budget_s=left_s, device=device)
    return tuple(
        MatrixRate(rows=count, weights_per_s=_SIZE * _SIZE / timing.seconds, spread=timing.spread)
        for count, timing in zip(rows, timings, strict=True)
    )


def measure_reading(*, budget_s: float, device: str, memory_bytes: int) -> tuple[float, Timing]:
    """Bytes per second of a sum over a buffer larger than caches, by all threads."""
    num_bytes = min(_READ_BYTES, memory_bytes // 4)
    buffer = torch.ones(num_bytes // 4, device=device)
    (timing,) = time_in_turn([[buffer.sum]], budget_s=budget_s, device=device)
    return num_bytes / timing.seconds, timing


def _linears(precision: Quantize, budget_s: float, device: str, memory_bytes: int) -> list[Linear]:
    """As many as time and memory allow. For `auto` of 4-bit blocks, as its files hold them."""
    scheme = choose_scheme("auto", precision)
    deadline_s = time.perf_counter() + budget_s
    weight_NK = torch.randn(_SIZE, _SIZE, device=device) * 0.02
    blocks = quantize_affine4(weight_NK) if scheme.few in ("as_stored", "int4") else None
    largest = max(_MIN_MATRICES, memory_bytes // 4 // (weight_NK.numel() * 4))
    linears: list[Linear] = []
    while len(linears) < min(_NUM_MATRICES, largest):
        if len(linears) >= _MIN_MATRICES and time.perf_counter() > deadline_s:
            break
        # A copy, because a dense layer keeps the tensor it is given.
        linears.append(make_linear(blocks or weight_NK.clone(), None, scheme))
    return linears
