"""A head that says what a test scripts, and workers that are threads of the test's process."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from shoal.config import EngineConfig
from shoal.errors import PeerLost
from shoal.messages import Chunk, Plan, Sampling
from shoal.parallel.channel import Channel
from shoal.parallel.control import (
    Alive,
    Form,
    FromWorker,
    Greeting,
    Hello,
    Load,
    Prepare,
    Stop,
    ToWorker,
    Usage,
)
from shoal.parallel.endpoint import LocalOnly, dial, listen
from shoal.parallel.partition import Shard
from shoal.worker import process

T = TypeVar("T")
WAIT_S = 10.0
NUM_BLOCKS = 8


class ScriptedHead:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = listen(f"unix:{folder}/head.sock", LocalOnly())
        self.address = self._listener.address
        self.workers: list[ScriptedWorker] = []

    def hire(self, name: str = "w") -> ScriptedWorker:
        worker = ScriptedWorker(self.address, name, self._folder)
        self.take_back(worker)
        return worker

    def answer(self, line: ScriptedLine, *, within_s: float = WAIT_S) -> None:
        """A worker calls that was started elsewhere, or has lost its head."""
        line.welcome(self._listener.accept(within_s), self._listener.accept(within_s))

    def take_back(self, worker: ScriptedWorker) -> None:
        self.workers.append(worker)
        self.answer(worker)

    def vanish(self) -> list[ScriptedWorker]:
        """Die, and leave the workers."""
        self._listener.close()
        workers, self.workers = self.workers, []
        for worker in workers:
            worker.hang_up()
        return workers

    def close(self) -> None:
        for worker in self.workers:
            with suppress(PeerLost):
                worker.say(Stop())
            worker.hang_up()
            worker.join()
        self._listener.close()


class ScriptedLine:
    """The head's end of a worker, wherever that runs."""

    def welcome(self, first: Channel, second: Channel) -> None:
        """In either order: each shakes hands on a thread of its own."""
        said = [
            (msgspec.msgpack.decode(channel.receive(WAIT_S)[0], type=Hello), channel)
            for channel in (first, second)
        ]
        said.sort(key=lambda each: each[0].direction)
        self.hellos = [hello for hello, _ in said]
        self.commands, self.reports = (channel for _, channel in said)

    @property
    def address(self) -> str:
        return self.hellos[0].address

    def say(self, message: ToWorker) -> None:
        self.commands.send(msgspec.msgpack.encode(message))

    def hear(self, kind: type[T], *, within_s: float = WAIT_S) -> T:
        """The next report, heartbeats and usage aside, which must be of this kind."""
        while True:
            header, _ = self.reports.receive(within_s)
            message = msgspec.msgpack.decode(header, type=FromWorker)
            if isinstance(message, Alive):
                continue
            if not isinstance(message, Usage) or kind is Usage:
                assert isinstance(message, kind), f"{message} instead of a {kind.__name__}"
                return message

    def hang_up(self) -> None:
        self.commands.close()
        self.reports.close()


class ScriptedWorker(ScriptedLine):
    """A worker whose process is a thread."""

    def __init__(self, head_address: str, name: str, folder: Path) -> None:
        self.error: BaseException | None = None
        listen_at = f"unix:{folder}/{name}.sock"
        self._thread = threading.Thread(
            target=self._run, args=(head_address, name, LocalOnly(), listen_at, 1), name=name
        )
        self._thread.start()

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the worker goes on"
        if self.error is not None:
            raise self.error

    def _run(self, *args: object) -> None:
        try:
            process.run(*args)  # type: ignore[arg-type]
        except BaseException as error:
            self.error = error


def neighbour(worker: ScriptedWorker, greeting: Greeting) -> Channel:
    """A connection to a worker's own address, greeted."""
    channel = dial(worker.address, LocalOnly(), timeout_s=WAIT_S)
    channel.send(msgspec.msgpack.encode(greeting))
    return channel


def config_of(path: Path, *, hold_s: float = 0.0) -> EngineConfig:
    return EngineConfig(
        model=str(path),
        dtype="float32",
        block_size=16,
        kv_memory_bytes=2**20,
        stall_s=WAIT_S,
        hold_s=hold_s,
    )


def load_of(path: Path, shard: Shard, *, hold_s: float = 0.0, **more: Any) -> Load:
    config = config_of(path, hold_s=hold_s)
    load = Load(config=config, path=str(path), shard=shard, memory_share=1.0, own_cores=False)
    return msgspec.structs.replace(load, **more)


def prepare_of(path: Path, shard: Shard, *, hold_s: float = 0.0) -> Prepare:
    return Prepare(config=config_of(path, hold_s=hold_s), path=str(path), shard=shard)


def form_of(epoch: int, **more: object) -> Form:
    return msgspec.structs.replace(
        Form(
            epoch=epoch,
            num_blocks=NUM_BLOCKS,
            ranks=[],
            transport="shared-memory",
            wire_format="exact",
            session=f"test-{os.getpid()}-{epoch}",
        ),
        **more,
    )


def plan_of(
    epoch: int, step: int = 0, *, start: int = 0, tokens: tuple[int, ...] = (3, 4, 5)
) -> Plan:
    """A prompt's chunk, whose next token is drawn greedily."""
    position = start + len(tokens)
    chunk = Chunk(
        request_id=1,
        start=start,
        tokens=list(tokens),
        block_ids=[2],
        sampling=Sampling(seed=0, position=position, temperature=0.0, num_logprobs=4),
    )
    return Plan(epoch=epoch, step=step, chunks=[chunk])


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """No thread and no file descriptor more than before, and torch as it was."""
    num_threads = torch.get_num_threads()
    threads, num_files = set(threading.enumerate()), num_open_files()
    yield
    torch.set_num_threads(num_threads)
    eventually(lambda: set(threading.enumerate()) <= threads, "threads are left")
    gc.collect()
    eventually(lambda: num_open_files() <= num_files, "files or sockets are left open")


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def eventually(
    is_true: Callable[[], bool],
    complaint: str,
    *,
    within_s: float = WAIT_S,
    every_s: float = 0.01,
) -> None:
    deadline_s = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline_s, complaint
        time.sleep(every_s)
