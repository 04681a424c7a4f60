"""How many threads of this process compute: torch's, and those of the native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.compute import native
from shoal.compute.linear import Scheme


def set_num_threads(number: int) -> None:
    """Of both: until it is known which of them a model needs."""
    torch.set_num_threads(number)
    native.set_num_threads(number)


def leave_cores_to_layers(scheme: Scheme) -> None:
    """Where layers are native, torch keeps one thread: its others spin for milliseconds after each
    of the small calls that are left, on cores that the kernels need."""
    if scheme.many == "native":
        torch.set_num_threads(1)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """While a second model is loaded: the first one's layers may need more of them."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
