"""Zeroed tensors that, on a CPU, take no memory until they are written to."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch

from shoal.errors import OutOfMemory


def zeroed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As torch.zeros, which writes to every page. Raises OutOfMemory."""
    if torch.get_default_device().type != "cpu":
        return torch.zeros(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemory(
            f"{num_bytes / 2**20:,.0f} MiB cannot be had: {error.strerror or error}"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Of small pages a processor remembers too few: a cache is read half as fast from them.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
