"""The head's side of a split model, part by part, without real workers."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from scripted_head import WAIT_S, eventually, nothing_left_behind

from shoal.cluster.placement import ReplicaPlacement, Seat, divide
from shoal.config import EngineConfig, Split
from shoal.errors import InternalError, OutOfMemory, PeerLost, PlacementError, SourceError
from shoal.fleet import launch_local
from shoal.fleet import reception as reception_module
from shoal.fleet import worker_line as worker_line_module
from shoal.fleet.crew import Crew, Member, transport_of
from shoal.fleet.inbox import Inbox, Lost, error_of
from shoal.fleet.launch_local import LocalLauncher
from shoal.fleet.ledger import Ledger
from shoal.fleet.muster import Muster
from shoal.fleet.reception import Reception
from shoal.fleet.remote_executor import RemoteExecutor
from shoal.fleet.worker_line import WorkerLine
from shoal.messages import StepResult
from shoal.parallel.channel import Channel
from shoal.parallel.control import (
    CacheOpened,
    Failed,
    Fetching,
    Form,
    Formed,
    FromWorker,
    Hello,
    Load,
    Loaded,
    OpenCache,
    Stop,
    ToWorker,
    Usage,
)
from shoal.parallel.endpoint import LocalOnly, dial, listen
from shoal.parallel.head_call import call_head
from shoal.parallel.partition import Dims, Span, shards_of

DIMS = Dims(
    num_layers=30, num_query_heads=9, num_kv_heads=3, num_mlp_columns=1536, vocab_size=49152
)
CONFIG = EngineConfig(model="any")
LOADED = Loaded(
    num_blocks=10, max_context=128, vocab_size=100, num_read_bytes=1, load_s=0.1, description="tiny"
)


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


# ---- inbox ------------------------------------------------------------------------------------


def test_an_inbox_collects_one_reply_from_each() -> None:
    inbox = Inbox()
    inbox.put("a", StepResult(epoch=0, step=3, results=[]))
    inbox.put("b", Formed(epoch=2))
    inbox.put("a", Formed(epoch=2))
    replies = inbox.replies(Formed, ["a", "b"], timeout_s=1)
    assert replies.keys() == {"a", "b"}


def test_an_inbox_drops_what_is_of_an_epoch_before() -> None:
    inbox = Inbox()
    inbox.put("a", Formed(epoch=1))
    inbox.put("b", Failed(epoch=1, step=4, kind="PeerLost", message="rank 0 is silent"))
    for worker in ("a", "b"):
        inbox.put(worker, Formed(epoch=2))
    replies = inbox.replies(
        Formed, ["a", "b"], timeout_s=1, is_meant=lambda reply: reply.epoch == 2
    )
    assert {reply.epoch for reply in replies.values()} == {2}


def test_an_inbox_says_who_is_missing() -> None:
    inbox = Inbox()
    inbox.put("b", LOADED)
    with pytest.raises(PeerLost, match="no answer in time from a, c"):
        inbox.replies(Loaded, ["a", "b", "c"], timeout_s=0.05)
    inbox.put("c", Lost("it hung up"))
    with pytest.raises(PeerLost, match="worker c is lost: it hung up"):
        inbox.replies(Loaded, ["a", "b", "c"], timeout_s=5)


def test_a_workers_error_is_raised_again_as_what_it_was() -> None:
    inbox = Inbox()
    inbox.put("a", Failed(epoch=0, kind="OutOfMemory", message="7 MiB are free"))
    with pytest.raises(OutOfMemory, match="worker a: 7 MiB are free"):
        inbox.replies(Loaded, ["a"], timeout_s=5)
    unknown = error_of("a", Failed(epoch=0, kind="ZeroDivisionError", message="division by zero"))
    assert type(unknown) is InternalError and "ZeroDivisionError" in str(unknown)
    # A name of the module that is no error of ours must not be called.
    assert type(error_of("a", Failed(epoch=0, kind="annotations", message="x"))) is InternalError


# ---- crew -------------------------------------------------------------------------------------


class FakeLine:
    """Stands for a worker that answers a Form at once, unless told otherwise."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.address = f"unix:/{worker}"
        self.inbox = Inbox()
        self.is_lost = False
        self.peers = {"local"}
        self.usage: Usage | None = None
        self.at_form: Failed | None = None
        self.told: list[ToWorker] = []

    def send(self, message: ToWorker) -> None:
        self.told.append(message)
        if isinstance(message, Form):
            self.inbox.put(self.worker, self.at_form or Formed(epoch=message.epoch))

    @property
    def form(self) -> Form:
        return next(each for each in reversed(self.told) if isinstance(each, Form))


