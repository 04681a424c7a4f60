"""Measures a node in seconds: memory, how fast weights stream, matrices and what a layer adds.

Shoal's own layers are timed, so that the figures are those of the kernels it really runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shoal.cluster.hardware import MatrixRate, NodeProfile
from shoal.compute.kernels import choose_scheme
from shoal.compute.threads import set_num_threads
from shoal.config import Quantize
from shoal.errors import ConfigError
from shoal.worker.node_memory import usable_memory_bytes
from shoal.worker.profile_layer import measure_layer
from shoal.worker.profile_matrices import measure_matrices, measure_reading

PRECISIONS: tuple[Quantize, ...] = ("auto", "none", "int8", "int4")
ROWS = (1, 4, 16, 64, 256)
BUDGET_S = 12.0

_READING_SHARE, _LAYER_SHARE = 0.05, 0.12

Report = Callable[[str], None]


def profile_node(
    name: str,
    *,
    precisions: Sequence[Quantize] | None = None,
    rows: Sequence[int] = ROWS,
    budget_s: float = BUDGET_S,
    num_threads: int | None = None,
    device: str = "cpu",
    report: Report = lambda _: None,
) -> NodeProfile:
    """A node's profile in about `budget_s`: 3 s are enough for one precision and three rows.

    `precisions=None` is every one that runs here. `num_cores` of the profile are the threads
    that were used. Raises ConfigError for a device or a precision that cannot run here.
    """
    _check_device(device)
    precisions = tuple(precisions or usable_precisions(device))
    memory_bytes = usable_memory_bytes(device)
    started_s = time.perf_counter()
    with _threads(num_threads) as threads, torch.inference_mode():
        report("reading memory")
        read_bytes_per_s, reading = measure_reading(
            budget_s=_READING_SHARE * budget_s, device=device, memory_bytes=memory_bytes
        )
        rates: dict[str, tuple[MatrixRate, ...]] = {}
        for index, precision in enumerate(precisions):
            report(f"multiplying by matrices, {precision}")
            spent_s = time.perf_counter() - started_s
            left_s = max(0.0, (1 - _LAYER_SHARE) * budget_s - spent_s)
            rates[precision] = measure_matrices(
                precision,
                rows,
                budget_s=left_s / (len(precisions) - index),
                device=device,
                memory_bytes=memory_bytes,
            )
        report("running a layer")
        layer = measure_layer(
            precisions[0],
            weights_per_s=rates[precisions[0]][0].weights_per_s,
            budget_s=_LAYER_SHARE * budget_s,
            device=device,
        )
    return NodeProfile(
        name=name,
        device=device,
        num_cores=threads,
        memory_bytes=memory_bytes,
        read_bytes_per_s=read_bytes_per_s,
        matrix_rates=rates,
        layer_overhead_s=layer.layer_overhead_s,
        activations_per_s=layer.activations_per_s,
        cache_bytes_per_s=layer.cache_bytes_per_s,
        spreads={"read_bytes_per_s": reading.spread, **layer.spreads},
    )


def usable_precisions(device: str = "cpu") -> tuple[Quantize, ...]:
    """Those whose kernels this build of torch has for the device."""
    if device != "cpu":
        return ("none",)
    return tuple(precision for precision in PRECISIONS if _runs(precision))


def _runs(precision: Quantize) -> bool:
    try:
        choose_scheme("auto", precision)
    except ConfigError:
        return False
    return True


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device '{device}' is neither cpu nor cuda", param="device")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "this build of torch sees no CUDA device: use --device cpu", param="device"
        )


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's threads are a setting of the process: put back afterwards."""
    before = torch.get_num_threads()
    threads = wanted or usable_cores()
    set_num_threads(threads)
    try:
        yield threads
    finally:
        set_num_threads(before)


def usable_cores() -> int:
    """The cores this process may use; some systems only know how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
