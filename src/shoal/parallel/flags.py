"""How far each rank of a group has come: a word for each in memory that all of them have mapped."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from shoal.errors import PeerLost

# Twice a cache line since processors fetch pairs: a writer must not slow others. csrc/ranks.cpp
# reads and writes flags as well.
LINE_BYTES = 128
_WORDS_PER_LINE = LINE_BYTES // 8
_MAX_SLEEP_S = 0.001


class Flags:
    """A rank's flag counts the messages it has written. Kernels hold its `wait`, and it holds none
    of them: no circle keeps what is mapped.
    """

    def __init__(
        self,
        words: memoryview,
        rank: int,
        num_ranks: int,
        *,
        timeout_s: float,
        poll_s: float,
        is_over: Callable[[], bool],
    ) -> None:
        self._words = words
        self._rank = rank
        self._num_ranks = num_ranks
        self._own = rank * _WORDS_PER_LINE
        self._peers = [peer for peer in range(num_ranks) if peer != rank]
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._is_over = is_over
        self._closed = False
        self._fence = threading.Lock()
        self._fence.acquire()

    @property
    def sequence(self) -> int:
        """Messages that this rank has written."""
        return self._words[self._own]

    def say(self, word: int, value: int) -> None:
        """Beside this rank's flag, from word 1 on; the others may read it after an exchange."""
        self._words[self._own + word] = value

    def said(self, word: int) -> list[int]:
        """By every rank."""
        return [self._words[rank * _WORDS_PER_LINE + word] for rank in range(self._num_ranks)]

    def check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"rank {self._rank} has closed its shared memory")

    def close(self) -> None:
        self._closed = True

    def exchange(self) -> None:
        """Say that this rank's next message is written; return when everyone's is."""
        self.check_open()
        words = self._words
        fence = self._fence
        sequence = words[self._own] + 1
        # x86 keeps the order of stores and of loads, ARM does not. Releasing a lock keeps what
        # went before it before it, and taking it again keeps what follows after it; the other
        # way round, both could slip in between the two. It costs 0.1 µs.
        fence.release()
        fence.acquire()
        words[self._own] = sequence
        for peer in self._peers:
            if words[peer * _WORDS_PER_LINE] < sequence:
                self.wait(peer, sequence)
        fence.release()
        fence.acquire()

    def wait(self, peer: int, sequence: int, *, looked_s: float = 0.0) -> None:
        """Return once `peer` has written message `sequence`, for which the caller has looked for
        `looked_s`. Raises PeerLost."""
        words, flag = self._words, peer * _WORDS_PER_LINE
        clock = time.monotonic
        started_s = clock() - looked_s
        while words[flag] < sequence:
            if self._closed:
                raise PeerLost(f"rank {self._rank} closed its shared memory while it waited")
            waited_s = clock() - started_s
            if waited_s < self._poll_s:
                # Spinning instead won nothing, took 1.1 ms instead of 0.1 with three ranks on two
                # cores, and can keep other threads waiting 12 ms: this releases the GIL.
                os.sched_yield()
            elif self._is_over():
                raise PeerLost(f"rank {self._rank} was told not to wait any longer")
            elif waited_s < self._timeout_s:
                time.sleep(min(waited_s / 16, _MAX_SLEEP_S))
            else:
                raise PeerLost(
                    f"rank {peer} has been silent for {waited_s:.1f} s (message {sequence}, "
                    f"seen by rank {self._rank} in shared memory)"
                )