def crew_of(*ranks_per_stage: int, nodes: tuple[str, ...] = ("here",)) -> tuple[Crew, dict]:
    """Stages with so many ranks each; workers are named by stage and rank, as `1.0`."""
    stages = []
    for index, num_ranks in enumerate(ranks_per_stage):
        shards = shards_of(DIMS, Span(index, index + 1), [1.0] * num_ranks)
        stages.append(
            tuple(
                Seat(worker=f"{index}.{s.rank}", node=nodes[s.rank % len(nodes)], shard=s)
                for s in shards
            )
        )
    placement = ReplicaPlacement(stages=tuple(stages))
    lines = {seat.worker: FakeLine(seat.worker) for seat in placement.seats}
    members = {worker: Member(line, LOADED) for worker, line in lines.items()}
    return Crew(placement, members, CONFIG), lines


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1, 9)])
def test_every_rank_receives_hidden_states_from_exactly_one(ranks: tuple[int, ...]) -> None:
    crew, lines = crew_of(*ranks)
    crew.form(5)
    for index, num_ranks in enumerate(ranks):
        for rank in range(num_ranks):
            form = lines[f"{index}.{rank}"].form
            assert form.ranks == [f"unix:/{index}.{each}" for each in range(num_ranks)]
            if index == 0:
                assert form.previous_rank is None
                continue
            own = f"unix:/{index}.{rank}"
            senders = [r for r in range(ranks[index - 1]) if own in sends_to(lines, index - 1, r)]
            assert senders == [form.previous_rank]
    assert all(sends_to(lines, len(ranks) - 1, rank) == [] for rank in range(ranks[-1]))


def sends_to(lines: dict[str, FakeLine], stage: int, rank: int) -> list[str]:
    return lines[f"{stage}.{rank}"].form.next_stage


def test_ranks_of_a_stage_share_a_session_that_no_other_has() -> None:
    crew, lines = crew_of(2, 2)
    sessions = []
    for epoch in (1, 2):
        crew.form(epoch)
        for stage in range(2):
            (session,) = {lines[f"{stage}.{rank}"].form.session for rank in range(2)}
            sessions.append(session)
    assert len(set(sessions)) == 4


def test_a_crew_has_the_blocks_of_its_least_member() -> None:
    crew, lines = crew_of(1, 1)
    less = msgspec.structs.replace(LOADED, num_blocks=4)
    crew = Crew(crew.placement, crew.members | {"1.0": Member(lines["1.0"], less)}, CONFIG)
    crew.form(1)
    assert crew.num_blocks == 4
    assert {line.form.num_blocks for line in lines.values()} == {4}


def test_shared_memory_is_for_ranks_of_one_node() -> None:
    here, _ = crew_of(2)
    apart, _ = crew_of(2, nodes=("here", "there"))
    assert transport_of(here.stages[0], CONFIG) == "shared-memory"
    assert transport_of(apart.stages[0], CONFIG) == "sockets"
    forced = EngineConfig(model="any", split=Split(transport="gloo"))
    assert transport_of(here.stages[0], forced) == "gloo"


def test_a_crew_does_not_form_around_the_lost() -> None:
    crew, lines = crew_of(1, 1)
    lines["1.0"].is_lost = True
    with pytest.raises(PeerLost, match=r"worker 1\.0 is lost"):
        crew.form(1)


def test_a_crew_takes_no_result_of_an_epoch_before() -> None:
    crew, lines = crew_of(1)
    crew.form(2)
    inbox = lines["0.0"].inbox
    inbox.put("0.0", Failed(epoch=1, step=9, kind="PeerLost", message="old"))
    for epoch in (1, 2):
        inbox.put("0.0", StepResult(epoch=epoch, step=epoch, results=[]))
    assert crew.next_result(2, timeout_s=1).step == 2
    inbox.put("0.0", Failed(epoch=2, step=3, kind="SourceError", message="new"))
    with pytest.raises(SourceError, match="new"):
        crew.next_result(2, timeout_s=1)
    with pytest.raises(PeerLost, match="no answer in time"):
        crew.next_result(2, timeout_s=0.01)


