"""Sums between processes of one host, through memory that all of them have mapped.

Every rank has a flag, which counts the messages it has written, and two slots, which it writes in
turn. A layer makes two sums, so this is written for few Python steps rather than for generality.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.errors import InternalError, PeerLost
from shoal.parallel import shared_segment
from shoal.parallel.slot_views import ReduceViews, reduce_views

# A flag's line, twice a cache line since processors fetch pairs: a writer must not slow others.
_LINE_BYTES = 128
_WORDS_PER_LINE = _LINE_BYTES // 8
_PAGE_BYTES = 4096
_MAX_SLEEP_S = 0.001


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
    ) -> None:
        """Waits until every rank has come, or `is_over`, asked now and then, says to give up.

        All must give the same `session`, which names this group and no other that lives, and the
        same `slot_bytes`: larger messages go in pieces. `poll_s` is how long a waiting rank keeps
        looking, yielding its core to whoever wants it, before it sleeps: less where ranks outnumber
        the cores. Raises PeerLost after `timeout_s` or when told to give up, OutOfMemory.
        """
        if num_ranks < 2:
            raise InternalError("shared memory is for two ranks and more: a single one is a Solo")
        self.rank = rank
        self.num_ranks = num_ranks
        self._slot_bytes = slot_bytes = -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._is_over = is_over
        self._closed = False
        flag_bytes = -(-num_ranks * _LINE_BYTES // _PAGE_BYTES) * _PAGE_BYTES
        num_bytes = flag_bytes + num_ranks * 2 * slot_bytes
        segment = self._open(session, num_bytes, folder)
        memory = np.frombuffer(segment.memory, dtype=np.uint8)
        # A memoryview's words: read and written in 25 ns, by one 8-byte move each.
        self._words = memoryview(segment.memory)[:flag_bytes].cast("Q")
        self._slots = memory[flag_bytes:].reshape(2, num_ranks, slot_bytes)
        self._flag = rank * _WORDS_PER_LINE
        self._peer_flags = [r * _WORDS_PER_LINE for r in range(num_ranks) if r != rank]
        self._sequence = 0
        self.sent_bytes = 0
        self._fence = threading.Lock()
        self._fence.acquire()
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._reduced_bytes = 0
        self._views: tuple[ReduceViews, ReduceViews]
        try:
            self._exchange()
        finally:
            segment.unlink()

    @property
    def sent_messages(self) -> int:
        """Every exchange is one to each of the others; the first says only that a rank is there."""
        return (self._sequence - 1) * (self.num_ranks - 1)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum, in place of `partial` if that is contiguous or fits a slot.

        float32 and bfloat16, which is summed in float32 and rounded once.
        """
        if partial.shape != self._shape or partial.dtype is not self._dtype:
            if partial.nbytes > self._slot_bytes:
                return self._reduce_in_pieces(partial)
            self._prepare(partial)
        views = self._views[self._sequence & 1]
        own = views.write(partial)
        self._exchange()
        views.sum_into(own)
        self.sent_bytes += self._reduced_bytes
        return partial

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        flat = _as_bytes(part.contiguous())
        half = self._sequence & 1
        self._words[self._flag + 1 + half] = part.shape[-1]
        self._write(flat, 0)
        self._exchange()
        widths = [self._words[r * _WORDS_PER_LINE + 1 + half] for r in range(self.num_ranks)]
        row_bytes = part.shape[:-1].numel() * part.element_size()
        parts = self._make_parts(part, widths)
        buffers = [_as_bytes(each) for each in parts]
        self._read(buffers, 0)
        # Ranks whose part is shorter keep step, because the flags count everyone's messages.
        for start in range(self._slot_bytes, max(widths) * row_bytes, self._slot_bytes):
            self._write(flat, start)
            self._exchange()
            self._read(buffers, start)
        if self.rank == 0:
            return parts
        self.sent_bytes += flat.size
        return None

    def close(self) -> None:
        """Make a call that waits in another thread raise PeerLost, and every later one.

        The memory is unmapped with the last reference to this object.
        """
        self._closed = True

    def _open(self, session: str, num_bytes: int, folder: Path | None) -> shared_segment.Segment:
        if self.rank == 0:
            return shared_segment.create(session, num_bytes, folder)
        deadline_s = time.monotonic() + self._timeout_s
        return shared_segment.attach(session, num_bytes, deadline_s, folder, self._is_over)

    def _exchange(self) -> None:
        """Say that this rank's next message is written; return when everyone's is."""
        if self._closed:
            raise PeerLost(f"rank {self.rank} has closed its shared memory")
        self._sequence = sequence = self._sequence + 1
        words = self._words
        fence = self._fence
        # x86 keeps the order of stores and of loads, ARM does not. Releasing a lock keeps what
        # went before it before it, and taking it again keeps what follows after it; the other
        # way round, both could slip in between the two. It costs 0.1 µs.
        fence.release()
        fence.acquire()
        words[self._flag] = sequence
        for flag in self._peer_flags:
            if words[flag] < sequence:
                self._wait(flag, sequence)
        fence.release()
        fence.acquire()

    def _wait(self, flag: int, sequence: int) -> None:
        words = self._words
        clock = time.monotonic
        started_s = clock()
        while words[flag] < sequence:
            if self._closed:
                raise PeerLost(f"rank {self.rank} closed its shared memory while it waited")
            waited_s = clock() - started_s
            if waited_s < self._poll_s:
                # Spinning instead won nothing, took 1.1 ms instead of 0.1 with three ranks on two
                # cores, and can keep other threads waiting 12 ms: this releases the GIL.
                os.sched_yield()
            elif self._is_over():
                raise PeerLost(f"rank {self.rank} was told not to wait any longer")
            elif waited_s < self._timeout_s:
                time.sleep(min(waited_s / 16, _MAX_SLEEP_S))
            else:
                peer = flag // _WORDS_PER_LINE
                raise PeerLost(
                    f"rank {peer} has been silent for {waited_s:.1f} s (message {sequence}, "
                    f"seen by rank {self.rank} in shared memory)"
                )

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
        self._slots[self._sequence & 1, self.rank, : piece.size] = piece

    def _read(self, buffers: list[np.ndarray[Any, Any]], start: int) -> None:
        """Rank 0: what the others wrote for the exchange that has just been made."""
        slots = self._slots[(self._sequence - 1) & 1]
        for slot, buffer in zip(slots[1:], buffers[1:], strict=False):
            piece = buffer[start : start + self._slot_bytes]
            piece[:] = slot[: piece.size]


def _as_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.view(-1).view(torch.uint8).numpy()
    return array
