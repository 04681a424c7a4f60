"""How the tensor ranks of one stage talk."""

from __future__ import annotations

from typing import Protocol

import torch


class Communicator(Protocol):
    rank: int
    num_ranks: int

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in rank order so that every rank holds the same bits."""
        ...


class Solo:
    """A stage of one worker: nothing to add up."""

    rank = 0
    num_ranks = 1

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial
