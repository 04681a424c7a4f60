"""Requests of a replica without workers go on elsewhere; the replica comes back when it is well."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from test_engine import Counting, answer, make_engine, wait_until
from test_replicas import Replicas, is_idle, replicas

from shoal.cluster.router import Router
from shoal.engine import replicas as under_test
from shoal.engine.outputs import RequestOutput, gather
from shoal.engine.streams import SyncStream
from shoal.errors import EngineStopped, InternalError, PeerLost, QueueFull
from shoal.request import SamplingParams

ENDLESS = SamplingParams(max_tokens=50, ignore_eos=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOVE_AFTER_S", 0.0)


def lose(engine: Replicas, number: int) -> None:
    """Its workers are lost in the next step, and no others can be had."""
    executor = engine.executors[number]
    executor.lacking.set()
    executor.fail_next = PeerLost("a worker is lost")


def mend(engine: Replicas, *numbers: int) -> None:
    for number in numbers:
        engine.executors[number].lacking.clear()
    wait_until(lambda: not any(engine._engines[f"r{n}"].is_recovering for n in numbers))


@pytest.fixture
def pair() -> Iterator[Replicas]:
    with replicas(2) as engine:
        yield engine
        mend(engine, 0, 1)


def calm(prompt: list[int], params: SamplingParams) -> RequestOutput:
    with replicas(1) as engine:
        return gather(prompt, params.n, engine.submit_sync(prompt, params))


EVERYTHING = [
    ([5], SamplingParams(max_tokens=9)),
    ([1] * 40, SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=0, logprobs=0)),
    ([2, 2], SamplingParams(max_tokens=20, stop=("ghi", "zz"), ignore_eos=True)),
    ([3], SamplingParams(max_tokens=6, n=3, logprobs=0)),
    ([4], SamplingParams(max_tokens=30, min_tokens=12)),
]


@pytest.mark.parametrize("num_steps", [0, 1, 3, 6])
@pytest.mark.parametrize(("prompt", "params"), EVERYTHING)
def test_a_moved_answer_is_the_calm_one(
    pair: Replicas, prompt: list[int], params: SamplingParams, num_steps: int
) -> None:
    first = pair.executors[0]
    steps = itertools.count()
    collect = first.collect

    def lose_in_time() -> object:
        if next(steps) == num_steps:
            lose(pair, 0)
        return collect()

    first.collect = lose_in_time  # type: ignore[method-assign,assignment]
    moved = gather(prompt, params.n, pair.submit_sync(prompt, params))
    expected = calm(prompt, params)
    assert moved.samples == expected.samples
    assert moved.prompt_logprobs == expected.prompt_logprobs
    wait_until(lambda: is_idle(pair))
    ended_before = next(steps) <= num_steps
    assert (pair.executors[0].restarts == []) is ended_before
    assert (pair.stats().replicas["r1"].steps == 0) is ended_before


def running_at(engine: Replicas, number: int, params: SamplingParams = ENDLESS) -> list[SyncStream]:
    """Two requests with tokens, at this replica, of which the next step is held back."""
    for other in range(len(engine.executors)):
        engine.set_available(f"r{other}", other == number)
    engine.executors[number].pause_s = 0.02
    streams = []
    for _ in range(2):
        streams.append(engine.submit_sync([1], params))
        streams[-1].box.get()
    engine.executors[number].gate.clear()
    engine.executors[number].pause_s = 0.0
    for other in range(len(engine.executors)):
        engine.set_available(f"r{other}", True)
    return streams


def test_a_cancel_reaches_whoever_has_the_request_now(pair: Replicas) -> None:
    pair.executors[1].gate.clear()
    streams = running_at(pair, 0)
    lose(pair, 0)
    pair.executors[0].gate.set()
    wait_until(lambda: pair.loads() == {"r0": 0, "r1": 2})
    for stream in streams:
        stream.cancel()
        stream.cancel()
    assert is_idle(pair)
    assert pair._engines["r1"].stats().num_running == 0
    pair.executors[1].gate.set()


def test_an_embedding_moves_too(pair: Replicas) -> None:
    lose(pair, 0)
    assert pair.submit_embed_sync([1, 2]).embedding() == pytest.approx([0.6, 0.8])
    assert pair.executors[0].restarts


def test_a_late_result_of_the_old_engine_is_not_taken_for_the_new_ones(pair: Replicas) -> None:
    """Its step was under way when the request moved."""
    streams = running_at(pair, 0, SamplingParams(max_tokens=8))
    wait_until(lambda: len(pair.executors[0].plans) == 0)
    here, there = pair._engines["r0"], pair._engines["r1"]
    for place in pair._dispatch.at("r0"):
        pair._move(place, place.job, {"r0"})
    assert here.stats().num_used_blocks > 0, "what is being written stays held"
    pair.executors[0].gate.set()
    assert ["".join(d.text for d in stream) for stream in streams] == ["cdefghi"] * 2
    assert is_idle(pair)
    wait_until(lambda: here.stats().num_used_blocks == here.stats().num_cached_blocks)
    assert there.stats().generated_tokens > 0


def test_who_finds_no_room_elsewhere_waits_where_it_is() -> None:
    with replicas(2, max_waiting=1) as engine:
        streams = running_at(engine, 0)
        engine.executors[1].gate.clear()
        engine.set_available("r0", False)
        others = [engine.submit_sync([1], ENDLESS)]
        wait_until(lambda: engine._engines["r1"].stats().num_running == 1)
        others += [engine.submit_sync([1], ENDLESS)]
        lose(engine, 0)
        engine.executors[0].gate.set()
        wait_until(lambda: engine._engines["r0"].is_recovering)
        assert engine.loads() == {"r0": 2, "r1": 2}
        mend(engine, 0)
        engine.executors[1].gate.set()
        assert [len(list(stream)) for stream in streams] == [49, 49]
        assert [len(list(stream)) for stream in others] == [50, 50]


def test_nobody_moves_to_a_replica_that_has_stopped(pair: Replicas) -> None:
    (stream, other) = running_at(pair, 0)
    pair._engines["r1"].close()
    lose(pair, 0)
    pair.executors[0].gate.set()
    wait_until(lambda: pair._engines["r0"].is_recovering)
    mend(pair, 0)
    assert len(list(stream)) == len(list(other)) == 49


def test_without_any_workers_requests_wait_for_the_first_to_come(pair: Replicas) -> None:
    for number in (0, 1):
        pair.set_available(f"r{1 - number}", False)
        lose(pair, number)
        stream = pair.submit_sync([5], SamplingParams(max_tokens=9))
        wait_until(lambda n=number: pair._engines[f"r{n}"].is_recovering)
        pair.set_available(f"r{1 - number}", True)
    wait_until(lambda: pair._dispatch.troubled == ["r0", "r1"])
    late = pair.submit_sync([5], SamplingParams(max_tokens=9))
    health = pair.health()
    assert "0 of 2 replicas serve; r0: recovering for 0 s: a worker is lost" in health.reason
    assert health.ok, "as it is of a single engine: requests wait"
    mend(pair, 1)
    for each in (stream, late):
        assert "".join(delta.text for delta in each) == "fghi"
    assert pair._engines["r0"].is_recovering
    wait_until(lambda: is_idle(pair))


def test_a_replica_with_workers_again_gets_requests_again(pair: Replicas) -> None:
    lose(pair, 0)
    assert len(answer(pair, [5])) == 5
    wait_until(lambda: "r0" not in pair._dispatch.takers)
    assert pair.health().ok
    assert "r0: recovering for 0 s" in pair.health().reason
    assert not pair.health().replicas["r0"].ready
    before = pair.stats().replicas["r1"].generated_tokens
    answer(pair, [1], max_tokens=2)
    assert pair.stats().replicas["r1"].generated_tokens == before + 2
    mend(pair, 0)
    assert pair.health().reason in ("idle", "working")
    answer(pair, [1], max_tokens=2)
    assert pair.stats().replicas["r0"].generated_tokens > 0


def test_a_request_that_is_wherever_workers_are_lost_stays_in_the_end(pair: Replicas) -> None:
    for executor in pair.executors:
        executor.gate.clear()
    pair.submit_sync([1], ENDLESS)
    for turn in range(4):
        victim = turn % 2
        where = f"r{victim}"
        wait_until(lambda w=where: pair.loads()[w] == 1)
        lose(pair, victim)
        pair.executors[victim].gate.set()
        wait_until(lambda w=where: pair._engines[w].is_recovering)
        if turn < 3:
            wait_until(lambda w=where: pair.loads()[w] == 0)
        pair.executors[victim].gate.clear()
        threading.Event().wait(0.03)
        mend(pair, victim)
        pair.health()
    assert pair.loads() == {"r0": 0, "r1": 1}
    for executor in pair.executors:
        executor.gate.set()
    wait_until(lambda: is_idle(pair))


@contextmanager
def pushed_about(engine: Replicas) -> Iterator[None]:
    """Two threads move whatever there is, all the time."""
    stop = threading.Event()

    def push() -> None:
        while not stop.wait(0.002):
            for name in engine.loads():
                for place in engine._dispatch.at(name):
                    if place.job is not None and place.replica == name:
                        engine._move(place, place.job, {name})

    movers = [threading.Thread(target=push) for _ in range(2)]
    for mover in movers:
        mover.start()
    try:
        yield
    finally:
        stop.set()
        for mover in movers:
            mover.join()


def test_cancels_ends_and_moves_at_once_lose_and_repeat_nothing() -> None:
    dice = random.Random(4)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = calm([1], params).samples[0].token_ids
    with replicas(3) as engine:
        for executor in engine.executors:
            executor.pause_s = 0.0005
        with pushed_about(engine):
            for _ in range(6):
                streams = [engine.submit_sync([1], params) for _ in range(6)]
                for stream in streams:
                    if dice.random() < 0.3:
                        stream.cancel()
                    else:
                        assert gather([1], 1, stream).samples[0].token_ids == expected
        wait_until(lambda: is_idle(engine))
        assert engine._dispatch._places == {}
        assert sum(one.stats().prompt_tokens for one in engine._engines.values()) > 36
        for one in engine._engines.values():
            assert (one.stats().num_running, one.stats().num_waiting) == (0, 0)


# ---- the circuit ------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def clocked(clock: Clock) -> Iterator[Replicas]:
    executors = [Counting(), Counting()]
    engines = {f"r{i}": make_engine(each) for i, each in enumerate(executors)}
    both = Replicas(engines, Router("least-loaded", block_size=4), clock=clock)
    both.executors = executors
    yield both
    both.close()


def steps(engine: Replicas) -> list[int]:
    return [stats.steps for stats in engine.stats().replicas.values()]


def test_a_replica_that_fails_time_and_again_is_left_alone_and_tried_later(
    clocked: Replicas, clock: Clock
) -> None:
    broken = clocked.executors[0]
    num_failed = 0
    while num_failed < 3:
        clock.now_s += 1
        broken.fail_next = RuntimeError("a bad kernel")
        try:
            answer(clocked, [1], max_tokens=1)
        except InternalError:
            num_failed += 1
    broken.fail_next = None
    wait_until(lambda: not clocked._engines["r0"].is_recovering)
    before = steps(clocked)
    for _ in range(4):
        answer(clocked, [1], max_tokens=1)
    assert steps(clocked) == [before[0], before[1] + 4]
    assert "r0: gets no new requests" in clocked.health().reason
    clock.now_s += 1
    for _ in range(4):
        answer(clocked, [1], max_tokens=1)
    assert steps(clocked)[0] > before[0]
    assert clocked.health().reason in ("idle", "working")


def test_mistakes_of_callers_say_nothing_about_a_replica(clocked: Replicas, clock: Clock) -> None:
    for _ in range(20):
        clock.now_s += 1
        with pytest.raises(Exception, match="tokens"):
            answer(clocked, [1] * 64)
    assert clocked._dispatch.takers == ["r0", "r1"]


def test_a_full_queue_says_nothing_about_a_replica(clock: Clock) -> None:
    with replicas(2, max_waiting=1) as engine:
        for executor in engine.executors:
            executor.gate.clear()
        for _ in range(2):
            engine.submit_sync([1], ENDLESS)
        wait_until(lambda: engine.stats().num_running == 2)
        for _ in range(20):
            try:
                engine.submit_sync([1], ENDLESS)
            except QueueFull:
                clock.now_s += 1
        assert engine._dispatch.takers == ["r0", "r1"]


def test_a_stopped_replica_is_tried_ever_more_rarely_and_nobody_notices(
    clocked: Replicas, clock: Clock
) -> None:
    clocked._engines["r0"].close()
    asked: list[float] = []
    submit_sync = clocked._engines["r0"].submit_sync

    def noted(*args: object, **options: object) -> object:
        asked.append(clock.now_s)
        return submit_sync(*args, **options)  # type: ignore[arg-type]

    clocked._engines["r0"].submit_sync = noted  # type: ignore[method-assign,assignment]
    for _ in range(200):
        clock.now_s += 0.5
        assert len(answer(clocked, [1], max_tokens=1)) == 1
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps == [1, 2, 4, 8, 16, 30, 30]
    clocked._engines["r1"].close()
    with pytest.raises(EngineStopped):
        answer(clocked, [1])
