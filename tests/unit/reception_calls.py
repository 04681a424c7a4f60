"""Calls at a real reception, over unix sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from scripted_head import WAIT_S

from shoal.config import DEAD_AFTER_S
from shoal.fleet.inbox import Called, Inbox
from shoal.fleet.reception import Reception
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.channel import Channel
from shoal.parallel.control import FromWorker, Hello, Stop, ToWorker
from shoal.parallel.endpoint import LocalOnly, dial, listen
from shoal.parallel.head_call import call_head
from shoal.parallel.partition import Shard


@contextmanager
def opened(*, dead_after_s: float = 60 * DEAD_AFTER_S) -> Iterator[Reception]:
    # Not tmp_path: a unix socket's path has room for 107 bytes.
    with tempfile.TemporaryDirectory() as folder:
        listener = listen(f"unix:{folder}/head.sock", LocalOnly())
        reception = Reception(listener, services={}, dead_after_s=dead_after_s)
        try:
            yield reception
        finally:
            reception.close()


def hello(
    caller: str,
    direction: str = "down",
    service: str = "worker",
    shards: tuple[Shard, ...] = (),
) -> Hello:
    return Hello(
        service=service,  # type: ignore[arg-type]
        direction=direction,  # type: ignore[arg-type]
        caller=caller,
        address=f"unix:/{caller}",
        pid=7,
        shards=shards,
        epoch=4,
    )


def dialled(reception: Reception, message: bytes) -> Channel:
    """One of the two connections, with what is said first."""
    channel = dial(reception.address, LocalOnly(), timeout_s=WAIT_S)
    channel.send(message)
    return channel


class Caller:
    """A worker's side."""

    def __init__(self, reception: Reception, said: Hello) -> None:
        self.down, self.up = call_head(reception.address, LocalOnly(), said)

    def say(self, message: FromWorker) -> None:
        self.up.send(msgspec.msgpack.encode(message))

    def hear(self) -> ToWorker:
        message: ToWorker = msgspec.msgpack.decode(self.down.receive(WAIT_S)[0], type=ToWorker)
        return message

    def is_told_to_end(self) -> bool:
        return self.hear() == Stop()

    def close(self) -> None:
        self.down.close()
        self.up.close()


def connected(reception: Reception, worker: str = "w") -> tuple[WorkerLine, Caller, Inbox]:
    """A worker that was expected and has called, and the inbox that its line reports to."""
    inbox = Inbox()
    reception.expect(worker, inbox)
    caller = Caller(reception, hello(worker))
    assert inbox.take(WAIT_S) == (worker, Called())
    line = reception.take(worker)
    line.report_to(inbox)
    return line, caller, inbox
