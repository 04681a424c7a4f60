"""A launcher and workers that are not real: they do at once what a test says they do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

from msgspec import structs

from shoal.cluster.placement import divide
from shoal.config import EngineConfig, Split
from shoal.errors import PeerLost, PlacementError
from shoal.fleet.inbox import Called, Inbox, Lost
from shoal.messages import Plan
from shoal.parallel.control import (
    CacheOpened,
    Failed,
    Form,
    Formed,
    FromWorker,
    Load,
    Loaded,
    OpenCache,
    Prepare,
    Prepared,
    ToWorker,
    Usage,
)
from shoal.parallel.partition import Dims, Shard

DIMS = Dims(
    num_layers=30, num_query_heads=9, num_kv_heads=3, num_mlp_columns=1536, vocab_size=49152
)
CONFIG = EngineConfig(model="any")
LOADED = Loaded(
    num_blocks=10, max_context=128, vocab_size=100, num_read_bytes=1, load_s=0.1, description="tiny"
)
PLACEMENT = divide(DIMS, Split(pipeline=3), ["here"]).replicas[0]


class Quiet:
    """In place of an answer: there is none."""


QUIET = Quiet()
Answer = FromWorker | Lost | Quiet


class FakeLine:
    """Stands for a worker that does all it is told at once, unless its fakes say otherwise."""

    def __init__(self, worker: str, fakes: FakeWorkers | None = None) -> None:
        self.worker = self.process = worker
        self.address = f"unix:/{worker}"
        self.pid = 7
        self.epoch = 0
        self.shards: tuple[Shard, ...] = ()
        self.peers = {"local"}
        self.report: object = None
        self.usage: Usage | None = None
        self.is_lost = False
        self.dismissed = False
        self.told: list[ToWorker] = []
        self.num_plans = 0
        self._fakes = fakes or FakeWorkers()
        self._loss: Lost | None = None
        self._inbox = Inbox()
        self._on_lost: Callable[[], None] = lambda: None

    def report_to(self, inbox: Inbox, on_lost: Callable[[], None] = lambda: None) -> None:
        self._inbox, self._on_lost = inbox, on_lost
        if self._loss is not None:
            inbox.put(self.worker, self._loss)

    def say(self, message: FromWorker) -> None:
        self._inbox.put(self.worker, message)

    def lose(self, loss: Lost) -> None:
        if not self.is_lost:
            self.is_lost, self._loss = True, loss
            self._inbox.put(self.worker, loss)
            self._on_lost()

    def die(self, reason: str = "it hung up") -> None:
        self.lose(Lost(reason))

    def send(self, message: ToWorker) -> None:
        if self.is_lost or self.dismissed:
            raise PeerLost(f"{self.worker} is gone")
        self.told.append(message)
        answer = self._fakes.answer(self.worker, message)
        if isinstance(answer, Lost):
            self.lose(answer)
        elif answer is not None and not isinstance(answer, Quiet):
            self.say(answer)

    def send_encoded(self, message: bytes) -> None:
        assert message
        if self.is_lost:
            raise PeerLost(f"{self.worker} is gone")
        self.num_plans += 1

    def dismiss(self) -> None:
        self.dismissed = True
        self.lose(Lost("we hung up"))  # as the thread of a real line says then

    def heard(self, kind: type[ToWorker]) -> int:
        """How many messages of a kind it was told."""
        return sum(isinstance(message, kind) for message in self.told)

    @property
    def form(self) -> Form:
        return next(each for each in reversed(self.told) if isinstance(each, Form))


class FakeWorkers:
    """A launcher and a reception in one.

    What a worker of a seat does instead of what it should is taken from `at_start`, `at_load`,
    `at_cache`, `at_form` and `at_prepare`, one after the other; names are without numbers.
    """

    address = "unix:/head"

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.adopted: list[str] = []
        self.nodes_of: dict[str, str] = {}
        self.lines: dict[str, FakeLine] = {}
        self.callers: list[FakeLine] = []
        self.at_start: dict[str, Iterator[Lost | Quiet | PlacementError | str]] = {}
        self.at_load: dict[str, Iterator[Answer]] = {}
        self.at_cache: dict[str, Iterator[Answer]] = {}
        self.at_form: dict[str, Iterator[Answer]] = {}
        self.at_prepare: dict[str, Iterator[Answer]] = {}
        self._expected: dict[str, Inbox] = {}
        self._waiting: dict[str, FakeLine] = {}

    @property
    def running(self) -> dict[str, str]:
        """The nodes of those that were not stopped."""
        left = Counter(self.started) - Counter(self.stopped)
        return {worker: self.nodes_of[worker] for worker in left}

    @property
    def expected(self) -> set[str]:
        return set(self._expected)

    # ---- a launcher -----------------------------------------------------------------------

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        assert num_threads > 0
        assert worker in self._expected, "nobody would hear it call"
        self.nodes_of[worker] = node
        instead = next(self.at_start.get(_seat(worker), iter(())), None)
        if isinstance(instead, PlacementError):
            raise instead
        self.started.append(worker)
        if isinstance(instead, Lost):
            self._expected.pop(worker).put(worker, instead)
        elif not isinstance(instead, Quiet):
            self.call(worker, peer=instead or "local")

    def call(self, worker: str, *, peer: str = "local") -> None:
        line = self._waiting[worker] = self.lines[worker] = FakeLine(worker, self)
        line.peers = {peer}
        self._expected.pop(worker).put(worker, Called())

    def start_spare(self, worker: str, node: str) -> None:
        self.start(worker, node, num_threads=1)

    def place(self, worker: str, num_threads: int) -> tuple[int, ...]:
        assert worker in self.nodes_of
        return tuple(range(num_threads))

    def adopt(self, worker: str, node: str, pid: int) -> None:
        if pid == 0:
            raise PlacementError(f"worker {worker} is not there any more")
        self.nodes_of[worker] = node
        self.adopted.append(worker)

    def stop(self, worker: str) -> None:
        self.stopped.append(worker)

    # ---- a reception ----------------------------------------------------------------------

    def expect(self, worker: str, inbox: Inbox) -> None:
        self._expected[worker] = inbox

    def take(self, worker: str) -> FakeLine:
        return self._waiting.pop(worker)

    def forget(self, worker: str) -> None:
        self._expected.pop(worker, None)
        line = self._waiting.pop(worker, None)
        if line is not None:
            line.dismiss()

    def wait_for(self, worker: str, inbox: Inbox, *, deadline_s: float) -> FakeLine:
        assert deadline_s > time.monotonic()
        taken = inbox.take(0)
        if taken is None or isinstance(taken[1], Lost):
            raise PeerLost(f"worker {worker} did not call")
        return self.take(worker)

    def strays(self) -> list[FakeLine]:
        found, self.callers = self.callers, []
        return found

    def turn_away_strays(self) -> None:
        for line in self.strays():
            line.dismiss()

    # ---- what workers answer --------------------------------------------------------------

    def answer(self, worker: str, message: ToWorker) -> Answer | None:
        match message:
            case Load():
                return self._instead(self.at_load, worker) or LOADED
            case OpenCache():
                return self._instead(self.at_cache, worker) or CacheOpened()
            case Prepare(shard=shard):
                instead = self._instead(self.at_prepare, worker)
                return instead or Prepared(shard=shard, held=True)
            case Form(epoch=epoch):
                instead = self._instead(self.at_form, worker) or Formed(epoch=epoch)
                if isinstance(instead, Failed):
                    return structs.replace(instead, epoch=epoch)
                return instead
            case Plan():
                raise AssertionError("plans are sent encoded")
        return None

    def _instead(self, script: dict[str, Iterator[Answer]], worker: str) -> Answer | None:
        return next(script.get(_seat(worker), iter(())), None)


def _seat(worker: str) -> str:
    return worker.partition("-")[0]


def usage(epoch: int, steps: int, busy_s: float) -> Usage:
    return Usage(
        epoch=epoch,
        busy_s=busy_s,
        waiting_s=busy_s / 2,
        num_steps=steps,
        stage_bytes=10 * steps,
        stage_messages=steps,
        rank_bytes=0,
        rank_messages=0,
    )
