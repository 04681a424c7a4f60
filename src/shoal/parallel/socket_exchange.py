"""Sums between machines: every rank sends its part straight to every other, and adds up itself.

One trip instead of a ring's many: the parts of a decode step are small, and what costs is waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from shoal.config import WireFormat
from shoal.errors import FrameError, InternalError, PeerLost
from shoal.parallel import wire
from shoal.parallel.channel import Channel
from shoal.parallel.slot_views import ReduceViews, reduce_views

# Two of these can be on the way before the peer reads; every kind of socket holds that much.
_DIRECT_BYTES = 16 * 1024
# A sum's frames have no header: one system call less for the receiver.
_SUM, _PART = b"", b"part"
_WIDTH_BYTES = 8
# Most sums of a decode step are on their way for less.
_POLL_S = 0.0001


class SocketExchange:
    """A Communicator over Channels, one for each direction; CPU tensors only.

    If all ranks send before they receive, they wait for each other for ever as soon as a message
    exceeds what the sockets hold. So larger ones are sent by a thread for each peer, which TLS
    profits from as well.
    """

    native_ranks = None

    def __init__(
        self,
        rank: int,
        senders: Sequence[Channel | None],
        receivers: Sequence[Channel | None],
        *,
        wire_format: WireFormat = "exact",
        timeout_s: float = 10.0,
    ) -> None:
        """The channels to and from the other ranks, in rank order; a None for this one is skipped.

        `timeout_s` is how long any one of them may be silent during a call. "int8" sends sums'
        parts of 2 dims as int8 codes; every rank then adds its own part as the others see it.
        """
        self._senders = [channel for channel in senders if channel is not None]
        self._receivers = [channel for channel in receivers if channel is not None]
        if len(self._senders) != len(self._receivers) or not self._senders:
            raise InternalError(
                f"{len(self._senders)} channels to and {len(self._receivers)} from other ranks: "
                "there must be one of each for every other rank"
            )
        self.rank = rank
        self.num_ranks = len(self._senders) + 1
        self._others = [other for other in range(self.num_ranks) if other != rank]
        self._wire_format = wire_format
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(len(self._senders), f"shoal-rank-{rank}-send")
        self._memory = np.empty((self.num_ranks, 0), np.uint8)
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._views: ReduceViews
        self._own_bytes: memoryview
        self._peer_bytes: list[memoryview]

    @property
    def sent_bytes(self) -> int:
        return sum(channel.sent_bytes for channel in self._senders)

    @property
    def sent_messages(self) -> int:
        return sum(channel.sent_messages for channel in self._senders)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum, in place of `partial` unless it went as int8.

        float32 and bfloat16, which is summed in float32 and rounded once.
        """
        if partial.numel() == 0:
            return partial
        if self._wire_format == "int8":
            return self._reduce_codes(partial)
        if partial.shape != self._shape or partial.dtype is not self._dtype:
            self._prepare(partial)
        own = self._views.write(partial)
        self._exchange(self._own_bytes, self._peer_bytes)
        self._views.sum_into(own)
        return partial

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        if self.rank == 0:
            return [part, *(self._receive_part(channel, part) for channel in self._receivers)]
        header = _PART + part.shape[-1].to_bytes(_WIDTH_BYTES)
        body = part.contiguous().view(-1).view(torch.uint8).numpy().data
        self._senders[0].send(header, body, timeout_s=self._timeout_s)
        return None

    def close(self) -> None:
        """Close the channels; a call that waits in another thread raises PeerLost."""
        for channel in (*self._senders, *self._receivers):
            channel.close()
        self._threads.shutdown()

    def _exchange(self, own: memoryview, buffers: list[memoryview]) -> None:
        """Send `own` to every other rank and fill `buffers`, one for each, in rank order."""
        sending: list[Future[None]] = []
        for channel in self._senders:
            if len(own) <= _DIRECT_BYTES:
                channel.send(_SUM, own, timeout_s=self._timeout_s)
            else:
                sending.append(self._submit(channel, own))
        for channel, buffer in zip(self._receivers, buffers, strict=True):
            header = channel.receive_into(buffer, self._timeout_s, poll_s=_POLL_S)
            if header != _SUM:
                raise FrameError(f"{channel.peer} sent {header[:16]!r} where a sum is due")
        for future in sending:
            future.result()

    def _reduce_codes(self, partial: torch.Tensor) -> torch.Tensor:
        if partial.dim() != 2:
            raise InternalError(f"int8 is for sums of [T, E], not of {list(partial.shape)}")
        shape = (partial.shape[0], partial.shape[1])
        own = wire.encode(partial, "int8")
        bodies = [memoryview(bytearray(len(own))) for _ in self._others]
        self._exchange(own, bodies)
        bodies.insert(self.rank, own)
        total, *rest = (
            wire.decode(body, "int8", shape=shape, dtype=torch.float32) for body in bodies
        )
        for part in rest:
            total.add_(part)
        return total.to(partial.dtype)

    def _submit(self, channel: Channel, own: memoryview) -> Future[None]:
        try:
            return self._threads.submit(channel.send, _SUM, own, timeout_s=self._timeout_s)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} has closed its connections") from error

    def _prepare(self, partial: torch.Tensor) -> None:
        """Views of the buffers in this shape, kept until another shape comes."""
        num_bytes = partial.nbytes
        if num_bytes > self._memory.shape[1]:
            aligned_bytes = -(-num_bytes // 64) * 64
            self._memory = np.empty((self.num_ranks, aligned_bytes), np.uint8)
        slots = self._memory[:, :num_bytes]
        self._views = reduce_views(slots, self.rank, partial.shape, partial.dtype)
        self._own_bytes = memoryview(slots[self.rank])
        self._peer_bytes = [memoryview(slots[other]) for other in self._others]
        self._shape, self._dtype = partial.shape, partial.dtype

    def _receive_part(self, channel: Channel, own: torch.Tensor) -> torch.Tensor:
        header, body = channel.receive(self._timeout_s)
        shape = (*own.shape[:-1], int.from_bytes(header[len(_PART) :]))
        part = own.new_empty(0) if not body else torch.frombuffer(body, dtype=own.dtype)
        if not header.startswith(_PART) or part.numel() != torch.Size(shape).numel():
            raise FrameError(
                f"{channel.peer} sent {header[:16]!r} and {len(body)} bytes where a part of "
                f"{list(own.shape[:-1])} rows is due"
            )
        return part.view(shape)
