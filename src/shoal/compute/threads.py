"""How many threads of this process compute: torch's, and those of the native kernels."""

from __future__ import annotations

import torch

from shoal.compute import native


def set_num_threads(number: int) -> None:
    torch.set_num_threads(number)
    native.set_num_threads(number)