# ---- ledger -----------------------------------------------------------------------------------


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


def test_a_seats_totals_outlive_epochs_and_workers() -> None:
    ledger = Ledger()
    placement = divide(DIMS, Split(pipeline=2), ["here"]).replicas[0]
    first = [seat.worker for seat in placement.seats]
    ledger.close_epoch(placement, dict.fromkeys(first, usage(0, 5, 1.0)), active_s=2.0)
    replaced = crew_of(1, 1)[0].placement
    now = {"0.0": usage(1, 2, 0.5), "1.0": None}
    one, other = ledger.totals(replaced, now, active_s=1.0)
    assert (one.worker, one.steps, one.busy_seconds, one.stage_bytes) == ("0.0", 7, 1.5, 70)
    assert one.bubble_seconds == pytest.approx(1.5)
    assert (other.steps, other.busy_seconds) == (5, 1.0), "it has not reported in this epoch yet"
    again = ledger.totals(replaced, now, active_s=1.0)
    assert again == [one, other], "asking changes nothing"


# ---- muster -----------------------------------------------------------------------------------


class FakeWorkers:
    """A launcher and a reception in one: its workers load, or do what `instead` says."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.lines: dict[str, LoadingLine] = {}
        self.instead: dict[str, Failed | Lost | Exception] = {}
        self.at_cache: dict[str, Failed] = {}
        self.at_form: dict[str, Failed] = {}

    def start(self, worker: str, node: str, *, num_threads: int) -> None:
        assert (node, num_threads) == ("here", 2)
        if isinstance(error := self._instead(worker), PlacementError):
            raise error
        self.started.append(worker)

    def stop(self, worker: str) -> None:
        self.stopped.append(worker)

    def wait_for(self, worker: str, *, deadline_s: float) -> LoadingLine:
        assert deadline_s > time.monotonic()
        instead = self._instead(worker)
        if isinstance(instead, PeerLost):
            raise instead
        self.lines[worker] = LoadingLine(worker, instead)
        seat = worker.partition("-")[0]
        self.lines[worker].at_cache = self.at_cache.get(seat, CacheOpened())
        self.lines[worker].at_form = self.at_form.get(seat)
        return self.lines[worker]

    def _instead(self, worker: str) -> Failed | Lost | Exception | None:
        return self.instead.get(worker.partition("-")[0])


class LoadingLine(FakeLine):
    def __init__(self, worker: str, instead: Failed | Lost | Exception | None) -> None:
        super().__init__(worker)
        self.report: object = None
        self.at_cache: CacheOpened | Failed = CacheOpened()
        self.dismissed = False
        self._instead = instead

    def send(self, message: ToWorker) -> None:
        super().send(message)
        if isinstance(message, Load):
            answer = self._instead if isinstance(self._instead, Failed | Lost) else LOADED
            self.is_lost = isinstance(answer, Lost)
            self.inbox.put(self.worker, answer)
        elif isinstance(message, OpenCache):
            self.inbox.put(self.worker, self.at_cache)

    def dismiss(self) -> None:
        self.dismissed = True


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def muster(workers: FakeWorkers) -> Muster:
    muster = Muster(workers, workers, CONFIG, path_on=lambda node: f"/{node}/model")
    muster.share_out(divide(DIMS, Split(pipeline=3), ["here"]).replicas, {"here": 6})
    return muster


PLACEMENT = divide(DIMS, Split(pipeline=3), ["here"]).replicas[0]


def remote_executor(muster: Muster) -> RemoteExecutor:
    def elsewhere(placement: ReplicaPlacement) -> ReplicaPlacement:
        raise PlacementError(f"there is no other node for {placement}")

    return RemoteExecutor(muster.gather(PLACEMENT), muster, elsewhere=elsewhere, step_timeout_s=1.0)


def test_a_muster_starts_and_loads_a_worker_for_every_seat(
    muster: Muster, workers: FakeWorkers
) -> None:
    crew = muster.gather(PLACEMENT)
    assert workers.started == ["r0s0t0-1", "r0s1t0-2", "r0s2t0-3"] == list(crew.members)
    load, opened = workers.lines["r0s1t0-2"].told
    assert opened == OpenCache(num_blocks=LOADED.num_blocks)
    assert load.path == "/here/model" and load.shard.layers == Span(10, 20)
    assert load.memory_share == pytest.approx(1 / 3) and load.own_cores


def test_mending_replaces_only_the_lost_under_new_names(
    muster: Muster, workers: FakeWorkers
) -> None:
    crew = muster.gather(PLACEMENT)
    assert muster.mend(crew) is crew
    workers.lines["r0s1t0-2"].is_lost = True
    mended = muster.mend(crew)
    assert list(seat.worker for seat in mended.placement.seats) == [
        "r0s0t0-1",
        "r0s1t0-4",
        "r0s2t0-3",
    ]
    assert workers.lines["r0s1t0-2"].dismissed and workers.stopped == ["r0s1t0-2"]
    assert mended.members["r0s0t0-1"] is crew.members["r0s0t0-1"]
    assert len(workers.started) == len(set(workers.started)) == 4
    mended.form(1)
    assert workers.lines["r0s1t0-4"].form.epoch == 1


@pytest.mark.parametrize(
    ("trouble", "raised"),
    [
        (Failed(epoch=0, kind="OutOfMemory", message="no room"), OutOfMemory),
        (Lost("it hung up"), PeerLost),
        (PeerLost("did not call in time"), PeerLost),
        (PlacementError("no such node"), PlacementError),
    ],
    ids=["cannot load", "dies", "does not call", "cannot start"],
)
def test_a_recruit_that_fails_leaves_nobody_behind(
    trouble: Failed | Lost | Exception,
    raised: type[Exception],
    muster: Muster,
    workers: FakeWorkers,
) -> None:
    workers.instead["r0s1t0"] = trouble
    with pytest.raises(raised):
        muster.gather(PLACEMENT)
    assert set(workers.started) <= set(workers.stopped)
    assert all(line.dismissed for line in workers.lines.values())


def test_recruits_without_room_for_their_cache_leave_nobody_behind(
    muster: Muster, workers: FakeWorkers
) -> None:
    workers.at_cache["r0s1t0"] = Failed(epoch=0, kind="OutOfMemory", message="no room")
    with pytest.raises(OutOfMemory):
        muster.gather(PLACEMENT)
    assert set(workers.started) == set(workers.stopped)
    assert all(line.dismissed for line in workers.lines.values())


def test_a_worker_lost_while_another_placement_is_prepared_is_replaced_where_it_was(
    muster: Muster, workers: FakeWorkers
) -> None:
    crew = muster.gather(PLACEMENT)
    muster.share_out(divide(DIMS, Split(pipeline=2), ["there"]).replicas, {"there": 4})
    workers.lines["r0s1t0-2"].is_lost = True
    assert "r0s1t0-4" in muster.mend(crew).members


# ---- executor ---------------------------------------------------------------------------------


def test_a_restart_that_fails_counts_no_usage_twice(muster: Muster, workers: FakeWorkers) -> None:
    executor = remote_executor(muster)
    executor.restart(0)
    for line in workers.lines.values():
        line.usage = usage(0, 5, 1.0)
    workers.lines["r0s1t0-2"].is_lost = True
    workers.instead["r0s1t0"] = PeerLost("did not call in time")
    for epoch in (1, 2):
        with pytest.raises(PeerLost):
            executor.restart(epoch)
    workers.instead.clear()
    executor.restart(3)
    assert [each.steps for each in executor.workers()] == [5, 5, 5]
    assert {line.form.epoch for line in workers.lines.values() if not line.dismissed} == {3}


def test_a_successor_has_taken_over_only_once_it_has_formed(
    muster: Muster, workers: FakeWorkers
) -> None:
    executor = remote_executor(muster)
    executor.restart(0)
    successor = muster.gather(PLACEMENT)
    done = executor.succeed_with(successor)
    workers.lines["r0s1t0-5"].is_lost = True
    workers.instead["r0s1t0"] = PeerLost("did not call in time")
    with pytest.raises(PeerLost):
        executor.restart(1)
    assert not done.is_set()
    workers.instead.clear()
    executor.restart(2)
    assert done.is_set()
    assert list(executor.crew.members) == ["r0s0t0-4", "r0s2t0-6", "r0s1t0-8"]
    assert all(workers.lines[f"r0s{stage}t0-{stage + 1}"].dismissed for stage in range(3))


def test_a_successor_whose_turn_never_came_is_dismissed(
    muster: Muster, workers: FakeWorkers
) -> None:
    executor = remote_executor(muster)
    executor.succeed_with(muster.gather(PLACEMENT))
    executor.succeed_with(muster.gather(PLACEMENT))
    eventually(lambda: workers.lines["r0s2t0-6"].dismissed, "the first successor is kept")
    executor.close()
    assert set(workers.started) == set(workers.stopped)


# ---- reception --------------------------------------------------------------------------------


@pytest.fixture
def reception() -> Iterator[Reception]:
    # Not tmp_path: a unix socket's path has room for 107 bytes.
    with tempfile.TemporaryDirectory() as folder:
        reception = Reception(listen(f"unix:{folder}/head.sock", LocalOnly()), services={})
        yield reception
        reception.close()


def hello(worker: str, direction: str, service: str = "worker") -> Hello:
    return Hello(service=service, direction=direction, caller=worker, address=f"unix:/{worker}")


def call(reception: Reception, message: bytes) -> Channel:
    channel = dial(reception.address, LocalOnly(), timeout_s=WAIT_S)
    channel.send(message)
    return channel


def wait(reception: Reception, worker: str, within_s: float = WAIT_S) -> WorkerLine:
    return reception.wait_for(worker, deadline_s=time.monotonic() + within_s)


def test_the_reception_pairs_connections_that_come_in_any_order(reception: Reception) -> None:
    order = [("a", "up"), ("b", "down"), ("a", "down"), ("b", "up")]
    calls = {each: call(reception, msgspec.msgpack.encode(hello(*each))) for each in order}
    for worker in ("b", "a"):
        line = wait(reception, worker)
        assert (line.worker, line.address) == (worker, f"unix:/{worker}")
        line.send(Stop())
        told = msgspec.msgpack.decode(calls[worker, "down"].receive(WAIT_S)[0], type=ToWorker)
        assert told == Stop()
        calls[worker, "up"].send(msgspec.msgpack.encode(Formed(epoch=3)))
        _, message = line.inbox.next([worker], time.monotonic() + WAIT_S)
        assert message == Formed(epoch=3)
        line.dismiss()
    for channel in calls.values():
        channel.close()


def test_usage_is_kept_and_a_loss_is_reported(reception: Reception) -> None:
    down, up = call_head(reception.address, LocalOnly(), hello("w", "down"))
    line = wait(reception, "w")
    reports: list[FromWorker] = [usage(0, 5, 1.0), Formed(epoch=0)]
    for report in reports:
        up.send(msgspec.msgpack.encode(report))
    assert line.inbox.next(["w"], time.monotonic() + WAIT_S) == ("w", reports[1])
    assert line.usage == reports[0] and not line.is_lost
    up.close()
    down.close()
    with pytest.raises(PeerLost, match="worker w is lost"):
        line.inbox.next(["w"], time.monotonic() + WAIT_S)
    assert line.is_lost
    line.dismiss()


def test_a_line_whose_reports_cannot_be_heard_is_lost(
    reception: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for the worker must hear of it: loading may take an hour."""

    def broken(_what: str, _done_bytes: int, _total_bytes: int | None) -> None:
        raise BrokenPipeError(32, "nobody reads the terminal")

    down, up = call_head(reception.address, LocalOnly(), hello("w", "down"))
    line = wait(reception, "w")
    line.report = broken
    up.send(msgspec.msgpack.encode(Fetching(what="weights", done_bytes=1, total_bytes=2)))
    with pytest.raises(PeerLost, match="nobody reads"):
        line.inbox.next(["w"], time.monotonic() + WAIT_S)
    assert line.is_lost and "cannot be taken" in caplog.text
    line.dismiss()
    down.close()
    up.close()


