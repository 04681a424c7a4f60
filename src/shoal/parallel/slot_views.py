"""Slots of shared memory as arrays of one shape and dtype, made once for many sums.

float32 goes through numpy: for 576 floats 1.7 µs (0.9 of them for the tensor's array, 0.25 to copy,
0.5 to add) against torch's 2.6. bfloat16, which numpy lacks, goes through torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from shoal.errors import InternalError


class ReduceViews(Protocol):
    def write(self, partial: torch.Tensor) -> Any:
        """Copy into this rank's slot. The answer is what `sum_into` takes: the same memory."""
        ...

    def sum_into(self, own: Any) -> None:
        """Overwrite with the sum of all slots, this rank's among them, in rank order."""
        ...


def reduce_views(
    slots: np.ndarray[Any, Any], rank: int, shape: torch.Size, dtype: torch.dtype
) -> ReduceViews:
    """`slots` are [num_ranks, bytes], with just as many bytes as the shape has."""
    if dtype == torch.float32:
        return _Float32Views(slots, rank, shape)
    if dtype == torch.bfloat16:
        return _BFloat16Views(slots, rank, shape)
    raise InternalError(f"all_reduce adds float32 and bfloat16, not {dtype}")


class _Float32Views:
    def __init__(self, slots: np.ndarray[Any, Any], rank: int, shape: torch.Size) -> None:
        views = [slot.view(np.float32).reshape(shape) for slot in slots]
        self._own = views[rank]
        self._first, self._second, *self._rest = views

    def write(self, partial: torch.Tensor) -> np.ndarray[Any, Any]:
        own: np.ndarray[Any, Any] = partial.numpy()
        self._own[...] = own
        return own

    def sum_into(self, own: np.ndarray[Any, Any]) -> None:
        np.add(self._first, self._second, own)
        for other in self._rest:
            np.add(own, other, own)


class _BFloat16Views:
    def __init__(self, slots: np.ndarray[Any, Any], rank: int, shape: torch.Size) -> None:
        with torch.inference_mode(False):  # or they could not be written outside of it
            views = [torch.from_numpy(slot).view(torch.bfloat16).view(shape) for slot in slots]
            self._sum = torch.empty(shape, dtype=torch.float32)
        self._own = views[rank]
        self._first, *self._rest = views

    def write(self, partial: torch.Tensor) -> torch.Tensor:
        self._own.copy_(partial)
        return partial

    def sum_into(self, own: torch.Tensor) -> None:
        self._sum.copy_(self._first)
        for other in self._rest:
            self._sum.add_(other)
        own.copy_(self._sum)
