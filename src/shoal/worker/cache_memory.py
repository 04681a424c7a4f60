"""Memory of a KV cache that can outlive its process: a file without a name, held by descriptors.

Whoever opens the descriptor through /proc maps the same memory. So the head of workers on its own
machine keeps the caches of those that are killed, and their successors go on with them.
"""

from __future__ import annotations

import mmap
import os
import secrets
import weakref

import torch

from shoal.compute.kv_types import name_of
from shoal.errors import OutOfMemory
from shoal.parallel.control import KeptCache


class CacheMemory:
    """`identity` tells this memory from any other; `descriptor` is -1 if nobody else can map it.

    New memory is zeroed, and taken from the system as it is written to. Raises OutOfMemory.
    """

    def __init__(self, num_bytes: int) -> None:
        self.identity = secrets.token_hex(8)
        self.descriptor = -1
        try:
            if hasattr(os, "memfd_create"):
                self._hold(os.memfd_create("shoal-kv"))
                os.ftruncate(self.descriptor, num_bytes)
            self._memory = mmap.mmap(self.descriptor, num_bytes)
        except OSError as error:
            raise OutOfMemory(
                f"{num_bytes / 2**20:,.0f} MiB cannot be had: {error.strerror or error}"
            ) from error

    @classmethod
    def of(cls, kept: KeptCache, num_bytes: int, dtype: torch.dtype) -> CacheMemory | None:
        """What the head has kept; None if it cannot be mapped, or has another size or type."""
        if kept.dtype != name_of(dtype):
            return None
        memory = cls.__new__(cls)
        memory.identity = kept.identity
        try:
            memory._hold(os.open(kept.path, os.O_RDWR))
            if os.fstat(memory.descriptor).st_size != num_bytes:
                return None
            memory._memory = mmap.mmap(memory.descriptor, num_bytes)
        except OSError:
            return None
        return memory

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, *, index: int) -> torch.Tensor:
        """The `index`-th of the tensors of this shape, end to end."""
        size = 1
        for length in shape:
            size *= length
        offset = index * size * dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=size, offset=offset).view(shape)

    def _hold(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
