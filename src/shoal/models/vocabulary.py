"""The embedding and the output head of tensor ranks that each hold a part of the vocabulary."""

from __future__ import annotations

from typing import Protocol

import torch

from shoal.compute.linear import Embedding, Linear
from shoal.parallel.communicator import Communicator
from shoal.parallel.partition import Span


class Head(Protocol):
    """`x [N, E] -> logits [N, V]`, or None where another rank has them."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None: ...


class SlicedEmbedding:
    """Looks up the tokens it holds; the ranks' sum, of one row and zeros, has them all."""

    def __init__(self, rows: Embedding, vocab: Span, communicator: Communicator) -> None:
        self._rows = rows
        self._vocab = vocab
        self._communicator = communicator

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        local_T = tokens_T - self._vocab.start
        is_other_T = (local_T < 0) | (local_T >= len(self._vocab))
        x_TE = self._rows(local_T.masked_fill(is_other_T, 0))
        x_TE = x_TE.masked_fill(is_other_T.unsqueeze(1), 0)
        return self._communicator.all_reduce(x_TE)


class SlicedHead:
    """Scores its part of the vocabulary; rank 0 puts the parts side by side."""

    def __init__(self, head: Linear, communicator: Communicator) -> None:
        self._head = head
        self._communicator = communicator

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        parts = self._communicator.gather(self._head(x))
        return None if parts is None else torch.cat(parts, dim=-1)
