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

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        start, stop = self._vocab.start, self._vocab.stop
        is_own = [start <= token < stop for token in tokens]
        x_TE = self._rows(
            [token - start if own else 0 for token, own in zip(tokens, is_own, strict=True)]
        )
        x_TE[~torch.tensor(is_own, device=x_TE.device)] = 0
        return self._communicator.all_reduce(x_TE)


class SlicedHead:
    """Scores its part of the vocabulary; rank 0 puts the parts side by side."""

    def __init__(self, head: Linear, communicator: Communicator) -> None:
        self._head = head
        self._communicator = communicator

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        parts = self._communicator.gather(self._head(x))
        return None if parts is None else torch.cat(parts, dim=-1)
