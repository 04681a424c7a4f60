"""Several engines as one: whatever ends a request, the router hears of it; refusals move on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from fastapi.testclient import TestClient
from test_engine import Counting, answer, make_engine, wait_until

from shoal.cluster.router import Router
from shoal.config import Route
from shoal.engine.replicas import ReplicatedEngine
from shoal.errors import ContextTooLong, EngineStopped, InternalError, QueueFull
from shoal.request import SamplingParams
from shoal.server.app import create_app

ENDLESS = SamplingParams(max_tokens=50, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2)


class Replicas(ReplicatedEngine):
    """With its executors at hand, so that tests can hold and break them."""

    executors: list[Counting]


@contextmanager
def replicas(
    number: int = 2, *, route: Route = "least-loaded", max_waiting: int = 100
) -> Iterator[Replicas]:
    executors = [Counting() for _ in range(number)]
    engines = {
        f"r{i}": make_engine(executor, max_waiting=max_waiting)
        for i, executor in enumerate(executors)
    }
    both = Replicas(engines, Router(route, block_size=4, neighbour_tokens=8))
    both.executors = executors
    try:
        yield both
    finally:
        for executor in executors:
            executor.gate.set()
        both.close()


def is_idle(engine: ReplicatedEngine) -> bool:
    return set(engine.loads().values()) == {0}


def hold(engine: Replicas) -> None:
    for executor in engine.executors:
        executor.gate.clear()


def release(engine: Replicas) -> None:
    for executor in engine.executors:
        executor.gate.set()


# ---- the router hears of every end ----------------------------------------------------------


def test_samples_are_counted_until_the_last_has_ended_read_or_not() -> None:
    with replicas() as engine:
        hold(engine)
        streams = [
            engine.submit_sync([1], SamplingParams(max_tokens=2, n=3)),
            engine.submit_sync([1], SHORT),
            engine.submit_embed_sync([1, 2]),
        ]
        assert engine.loads() == {"r0": 3, "r1": 2}
        release(engine)
        wait_until(lambda: is_idle(engine))
        assert len(list(streams[0])) == 6
        assert len(list(streams[1])) == 2
        assert streams[2].embedding() == pytest.approx([0.6, 0.8])
        assert is_idle(engine)


def test_cancelling_and_leaving_a_stream_count_as_ends_once() -> None:
    async def leave(engine: Replicas) -> None:
        async for _ in engine.submit([1], ENDLESS):
            break

    async def abandon_embedding(engine: Replicas) -> None:
        task = asyncio.ensure_future(engine.embed([1, 2]))
        await asyncio.sleep(0)
        assert not is_idle(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with replicas() as engine:
        hold(engine)
        stream = engine.submit_sync([1], ENDLESS)
        stream.cancel()
        stream.cancel()
        assert list(stream) == []
        assert is_idle(engine)
        asyncio.run(abandon_embedding(engine))
        assert is_idle(engine)
        release(engine)
        asyncio.run(leave(engine))
        wait_until(lambda: is_idle(engine))


def test_a_failed_step_counts_as_the_end_of_its_requests() -> None:
    with replicas() as engine:
        engine.executors[0].fail_next = RuntimeError("a bad kernel")
        streams = [engine.submit_sync([5], SamplingParams(max_tokens=9)) for _ in range(2)]
        with pytest.raises(InternalError, match="a bad kernel"):
            list(streams[0])
        assert "".join(delta.text for delta in streams[1]) == "fghi"
        assert is_idle(engine)


def test_refused_requests_are_not_counted() -> None:
    with replicas() as engine:
        with pytest.raises(ContextTooLong):
            engine.submit_sync([1] * 64, SHORT)
        assert is_idle(engine)


def test_threads_and_loops_at_once_leave_nothing_counted() -> None:
    def some(engine: Replicas, number: int) -> None:
        for turn in range(10):
            stream = engine.submit_sync(
                [1 + turn % 8] * 5, SamplingParams(max_tokens=5, n=1 + turn % 2)
            )
            if (number + turn) % 3 == 0:
                stream.cancel()
            else:
                list(stream)

    async def others(engine: Replicas) -> None:
        async def one(turn: int) -> None:
            async for _ in engine.submit([1 + turn % 8] * 5, SamplingParams(max_tokens=4)):
                if turn % 3 == 0:
                    break

        await asyncio.gather(*(one(turn) for turn in range(30)))

    with replicas(3, route="prefix") as engine:
        threads = [threading.Thread(target=some, args=(engine, i)) for i in range(4)]
        threads.append(threading.Thread(target=lambda: asyncio.run(others(engine))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: is_idle(engine))


# ---- refusals ---------------------------------------------------------------------------------


def filled(engine: Replicas, number: int) -> None:
    """So many more requests than the gates let through."""
    for _ in range(number):
        engine.submit_sync([1], ENDLESS)


@pytest.mark.parametrize("route", ["random", "round-robin", "prefix"])
def test_a_full_replica_is_passed_over_before_the_client_hears_of_it(route: Route) -> None:
    with replicas(3, route=route, max_waiting=2) as engine:
        hold(engine)
        engine.set_available("r1", False)
        engine.set_available("r2", False)
        engine.submit_sync([1] * 8, ENDLESS)
        wait_until(lambda: engine.stats().num_running == 1)
        filled(engine, 2)
        engine.set_available("r1", True)
        engine.set_available("r2", True)
        for _ in range(4):
            engine.submit_sync([1] * 8, ENDLESS)
        assert sum(engine.loads().values()) == 7
        assert engine.loads()["r0"] == 3


def test_when_all_are_full_the_client_is_told_to_come_again() -> None:
    with replicas(2, max_waiting=1) as engine:
        hold(engine)
        filled(engine, 2)
        wait_until(lambda: engine.stats().num_running == 2)
        filled(engine, 2)
        before = engine.loads()
        with pytest.raises(QueueFull) as caught:
            engine.submit_sync([1], ENDLESS)
        assert caught.value.status == 429
        assert engine.loads() == before == {"r0": 2, "r1": 2}


def test_a_replica_that_has_stopped_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with replicas(3) as engine:
        engine._engines["r1"].close()
        assert [len(answer(engine, [1], max_tokens=2)) for _ in range(6)] == [2] * 6
        assert "r1 gets no new requests" in caplog.text
        health = engine.health()
        assert health.ok
        assert "2 of 3" in health.reason
        assert "r1: the engine is shutting down" in health.reason
        assert "r0" not in health.reason
        engine._engines["r0"].close()
        engine._engines["r2"].close()
        with pytest.raises(EngineStopped):
            answer(engine, [1])
        assert not engine.health().ok
        assert is_idle(engine)


def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    with replicas() as engine:
        hold(engine)
        streams = [engine.submit_sync([5], SamplingParams(max_tokens=9)) for _ in range(2)]
        engine.set_available("r0", False)
        streams += [engine.submit_sync([5], SamplingParams(max_tokens=9)) for _ in range(2)]
        assert engine.loads() == {"r0": 1, "r1": 3}
        assert engine.health().ok
        assert "r0: gets no new requests" in engine.health().reason
        release(engine)
        assert ["".join(d.text for d in stream) for stream in streams] == ["fghi"] * 4
        assert is_idle(engine)


# ---- one engine from above --------------------------------------------------------------------


def test_prompts_go_where_their_prefix_is_cached() -> None:
    with replicas(3, route="prefix") as engine:
        for length in (12, 24, 36, 48):
            for word in (1, 2, 3):
                answer(engine, [word] * length, max_tokens=1)
        stats = engine.stats()
        assert stats.prefix_hit_tokens == 3 * (12 + 24 + 36)
        assert [one.prefix_hit_tokens for one in stats.replicas.values()] == [72, 72, 72]


def test_stats_are_summed_and_metrics_tell_replicas_apart() -> None:
    with replicas() as engine:
        for _ in range(3):
            answer(engine, [1], max_tokens=2)
        stats = engine.stats()
        assert stats.generated_tokens == 6
        assert [one.generated_tokens for one in stats.replicas.values()] == [4, 2]
        assert stats.num_blocks == 128
        text = TestClient(create_app(engine)).get("/metrics").text
        for line in (
            "shoal_generated_tokens_total 6.0",
            'shoal_replica_generated_tokens_total{replica="r0"} 4.0',
            'shoal_replica_generated_tokens_total{replica="r1"} 2.0',
            'shoal_replica_num_blocks{replica="r1"} 64.0',
        ):
            assert line in text.splitlines()


def test_one_replica_is_shown_as_it_always_was() -> None:
    engine = make_engine(Counting())
    assert "shoal_replica_" not in TestClient(create_app(engine)).get("/metrics").text
    engine.close()


def test_the_context_announced_is_the_smallest() -> None:
    with replicas() as engine:
        assert engine.info.max_context == 64
        assert engine.tokenizer.eos_ids == {0}
        assert engine.health().reason == "idle"


def test_closing_closes_all_even_if_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicas(3) as engine:
        streams = [engine.submit_sync([1], ENDLESS) for _ in range(3)]
        close = engine._engines["r1"].close

        def close_and_raise() -> None:
            close()
            raise RuntimeError("no")

        monkeypatch.setattr(engine._engines["r1"], "close", close_and_raise)
        with pytest.raises(RuntimeError, match="no"):
            engine.close()
        assert not any(one._thread.is_alive() for one in engine._engines.values())
        for stream in streams:
            with suppress(EngineStopped):  # unless it had ended before
                list(stream)
        assert is_idle(engine)
        monkeypatch.undo()
