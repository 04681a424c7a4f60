"""The engine with a scripted executor: streams, stops, cancellation, failures, health."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest
from drawn import drawn

from shoal.engine.api import Delta, ModelInfo, WorkerStats
from shoal.engine.engine import Engine
from shoal.engine.executor import Capacity
from shoal.engine.outputs import gather
from shoal.engine.recovery import Recovery
from shoal.engine.serving import ServingEngine
from shoal.errors import (
    ContextTooLong,
    EngineStopped,
    InternalError,
    InvalidRequest,
    PeerLost,
    QueueFull,
    UnsupportedByModel,
)
from shoal.messages import Chunk, ChunkResult, Plan, StepResult, TokenLogprobs
from shoal.request import FinishReason, SamplingParams
from shoal.schedule.scheduler import Scheduler

END = 0
VOCAB = 50


class Letters:
    """Token 1 is "a", 2 is "b", …; token 0 ends the text."""

    eos_ids = frozenset({END})

    def stream(self, *, skip_special: bool) -> Letters:
        assert skip_special
        return self

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id - 1)

    def flush(self) -> str:
        return ""


class Counting:
    """Each token is the one before it plus one; waits while the gate is shut."""

    max_in_flight = 1

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next: Exception | None = None
        self.pause_s = 0.0
        self.restarts: list[int] = []
        self.wants_restart = False
        self.lacking = threading.Event()
        """Set: no workers can be had."""

    def watch(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)

    def collect(self) -> StepResult:
        plan = self.plans.pop(0)
        self.gate.wait()
        time.sleep(self.pause_s)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        return StepResult(
            epoch=plan.epoch, step=plan.step, results=[self.result(c) for c in plan.chunks]
        )

    def restart(self, epoch: int, recovery: Recovery) -> Capacity:
        self.plans.clear()
        self.restarts.append(epoch)
        self.wants_restart = False
        while self.lacking.is_set():
            recovery.meanwhile()
            time.sleep(0.005)
        return Capacity(num_blocks=64, max_in_flight=self.max_in_flight, epoch=epoch + 1)

    def workers(self) -> list[WorkerStats]:
        return []

    def close(self) -> None:
        pass

    def result(self, chunk: Chunk) -> ChunkResult:
        token_ids = drawn(chunk, lambda context: (context[-1] + 1) % 10)
        wanted = chunk.sampling is not None and chunk.sampling.num_logprobs is not None
        return ChunkResult(
            request_id=chunk.request_id,
            token_ids=token_ids,
            logprobs=[TokenLogprobs(-1.0, [], []) for _ in token_ids if wanted],
            prompt_logprobs=[TokenLogprobs(-2.0, [], []) for _ in chunk.score_targets],
            pooled=array("f", [3.0, 4.0]).tobytes() if chunk.pooling else b"",
        )


def make_engine(
    executor: Counting,
    *,
    max_waiting: int = 100,
    can_generate: bool = True,
    stall_s: float = 30.0,
    recovery_timeout_s: float = 60.0,
    max_drafted: int = 0,
) -> ServingEngine:
    scheduler = Scheduler(
        num_blocks=64,
        block_size=4,
        max_context=64,
        max_step_tokens=32,
        max_running=8,
        max_waiting=max_waiting,
        max_drafted=max_drafted,
    )
    info = ModelInfo(
        name="counting",
        max_context=64,
        vocab_size=VOCAB,
        can_generate=can_generate,
        created_s=0,
        description="",
    )
    engine = Engine(
        scheduler,
        executor,
        Letters(),  # type: ignore[arg-type]
        info,
        stall_s=stall_s,
        recovery_timeout_s=recovery_timeout_s,
    )
    return ServingEngine(engine)


@pytest.fixture
def executor() -> Counting:
    return Counting()


@pytest.fixture
def engine(executor: Counting) -> Iterator[ServingEngine]:
    engine = make_engine(executor)
    yield engine
    executor.gate.set()
    engine.close()


def answer(engine: ServingEngine, prompt: list[int], **options: object) -> list[Delta]:
    params = SamplingParams(**{"max_tokens": None, **options})  # type: ignore[arg-type]
    return list(engine.submit_sync(prompt, params))


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("the condition did not come true in 10 s")


def test_an_answer_ends_at_the_end_token_which_shows_no_text(engine: ServingEngine) -> None:
    deltas = answer(engine, [5])
    assert "".join(delta.text for delta in deltas) == "fghi"
    assert [delta.token_ids for delta in deltas] == [[6], [7], [8], [9], [END]]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_match is None
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_max_tokens_min_tokens_and_ignore_eos(engine: ServingEngine) -> None:
    short = answer(engine, [1], max_tokens=3)
    assert short[-1].finish_reason is FinishReason.LENGTH
    assert len(short) == 3
    assert len(answer(engine, [5], max_tokens=12, ignore_eos=True)) == 12
    assert len(answer(engine, [60 % VOCAB], max_tokens=None, ignore_eos=True)) == 63


def test_stop_strings_and_stop_tokens_say_what_matched(engine: ServingEngine) -> None:
    output = gather([1], 1, answer(engine, [1], stop=("ef",))).samples[0]
    assert (output.text, output.stop_match) == ("bcd", "ef")
    assert output.finish_reason is FinishReason.STOP
    output = gather([1], 1, answer(engine, [1], stop_token_ids=(4,))).samples[0]
    assert (output.text, output.stop_match) == ("bc", 4)
    assert engine.stats().num_running == 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 33, "logprobs": 0},
        {"max_tokens": 60, "min_tokens": 21, "stop": ("ihgf", "gh")},
        {"max_tokens": 60, "min_tokens": 25, "stop": ("efg",)},
        {"max_tokens": 60, "stop_token_ids": (4,), "min_tokens": 22},
    ],
)
def test_several_tokens_of_a_step_are_told_as_if_they_had_come_one_at_a_time(
    executor: Counting, options: dict[str, object]
) -> None:
    told = []
    for max_drafted in (0, 6):
        engine = make_engine(executor, max_drafted=max_drafted)
        told.append(answer(engine, [1], n=2, ignore_eos=True, **options))
        stats = engine.stats()
        engine.close()
    for index in range(2):
        one, other = ([d for d in deltas if d.index == index] for deltas in told)
        assert one == other
    assert stats.accepted_tokens > 10
    assert stats.steps <= stats.generated_tokens - stats.accepted_tokens
    assert (stats.num_running, stats.num_used_blocks) == (0, 0)


def test_samples_share_the_prompt_and_are_numbered(engine: ServingEngine) -> None:
    output = gather([1] * 9, 3, answer(engine, [1] * 9, n=3, max_tokens=2, logprobs=0))
    assert [sample.text for sample in output.samples] == ["bc"] * 3
    assert [len(sample.logprobs or []) for sample in output.samples] == [2] * 3
    assert engine.stats().prefix_hit_tokens == 2 * 8


def test_prompt_logprobs_come_once_per_position_after_the_first(engine: ServingEngine) -> None:
    output = gather([1] * 40, 1, answer(engine, [1] * 40, max_tokens=2, prompt_logprobs=0))
    assert len(output.prompt_logprobs or []) == 39


def test_embeddings_have_length_one(executor: Counting) -> None:
    engine = make_engine(executor, can_generate=False)
    assert engine.submit_embed_sync([1, 2]).embedding() == pytest.approx([0.6, 0.8])
    with pytest.raises(UnsupportedByModel, match="embeddings"):
        answer(engine, [1])
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, InvalidRequest, "empty"),
        ([VOCAB], {}, InvalidRequest, "token 50"),
        ([-1], {}, InvalidRequest, "token -1"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, InvalidRequest, "logit_bias"),
        ([1], {"stop_token_ids": (99,)}, InvalidRequest, "stop_token_ids"),
        ([1] * 64, {}, ContextTooLong, "64"),
        ([1] * 60, {"max_tokens": 5}, ContextTooLong, "65"),
        ([1] * 60, {"max_tokens": None, "min_tokens": 5}, ContextTooLong, "min_tokens=5"),
    ],
)
def test_wrong_requests_are_refused_with_the_numbers(
    engine: ServingEngine,
    prompt: list[int],
    options: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        answer(engine, prompt, **options)
    assert len(answer(engine, [1], max_tokens=1)) == 1


def test_a_full_queue_refuses_and_says_when_to_try_again(executor: Counting) -> None:
    engine = make_engine(executor, max_waiting=2)
    executor.gate.clear()
    first = engine.submit_sync([1], SamplingParams(max_tokens=2))
    wait_until(lambda: engine.stats().num_running == 1)
    waiting = [engine.submit_sync([1], SamplingParams(max_tokens=2)) for _ in range(2)]
    with pytest.raises(QueueFull) as caught:
        engine.submit_sync([1], SamplingParams(max_tokens=2))
    assert caught.value.retry_after_s >= 1
    executor.gate.set()
    assert [len(list(stream)) for stream in (first, *waiting)] == [2, 2, 2]
    engine.close()


def test_leaving_a_stream_cancels_its_request(engine: ServingEngine, executor: Counting) -> None:
    executor.pause_s = 0.005

    async def leave_early() -> None:
        async for delta in engine.submit([1], SamplingParams(max_tokens=60, ignore_eos=True)):
            if delta.token_ids == [3]:
                break

    asyncio.run(leave_early())
    wait_until(lambda: engine.stats().num_used_blocks == 0)
    assert engine.stats().generated_tokens < 60


def test_many_async_streams_are_not_mixed_up(engine: ServingEngine) -> None:
    async def one(start: int) -> str:
        stream = engine.submit([start], SamplingParams(max_tokens=30))
        return "".join([delta.text async for delta in stream])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(1 + i % 8) for i in range(60)))

    expected = ["bcdefghi"[i % 8 :] for i in range(60)]
    assert asyncio.run(all_of_them()) == expected


def test_a_failed_step_ends_its_requests_and_the_next_go_on(
    engine: ServingEngine, executor: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    executor.fail_next = RuntimeError("a bad kernel")
    with pytest.raises(InternalError, match="a bad kernel"):
        answer(engine, [1])
    assert "a bad kernel" in caplog.text
    assert "".join(delta.text for delta in answer(engine, [5])) == "fghi"
    assert engine.health().ok


def test_after_a_loss_requests_go_on_in_the_epoch_that_has_begun(
    engine: ServingEngine, executor: Counting
) -> None:
    executor.fail_next = PeerLost("a worker is lost")
    assert "".join(delta.text for delta in answer(engine, [5])) == "fghi"
    assert executor.restarts == [1]
    assert engine.stats().epoch == 2
    [incident] = engine.stats().incidents
    assert (incident.outcome, incident.cause) == ("recovered", "a worker is lost")
    assert incident.num_requests == 1
    assert incident.phases["total"] >= incident.phases["recompute"] > 0


def test_a_loss_while_idle_is_made_good_at_once(engine: ServingEngine, executor: Counting) -> None:
    executor.wants_restart = True
    executor.wake()
    wait_until(lambda: engine.stats().epoch == 2)
    assert [each.outcome for each in engine.stats().incidents] == ["recovered"]


def test_requests_wait_for_workers_for_a_while_and_work_resumes_later(executor: Counting) -> None:
    engine = make_engine(executor, recovery_timeout_s=0.1)
    executor.lacking.set()
    executor.fail_next = PeerLost("a worker is lost")
    with pytest.raises(EngineStopped, match=r"no workers since .*a worker is lost") as caught:
        answer(engine, [5])
    assert caught.value.code == "no_workers"
    with pytest.raises(EngineStopped, match="still looked for"):
        answer(engine, [5])
    assert not engine.health().ok
    executor.lacking.clear()
    wait_until(lambda: engine.health().ok)
    assert "".join(delta.text for delta in answer(engine, [5])) == "fghi"
    assert [each.outcome for each in engine.stats().incidents] == ["given up"]
    engine.close()


def test_a_recovery_is_over_when_nobody_is_left_who_waits(executor: Counting) -> None:
    """Else the next loss, however much later, would count as one that lasts since then."""
    engine = make_engine(executor, recovery_timeout_s=0.2)
    executor.fail_next = PeerLost("a worker is lost")
    stream = engine.submit_sync([1] * 50, SamplingParams(max_tokens=None))
    executor.pause_s = 0.1
    wait_until(lambda: engine.stats().epoch == 2)
    stream.cancel()  # in the middle of its prompt
    executor.pause_s = 0.0
    wait_until(lambda: [i.outcome for i in engine.stats().incidents] == ["recovered"])
    time.sleep(0.25)
    executor.lacking.set()
    executor.fail_next = PeerLost("another is lost")
    late = engine.submit_sync([5], SamplingParams(max_tokens=None))
    wait_until(lambda: len(executor.restarts) == 2)
    executor.lacking.clear()
    assert "".join(delta.text for delta in late) == "fghi"
    engine.close()


def test_an_embedding_ends_a_recovery(executor: Counting) -> None:
    engine = make_engine(executor)
    executor.fail_next = PeerLost("a worker is lost")
    engine.submit_embed_sync([1, 2]).embedding()
    assert [each.outcome for each in engine.stats().incidents] == ["recovered"]
    engine.close()


def test_a_long_prompt_between_two_losses_is_no_lack_of_workers(executor: Counting) -> None:
    engine = make_engine(executor, recovery_timeout_s=0.2)
    losses = {1: PeerLost("one is lost"), 3: PeerLost("another is lost")}
    collect, num_steps = executor.collect, 0

    def slow() -> StepResult:
        nonlocal num_steps
        num_steps += 1
        executor.fail_next = losses.get(num_steps)
        return collect()

    executor.collect = slow  # type: ignore[method-assign]
    executor.pause_s = 0.15
    restart = executor.restart

    def brief(epoch: int, recovery: Recovery) -> Capacity:
        recovery.meanwhile()
        return restart(epoch, recovery)

    executor.restart = brief  # type: ignore[method-assign]
    prompt = [1] * 60 + [8]
    params = SamplingParams(max_tokens=1)
    assert len(list(engine.submit_sync(prompt, params))) == 1
    [incident] = engine.stats().incidents
    assert incident.outcome == "recovered" and incident.phases["total"] > 0.4
    engine.close()


def test_an_engine_that_lacks_workers_can_be_closed(executor: Counting) -> None:
    engine = make_engine(executor)
    executor.lacking.set()
    executor.fail_next = PeerLost("a worker is lost")
    stream = engine.submit_sync([1], SamplingParams(max_tokens=50))
    wait_until(lambda: bool(executor.restarts))
    engine.close()
    with pytest.raises(EngineStopped):
        list(stream)


def test_a_request_whose_step_always_kills_its_workers_ends_with_an_error() -> None:
    """Else it would keep all others waiting, and its workers loading, for ever."""

    class Mortal(Counting):
        def collect(self) -> StepResult:
            if any(49 in chunk.tokens for chunk in self.plans[0].chunks):
                raise PeerLost("a worker is lost")
            return super().collect()

    executor = Mortal()
    engine = make_engine(executor)
    others = [engine.submit_sync([5], SamplingParams(max_tokens=None)) for _ in range(3)]
    with pytest.raises(InternalError, match="a worker is lost"):
        answer(engine, [7, 49])
    for other in others:
        assert "".join(delta.text for delta in other) == "fghi"
    assert "".join(delta.text for delta in answer(engine, [5])) == "fghi"
    engine.close()


def test_an_engine_that_is_closed_does_not_recover(executor: Counting) -> None:
    """Bringing workers back may take as long as loading a model."""
    engine = make_engine(executor)
    executor.gate.clear()
    stream = engine.submit_sync([1], SamplingParams(max_tokens=50))
    wait_until(lambda: engine.stats().num_running == 1)
    executor.fail_next = PeerLost("a worker is lost")
    closer = threading.Thread(target=engine.close)
    closer.start()
    wait_until(lambda: not engine.health().ok)
    executor.gate.set()
    closer.join()
    with pytest.raises(EngineStopped):
        list(stream)
    assert executor.restarts == []


def test_workers_that_do_not_take_a_plan_keep_no_client_waiting() -> None:
    class Busy(Counting):
        def submit(self, plan: Plan) -> None:
            super().submit(plan)
            self.gate.wait()

    executor = Busy()
    executor.gate.clear()
    engine = make_engine(executor)
    streams = [engine.submit_sync([1], SamplingParams(max_tokens=2))]
    wait_until(lambda: len(executor.plans) == 1)
    counted: list[int] = []
    asker = threading.Thread(target=lambda: counted.append(engine.stats().num_running))
    asker.start()
    asker.join(5)
    executor.gate.set()
    assert counted == [1]
    assert len(list(streams[0])) == 2
    engine.close()


def test_health_fails_when_work_waits_and_nothing_moves(executor: Counting) -> None:
    engine = make_engine(executor, stall_s=0.05)
    assert engine.health().ok
    executor.gate.clear()
    stream = engine.submit_sync([1], SamplingParams(max_tokens=2))
    wait_until(lambda: not engine.health().ok)
    assert "no step has finished" in engine.health().reason
    executor.gate.set()
    assert len(list(stream)) == 2
    assert engine.health().ok
    engine.close()


def test_closing_ends_open_streams_with_a_retryable_error(executor: Counting) -> None:
    engine = make_engine(executor)
    executor.gate.clear()
    stream = engine.submit_sync([1], SamplingParams(max_tokens=50))
    wait_until(lambda: engine.stats().num_running == 1)
    closer = threading.Thread(target=engine.close)
    closer.start()
    wait_until(lambda: not engine.health().ok)
    executor.gate.set()
    closer.join()
    with pytest.raises(EngineStopped):
        list(stream)
    with pytest.raises(EngineStopped):
        engine.submit_sync([1], SamplingParams(max_tokens=2))


def test_a_loop_that_closed_in_the_middle_harms_nobody_else(
    engine: ServingEngine, executor: Counting
) -> None:
    executor.gate.clear()
    loop = asyncio.new_event_loop()

    async def submit() -> None:
        engine.submit([1], SamplingParams(max_tokens=5))

    loop.run_until_complete(submit())
    loop.close()
    other = engine.submit_sync([5], SamplingParams(max_tokens=9))
    executor.gate.set()
    assert "".join(delta.text for delta in other) == "fghi"
    assert engine.health().ok


def test_cached_tokens_are_told_once_and_only_with_the_first_sample(engine: ServingEngine) -> None:
    prompt = [1] * 9
    answer(engine, prompt, max_tokens=1)
    deltas = answer(engine, prompt, n=2, max_tokens=3)
    assert sum(delta.num_cached_tokens for delta in deltas) == 8
    assert gather(prompt, 2, deltas).num_cached_tokens == 8


def test_a_token_that_cannot_become_text_ends_only_its_own_request(
    executor: Counting, engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(_: Letters, token_id: int) -> str:
        if token_id == 7:
            raise ValueError("no such letter")
        return "x"

    monkeypatch.setattr(Letters, "push", push)
    executor.gate.clear()
    # Its only token is its last: the scheduler has ended it before its text is made.
    broken = engine.submit_sync([6], SamplingParams(max_tokens=1))
    sound = engine.submit_sync([1], SamplingParams(max_tokens=3))
    executor.gate.set()
    assert isinstance(broken.box.get(timeout=5), InternalError)
    assert [delta.text for delta in sound] == ["x"] * 3
    assert engine.health().reason == "idle"


def test_min_tokens_needs_a_token_that_does_not_stop(engine: ServingEngine) -> None:
    with pytest.raises(InvalidRequest, match="min_tokens") as caught:
        answer(engine, [1], max_tokens=4, min_tokens=1, stop_token_ids=tuple(range(VOCAB)))
    assert caught.value.param == "min_tokens"


def test_a_decoder_embeds_a_prompt_that_fills_its_context(engine: ServingEngine) -> None:
    assert engine.submit_embed_sync([1] * 64).embedding() == pytest.approx([0.6, 0.8])
    with pytest.raises(ContextTooLong, match="65 tokens"):
        engine.submit_embed_sync([1] * 65)
