"""How the tensor ranks of one stage talk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from shoal_kernels import Ranks


class Communicator(Protocol):
    """Collective calls: every rank makes the same ones, in the same order, with equal shapes
    (`gather` may differ in the last dim). Each raises PeerLost when a rank is gone or silent for
    too long; then the communicator is of no more use but to be closed.

    `sent_bytes` and `sent_messages` count what this rank has handed to each of the others.
    """

    rank: int
    num_ranks: int

    @property
    def sent_bytes(self) -> int: ...

    @property
    def sent_messages(self) -> int: ...

    @property
    def native_ranks(self) -> Ranks | None:
        """By which kernels make the same sums in the midst of layers, where they can."""
        ...

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in rank order so that every rank holds the same bits."""
        ...

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's part, in rank order, on rank 0; None on the others."""
        ...

    def close(self) -> None: ...


class Solo:
    """A stage of one worker: nothing to add up."""

    rank = 0
    num_ranks = 1
    sent_bytes = 0
    sent_messages = 0
    native_ranks = None

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        return [part]

    def close(self) -> None:
        pass


class CurrentCommunicator:
    """What a worker's layers hold: this epoch's communicator, replaced when the ranks re-form."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.current: Communicator = Solo()

    @property
    def sent_bytes(self) -> int:
        return self.current.sent_bytes

    @property
    def sent_messages(self) -> int:
        return self.current.sent_messages

    @property
    def native_ranks(self) -> Ranks | None:
        return self.current.native_ranks

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return self.current.all_reduce(partial)

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        return self.current.gather(part)

    def close(self) -> None:
        self.current.close()
