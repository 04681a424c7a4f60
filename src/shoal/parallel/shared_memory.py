"""Sums between processes of one host, through memory that all of them have mapped.

Every rank has a flag, which counts the messages it has written, and two slots, which it writes in
turn. A layer makes two sums: kernels add them up, also in the midst of a shard's layers; what is
here for who has none is written for few Python steps rather than for generality.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.errors import InternalError
from shoal.kernels import kernels as native_kernels
from shoal.parallel import shared_segment
from shoal.parallel.flags import LINE_BYTES, Flags
from shoal.parallel.slot_views import ReduceViews, reduce_views

if TYPE_CHECKING:
    from shoal_kernels import Ranks

_PAGE_BYTES = 4096
# What a rank says beside its flag: two widths, in turn, and whether it has kernels.
_WIDTH_AT = 1
_KERNELS_AT = 3


class SharedMemory:
    """A Communicator of processes that can map the same file; CPU tensors only.

    Two slots are enough, and nobody needs to say that it has read: a rank writes message n+2 over
    message n after it has seen every flag at n+1, and a rank raises its flag to n+1 after it has
    read message n.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        session: str,
        *,
        slot_bytes: int = 1 << 20,
        timeout_s: float = 10.0,
        poll_s: float = 0.002,
        folder: Path | None = None,
        is_over: Callable[[], bool] = lambda: False,
        kernels: ModuleType | None = native_kernels,
    ) -> None:
        """Waits until every rank has come, or `is_over`, asked now and then, says to give up.

        All must give the same `session`, which names this group and no other that lives, and the
        same `slot_bytes`: larger messages go in pieces. `poll_s` is how long a waiting rank keeps
        looking, yielding its core to whoever wants it, before it sleeps: less where ranks outnumber
        the cores. Ranks with `kernels` and without understand each other. Raises PeerLost after
        `timeout_s` or when told to give up, OutOfMemory.
        """
        if num_ranks < 2:
            raise InternalError("shared memory is for two ranks and more: a single one is a Solo")
        self.rank = rank
        self.num_ranks = num_ranks
        self._slot_bytes = slot_bytes = -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        flag_bytes = -(-num_ranks * LINE_BYTES // _PAGE_BYTES) * _PAGE_BYTES
        num_bytes = flag_bytes + num_ranks * 2 * slot_bytes
        segment = _open(session, rank, num_bytes, timeout_s, folder, is_over)
        memory = np.frombuffer(segment.memory, dtype=np.uint8)
        # A memoryview's words: read and written in 25 ns, by one 8-byte move each.
        words = memoryview(segment.memory)[:flag_bytes].cast("Q")
        self._slots = memory[flag_bytes:].reshape(2, num_ranks, slot_bytes)
        self._flags = Flags(
            words, rank, num_ranks, timeout_s=timeout_s, poll_s=poll_s, is_over=is_over
        )
        self._native = None if kernels is None else self._ranks(kernels, memory, poll_s)
        self._sent_bytes = 0
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._reduced_bytes = 0
        self._views: tuple[ReduceViews, ReduceViews]
        self._flags.say(_KERNELS_AT, int(kernels is not None))
        try:
            self._flags.exchange()
        finally:
            segment.unlink()
        self._all_native = all(self._flags.said(_KERNELS_AT))

    @property
    def native_ranks(self) -> Ranks | None:
        """If all ranks have kernels: those leave out rows that nobody reads, others add them up."""
        self._flags.check_open()
        return self._native if self._all_native else None

    @property
    def sent_bytes(self) -> int:
        native_bytes = 0 if self._native is None else self._native.sent_bytes
        return self._sent_bytes + native_bytes

    @property
    def sent_messages(self) -> int:
        """Every exchange is one to each of the others; the first says only that a rank is there."""
        return (self._flags.sequence - 1) * (self.num_ranks - 1)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum, in place of `partial` if that is contiguous or fits a slot.

        float32 and bfloat16, which is summed in float32 and rounded once.
        """
        self._flags.check_open()
        if self._native is not None and _is_for_kernels(partial):
            self._native.add(partial.data_ptr(), partial.numel())
            return partial
        if partial.shape != self._shape or partial.dtype is not self._dtype:
            if partial.nbytes > self._slot_bytes:
                return self._reduce_in_pieces(partial)
            self._prepare(partial)
        views = self._views[self._flags.sequence & 1]
        own = views.write(partial)
        self._flags.exchange()
        views.sum_into(own)
        self._sent_bytes += self._reduced_bytes
        return partial

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        flat = _as_bytes(part.contiguous())
        width_at = _WIDTH_AT + (self._flags.sequence & 1)
        self._flags.say(width_at, part.shape[-1])
        self._write(flat, 0)
        self._flags.exchange()
        widths = self._flags.said(width_at)
        row_bytes = part.shape[:-1].numel() * part.element_size()
        parts = self._make_parts(part, widths)
        buffers = [_as_bytes(each) for each in parts]
        self._read(buffers, 0)
        # Ranks whose part is shorter keep step, because the flags count everyone's messages.
        for start in range(self._slot_bytes, max(widths) * row_bytes, self._slot_bytes):
            self._write(flat, start)
            self._flags.exchange()
            self._read(buffers, start)
        if self.rank == 0:
            return parts
        self._sent_bytes += flat.size
        return None

    def close(self) -> None:
        """Make a call that waits in another thread raise PeerLost, and every later one.

        The memory is unmapped with the last reference to this object.
        """
        self._flags.close()

    def _ranks(self, kernels: ModuleType, memory: np.ndarray[Any, Any], poll_s: float) -> Ranks:
        ranks: Ranks = kernels.Ranks(
            memory.ctypes.data,
            self._slots.ctypes.data,
            self.rank,
            self.num_ranks,
            self._slot_bytes,
            poll_s,
            functools.partial(self._flags.wait, looked_s=poll_s),
        )
        return ranks

    def _prepare(self, partial: torch.Tensor) -> None:
        """Views of the slots in this shape, kept until another shape comes."""
        num_bytes = partial.nbytes
        even, odd = (
            reduce_views(slots[:, :num_bytes], self.rank, partial.shape, partial.dtype)
            for slots in self._slots
        )
        self._views = (even, odd)
        self._shape, self._dtype = partial.shape, partial.dtype
        self._reduced_bytes = num_bytes * (self.num_ranks - 1)

    def _reduce_in_pieces(self, partial: torch.Tensor) -> torch.Tensor:
        flat = partial.contiguous().view(-1)
        for piece in torch.split(flat, self._slot_bytes // partial.element_size()):
            self.all_reduce(piece)
        return flat.view(partial.shape)

    def _make_parts(self, part: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
        if self.rank != 0:
            return []
        others = [part.new_empty((*part.shape[:-1], width)) for width in widths[1:]]
        return [part.contiguous(), *others]

    def _write(self, flat: np.ndarray[Any, Any], start: int) -> None:
        piece = flat[start : start + self._slot_bytes]
        self._slots[self._flags.sequence & 1, self.rank, : piece.size] = piece

    def _read(self, buffers: list[np.ndarray[Any, Any]], start: int) -> None:
        """Rank 0: what the others wrote for the exchange that has just been made."""
        slots = self._slots[(self._flags.sequence - 1) & 1]
        for slot, buffer in zip(slots[1:], buffers[1:], strict=False):
            piece = buffer[start : start + self._slot_bytes]
            piece[:] = slot[: piece.size]


def _open(
    session: str,
    rank: int,
    num_bytes: int,
    timeout_s: float,
    folder: Path | None,
    is_over: Callable[[], bool],
) -> shared_segment.Segment:
    if rank == 0:
        return shared_segment.create(session, num_bytes, folder)
    deadline_s = time.monotonic() + timeout_s
    return shared_segment.attach(session, num_bytes, deadline_s, folder, is_over)


def _is_for_kernels(partial: torch.Tensor) -> bool:
    return partial.dtype is torch.float32 and partial.is_contiguous() and partial.is_cpu


def _as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.view(-1).view(torch.uint8).numpy()
    return array
