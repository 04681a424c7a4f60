"""Latency and rate between two nodes, over the channels that workers use.

One side asks and takes the times, the other answers. Each side has one channel for each
direction, as workers have.
"""

from __future__ import annotations

import statistics
import time

from shoal.cluster.hardware import Link
from shoal.errors import FrameError
from shoal.parallel.channel import Channel

_PING, _PUSH, _PULL, _STOP = b"ping", b"push", b"pull", b"stop"
_NUM_PINGS = 200
_NUM_TRANSFERS = 5
_FIRST_BYTES, _LAST_BYTES = 64 * 2**10, 16 * 2**20
# A transfer that takes so long is long beside its latency: no larger one is needed.
_LONG_S = 0.1
_PATIENCE_S = 20.0
_PING_BODY = bytes(64)


def measure_links(
    outgoing: Channel, incoming: Channel, *, here: str, there: str
) -> tuple[Link, Link]:
    """The links from `here` to `there` and back, while the other side runs `answer_pings`.

    Latency is half a median round trip of a small frame. A transfer's rate is that of its bytes
    beyond the round trip. Takes a second or two. Raises PeerLost, FrameError.
    """
    asker = _Asker(outgoing, incoming)
    for _ in range(_NUM_PINGS // 10):
        asker.ping()
    round_trip_s = statistics.median(asker.ping() for _ in range(_NUM_PINGS))
    links = [
        Link(
            source=source,
            target=target,
            latency_s=round_trip_s / 2,
            bytes_per_s=asker.rate(kind, round_trip_s),
        )
        for kind, source, target in ((_PUSH, here, there), (_PULL, there, here))
    ]
    outgoing.send(_STOP, timeout_s=_PATIENCE_S)
    return links[0], links[1]


def answer_pings(incoming: Channel, outgoing: Channel) -> None:
    """Answer until the asker has done. Raises PeerLost, FrameError for what is no question."""
    ready = bytes(_LAST_BYTES)
    while True:
        question, body = incoming.receive(timeout_s=_PATIENCE_S)
        if question == _STOP:
            return
        if question == _PULL:
            outgoing.send(_PULL, memoryview(ready)[: _wanted(body)], timeout_s=_PATIENCE_S)
        elif question in (_PING, _PUSH):
            outgoing.send(question, body if question == _PING else b"", timeout_s=_PATIENCE_S)
        else:
            raise FrameError(f"{incoming.peer} asked {question!r} where links are measured")


class _Asker:
    def __init__(self, outgoing: Channel, incoming: Channel) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._body = bytes(_LAST_BYTES)

    def ping(self) -> float:
        return self._ask(_PING, _PING_BODY, len(_PING_BODY))

    def rate(self, kind: bytes, round_trip_s: float) -> float:
        """Bytes per second of transfers as large as it takes to measure them."""
        num_bytes = _FIRST_BYTES
        while self._transfer(kind, num_bytes) < _LONG_S and num_bytes < _LAST_BYTES:
            num_bytes *= 4
        seconds = statistics.median(self._transfer(kind, num_bytes) for _ in range(_NUM_TRANSFERS))
        # With a round trip as long as the transfer, what is left would be noise.
        return num_bytes / max(seconds - round_trip_s, seconds / 10)

    def _transfer(self, kind: bytes, num_bytes: int) -> float:
        if kind == _PUSH:
            return self._ask(kind, memoryview(self._body)[:num_bytes], 0)
        return self._ask(kind, num_bytes.to_bytes(8, "big"), num_bytes)

    def _ask(self, kind: bytes, body: bytes | memoryview, answer_bytes: int) -> float:
        """Seconds until the answer is there."""
        started_s = time.perf_counter()
        self._outgoing.send(kind, body, timeout_s=_PATIENCE_S)
        answer, data = self._incoming.receive(timeout_s=_PATIENCE_S)
        seconds = time.perf_counter() - started_s
        if answer != kind or len(data) != answer_bytes:
            raise FrameError(
                f"{self._incoming.peer} answered {answer!r} with {len(data)} bytes to {kind!r}, "
                f"which wants {answer_bytes}"
            )
        return seconds


def _wanted(body: bytearray) -> int:
    num_bytes = int.from_bytes(body, "big")
    if num_bytes > _LAST_BYTES:
        raise FrameError(f"{num_bytes} bytes are more than a transfer's {_LAST_BYTES}")
    return num_bytes
