"""Whatever happens in whatever order, each request's tokens are those of the calm run.

Hypothesis drives the scheduler through arrivals, steps, cancellations, preemptions and failures,
with up to three plans outstanding, on a replica so small that memory is always short.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs
from replica_model import (
    EMPTY_PREFIX,
    VOCAB_SIZE,
    ReplicaModel,
    calm_prompt_logprobs,
    calm_run,
    extend_hash,
    guess_well,
    pool,
)

from shoal.errors import CallerError, QueueFull
from shoal.messages import Chunk, Event, Plan, StepResult
from shoal.request import FinishReason, Request, SamplingParams
from shoal.schedule.scheduler import Scheduler

BLOCK_SIZE = 4
MAX_STEPS_TO_DRAIN = 5_000
# Prompts are cut from a few texts, so that many share a prefix.
TEXTS = ([1] * 40, [1] * 9 + [2] * 31, [0, 1, 2, 3, 4, 5, 6] * 6)


@dataclass
class Client:
    """What one client asked for and has been told so far."""

    request: Request
    emitted: list[int] = field(default_factory=list)
    last: Event | None = None
    num_prompt_reports: int = 0
    left: bool = False

    @property
    def known_tokens(self) -> list[int]:
        return self.request.prompt_tokens + self.emitted

    @property
    def is_over(self) -> bool:
        return self.left or self.last is not None

    def hear(self, event: Event) -> None:
        assert not self.is_over, f"request {event.request_id} has ended but got {event}"
        if event.token_id is not None:
            self.emitted.append(event.token_id)
        if event.prompt_logprobs is not None or event.pooled is not None:
            self.num_prompt_reports += 1
        if event.prompt_logprobs is not None:
            assert event.prompt_logprobs == calm_prompt_logprobs(self.request)
        if event.finish_reason is not None:
            self.last = event

    def check_so_far(self) -> None:
        expected, _ = ([], None) if self.request.pooling else calm_run(self.request)
        assert self.emitted == expected[: len(self.emitted)], "not the tokens of the calm run"

    def check_end(self) -> None:
        """A request that nobody cut short has all of what it asked for, once."""
        assert self.last is not None, f"request {self.request.request_id} never ended"
        if self.request.pooling:
            assert self.last.pooled == pool(self.request.prompt_tokens)
            assert self.last.finish_reason is FinishReason.STOP
            assert self.num_prompt_reports == 1
            return
        assert (self.emitted, self.last.finish_reason) == calm_run(self.request)
        wants_scores = self.request.params.prompt_logprobs is not None
        # Those who were elsewhere before heard it there.
        expected = wants_scores and not self.request.emitted_tokens
        assert self.num_prompt_reports == int(expected)


@dataclass
class Submission:
    """One prompt and how many samples of it."""

    num_samples: int
    options: dict[str, Any]
    num_emitted: int = 0
    """Of each sample, in an earlier life; fewer where that would be its end."""


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    tokens = draw(st.sampled_from(TEXTS))[: draw(st.integers(1, 24))]
    return tokens + draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2))


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        min_tokens=draw(st.integers(0, 3)),
        max_tokens=None,
        repetition_penalty=draw(st.sampled_from([1.0, 1.1])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )


@st.composite
def submissions(draw: st.DrawFn) -> Submission:
    kind = draw(st.sampled_from(["generate", "generate", "generate", "generate", "pool", "encode"]))
    options = {
        "prompt_tokens": draw(prompts()),
        "params": draw(sampling_params()),
        "max_tokens": draw(st.integers(0, 12)),
        "stop_ids": draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=2)),
        "priority": draw(st.integers(0, 2)),
        "pooling": kind != "generate",
        "splittable": kind != "encode",
    }
    num_emitted = draw(st.sampled_from([0, 0, 1, 3, 7])) if kind == "generate" else 0
    return Submission(draw(st.sampled_from([1, 1, 2, 4])), options, num_emitted)


def in_a_later_life(request: Request, num_emitted: int) -> Request:
    if not num_emitted:
        return request
    calm, _ = calm_run(request)
    return structs.replace(request, emitted_tokens=calm[:-1][:num_emitted])


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[int, Client] = {}
        self.outstanding: deque[Plan] = deque()
        self.stale: list[StepResult] = []
        self.ids = count()
        self.groups = count()
        self.epoch = 0

    @initialize(
        num_blocks=st.integers(6, 16),
        max_step_tokens=st.one_of(st.just(16), st.integers(1, 16)),
        max_running=st.integers(1, 6),
        max_in_flight=st.integers(1, 3),
        max_drafted=st.sampled_from([8, 2, 0]),
        prefix_caching=st.sampled_from([True, True, False]),
        first=st.lists(submissions(), min_size=2, max_size=6),
    )
    def start(self, first: list[Submission], **options: Any) -> None:
        self.replica = ReplicaModel(BLOCK_SIZE)
        self.scheduler = Scheduler(block_size=BLOCK_SIZE, max_context=36, max_waiting=16, **options)
        for submission in first:
            self.add(submission)

    # ---- what may happen ------------------------------------------------------------------

    @rule(submission=submissions())
    def add_later(self, submission: Submission) -> None:
        self.add(submission)

    def add(self, submission: Submission) -> None:
        group = next(self.groups) if submission.num_samples > 1 else None
        new = [
            Request(request_id=request_id, seed=request_id, group=group, **submission.options)
            for request_id in (next(self.ids) for _ in range(submission.num_samples))
        ]
        requests = [in_a_later_life(request, submission.num_emitted) for request in new]
        num_waiting = self.scheduler.num_waiting
        try:
            self.scheduler.add_all(requests)
        except (QueueFull, CallerError):
            assert self.scheduler.num_waiting == num_waiting, "refused, but not as a whole"
            return
        guess_well(self.scheduler, requests)
        self.clients |= {
            request.request_id: Client(request, emitted=list(request.emitted_tokens))
            for request in requests
        }

    @rule()
    def send_plan(self) -> None:
        self._send_plan()

    @precondition(lambda self: self.outstanding)
    @rule()
    def receive_result(self) -> None:
        self._receive_result()

    @rule(num_steps=st.integers(1, 8))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._send_plan()
            if self.outstanding:
                self._receive_result()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        client = self._choose(data)
        event = self.scheduler.cancel(client.request.request_id)
        assert (event is None) == client.is_over
        if event is not None:
            assert event.finish_reason is FinishReason.CANCELLED
            client.left = True
        assert self.scheduler.cancel(client.request.request_id) is None

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        client = self._choose(data)
        self.scheduler.finish(client.request.request_id)
        client.left = True

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.clients)), min_size=1, max_size=6))
        self.scheduler.preempt(chosen, "drain")

    @rule(cache_lost=st.booleans(), num_run=st.integers(0, 3))
    def fail(self, cache_lost: bool, num_run: int) -> None:
        """Some of the outstanding plans still ran on some workers; no result of any counts."""
        self.stale += [self.replica.run(plan) for plan in list(self.outstanding)[:num_run]]
        self.outstanding.clear()
        self.epoch += 1
        self.scheduler.new_epoch(self.epoch, cache_lost=cache_lost)
        if cache_lost:
            self.replica.lose_cache()

    @rule(
        num_blocks=st.integers(3, 16),
        max_in_flight=st.integers(1, 3),
        num_failed_attempts=st.integers(0, 2),
    )
    def move(self, num_blocks: int, max_in_flight: int, num_failed_attempts: int) -> None:
        """To workers with less or more room; whom they cannot hold is told, and leaves."""
        self.fail(cache_lost=True, num_run=0)
        self.epoch += num_failed_attempts
        too_long = self.scheduler.resize(
            num_blocks=num_blocks, max_in_flight=max_in_flight, epoch=self.epoch
        )
        for request_id in too_long:
            assert self.scheduler.cancel(request_id) is not None
            self.clients[request_id].left = True

    @precondition(lambda self: self.stale)
    @rule()
    def receive_stale_result(self) -> None:
        assert self.scheduler.complete(self.stale.pop()) == []

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(MAX_STEPS_TO_DRAIN):
            if not self.scheduler.has_work:
                break
            self._send_plan()
            assert self.outstanding, "there is work, but nothing is planned"
            self._receive_result()
            self.scheduler.check()
        assert not self.scheduler.has_work, "no end in sight"
        for client in self.clients.values():
            client.check_so_far()
            if not client.left:
                client.check_end()
        counts = self.scheduler.counts()
        assert (counts.num_waiting, counts.num_running, counts.num_used_blocks) == (0, 0, 0)

    # ---- steps ----------------------------------------------------------------------------

    def _send_plan(self) -> None:
        plan = self.scheduler.plan(0.0)
        if plan is None:
            return
        assert 0 < plan.num_tokens <= self.scheduler.limits.max_step_tokens
        assert plan.epoch == self.epoch
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids), "twice in one plan"
        for chunk in plan.chunks:
            self._check_chunk(chunk)
            self._check_follows(chunk)
        self._check_writes(plan)
        self.outstanding.append(plan)

    def _check_chunk(self, chunk: Chunk) -> None:
        client = self.clients[chunk.request_id]
        tokens, request = client.known_tokens, client.request
        end = chunk.start + len(chunk.tokens) - chunk.num_drafted
        assert not client.is_over
        assert not chunk.is_cached or (len(chunk.tokens) == 1 and chunk.sampling is not None)
        assert chunk.tokens[: end - chunk.start] == tokens[chunk.start : end]
        self._check_draft(chunk)
        if not request.splittable:
            assert (chunk.start, end) == (0, len(tokens))
        wants_token = end == len(tokens) and not request.pooling and request.max_tokens > 0
        assert (chunk.sampling is not None) == wants_token
        if chunk.sampling is not None and request.params.needs_history:
            assert chunk.sampling.prompt_history == request.prompt_tokens
            assert chunk.sampling.output_history == client.emitted

    def _check_draft(self, chunk: Chunk) -> None:
        """Only of what can still be drawn, and none for those who asked for none."""
        assert chunk.num_drafted <= self.scheduler.limits.max_drafted
        if not chunk.num_drafted:
            return
        client = self.clients[chunk.request_id]
        assert chunk.sampling is not None and len(chunk.tokens) == chunk.num_drafted + 1
        assert len(client.emitted) + chunk.num_drafted < client.request.max_tokens
        if chunk.sampling.banned_ids:
            last = len(client.emitted) + chunk.num_drafted
            assert last < client.request.params.min_tokens, "not every token may be banned"

    def _check_follows(self, chunk: Chunk) -> None:
        """Of a request in flight only the next tokens of its prompt can be computed."""
        sent = [c for plan in self.outstanding for c in plan.chunks]
        before = [c for c in sent if c.request_id == chunk.request_id]
        assert all(c.sampling is None for c in before), "the next token is not drawn yet"
        if before:
            assert chunk.start == before[-1].start + len(before[-1].tokens)
            assert not before[-1].num_drafted

    def _check_writes(self, plan: Plan) -> None:
        """What a chunk writes, no other request in flight may read or write."""
        chunks = [chunk for other in (*self.outstanding, plan) for chunk in other.chunks]
        users: dict[int, set[int]] = {}
        for chunk in chunks:
            for block_id in chunk.block_ids:
                users.setdefault(block_id, set()).add(chunk.request_id)
        for chunk in plan.chunks:
            written = chunk.block_ids[(chunk.start + chunk.is_cached) // BLOCK_SIZE :]
            assert all(users[i] == {chunk.request_id} for i in written), (
                "a block is in use elsewhere"
            )

    def _receive_result(self) -> None:
        plan = self.outstanding.popleft()
        for chunk in plan.chunks:
            self._check_cache(chunk)
        for event in self.scheduler.complete(self.replica.run(plan)):
            self.clients[event.request_id].hear(event)

    def _check_cache(self, chunk: Chunk) -> None:
        """The blocks must hold exactly this sequence's prefix."""
        prefix_hash, expected = EMPTY_PREFIX, []
        num_held = chunk.start + chunk.is_cached
        for token_id in self.clients[chunk.request_id].known_tokens[:num_held]:
            prefix_hash = extend_hash(prefix_hash, token_id)
            expected.append(prefix_hash)
        assert self.replica.read_prefix(chunk, num_held) == expected, "wrong KV in the blocks"

    def _choose(self, data: st.DataObject) -> Client:
        return self.clients[data.draw(st.sampled_from(sorted(self.clients)))]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
