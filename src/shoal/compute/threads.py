"""How many threads of this process compute: torch's, and those of the native kernels."""

from __future__ import annotations

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
