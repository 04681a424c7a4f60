"""Zeroed tensors that, on a CPU, take no memory until they are written to."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
from contextlib import suppress

import torch

from shoal.errors import OutOfMemory

# <linux/mman.h>, since Linux 5.14; mmap does not know it.
_MADV_POPULATE_WRITE = 23

_SLAB_BYTES = 16 * 2**20
_LINE = 64


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


class Slabs:
    """Zeroed bytes, many tensors to a piece of memory: alone they are too small for large pages.

    A piece goes back when the last of its tensors does. Threads may ask at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def zeroed(self, num_bytes: int) -> torch.Tensor:
        """Begins a line of a processor's cache. Raises OutOfMemory."""
        if num_bytes > _SLAB_BYTES // 4:
            return zeroed((num_bytes,), torch.uint8)
        with self._lock:
            if self._rest.numel() < num_bytes:
                self._rest = zeroed((_SLAB_BYTES,), torch.uint8)
            taken, self._rest = self._rest[:num_bytes], self._rest[-(-num_bytes // _LINE) * _LINE :]
        return taken


def take(tensor: torch.Tensor) -> None:
    """Have the system find memory for all of a zeroed tensor. Raises OutOfMemory.

    Not by writing: others may do so meanwhile. A system that cannot gives it as it is written to.
    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    start = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.nbytes - start
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(num_bytes)
    if madvise(address, size, _MADV_POPULATE_WRITE) == 0 or ctypes.get_errno() == errno.EINVAL:
        return
    raise OutOfMemory(
        f"{tensor.nbytes / 2**20:,.0f} MiB cannot be had: {os.strerror(ctypes.get_errno())}"
    )