def test_a_launcher_that_is_closed_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent_nursery(_options: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(["sh", "-c", "cat > /dev/null"], stdin=pipe, stdout=pipe)

    monkeypatch.setattr(launch_local, "_start_nursery", silent_nursery)
    launcher = LocalLauncher("unix:/head", Path("/nowhere"), lambda *_: None, cores=[])
    launcher.close()
    launcher.stop("w")
    with pytest.raises(PlacementError, match="has ended"):
        launcher.start("w", "local", num_threads=1)


def test_a_line_that_cannot_be_sent_to_is_lost(reception: Reception) -> None:
    """Mending must not take it for alive until its other connection breaks as well."""
    down, up = call_head(reception.address, LocalOnly(), hello("w", "down"))
    line = wait(reception, "w")
    down.close()
    with pytest.raises(PeerLost):
        line.send(Formed(epoch=0))
    assert line.is_lost
    line.dismiss()
    up.close()


def test_a_worker_that_does_not_read_is_lost(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen one must not keep its head waiting for ever, with whoever waits for that."""
    monkeypatch.setattr(worker_line_module, "_SEND_S", 0.1)
    down, up = call_head(reception.address, LocalOnly(), hello("w", "down"))
    line = wait(reception, "w")
    with pytest.raises(PeerLost, match="silent"):
        line.send_encoded(bytes(2**24))
    assert line.is_lost
    line.dismiss()
    down.close()
    up.close()


def test_the_reception_does_not_wait_for_a_process_that_has_ended(reception: Reception) -> None:
    threading.Timer(0.05, reception.note_end, ("w", "exit status 3")).start()
    with pytest.raises(PeerLost, match="w ended before it called: exit status 3"):
        wait(reception, "w")
    with pytest.raises(PeerLost, match="did not call in time"):
        wait(reception, "other", within_s=0.01)


def test_foreign_silent_and_unknown_callers_are_dropped(
    reception: Reception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception_module, "_HELLO_S", 0.1)
    silent = dial(reception.address, LocalOnly(), timeout_s=WAIT_S)
    rude = call(reception, b"\xc1 no msgpack")
    strange = call_head(reception.address, LocalOnly(), hello("w", "down", "operator"))
    down, up = call_head(reception.address, LocalOnly(), hello("w", "down"))
    wait(reception, "w").dismiss()
    eventually(lambda: caplog.text.count("is dropped") == 2, "rude or silent ones are kept")
    assert "'operator', which is not served here" in caplog.text
    for channel in (silent, rude, *strange):
        with pytest.raises(PeerLost, match=r"hung up|reset"):
            channel.receive(WAIT_S)
    for channel in (silent, rude, *strange, down, up):
        channel.close()


def test_a_service_gets_its_caller_and_its_failure_harms_nobody(
    reception: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(down: Channel, up: Channel) -> None:
        question, _ = up.receive(WAIT_S)
        down.send(question.upper())
        raise ZeroDivisionError

    reception.offer("operator", serve)
    for _ in range(2):
        down, up = call_head(reception.address, LocalOnly(), hello("me", "down", "operator"))
        up.send(b"status?")
        assert down.receive(WAIT_S)[0] == b"STATUS?"
        with pytest.raises(PeerLost):
            down.receive(WAIT_S)
        down.close()
        up.close()
    assert caplog.text.count("raise ZeroDivisionError") == 2


def test_closing_hangs_up_on_everyone(reception: Reception) -> None:
    started = threading.Event()

    def serve(_down: Channel, up: Channel) -> None:
        started.set()
        up.receive()

    reception.offer("operator", serve)
    calls = [call(reception, msgspec.msgpack.encode(hello("half", "up")))]
    calls += call_head(reception.address, LocalOnly(), hello("unawaited", "down"))
    calls += call_head(reception.address, LocalOnly(), hello("me", "down", "operator"))
    assert started.wait(WAIT_S)
    reception.close()
    for channel in calls:
        with pytest.raises(PeerLost, match=r"hung up|reset"):
            channel.receive(WAIT_S)
        channel.close()
