"""The scheduler: requests and results come in, plans and events go out. It decides, never acts."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items

from msgspec import structs

from shoal.errors import InternalError
from shoal.messages import Chunk, ChunkResult, Event, Plan, StepResult
from shoal.request import FinishReason, Request
from shoal.schedule.cache import BlockCache
from shoal.schedule.chunk import make_chunk
from shoal.schedule.counts import SchedulerCounts, Tally
from shoal.schedule.drafting import Drafter, Drafting
from shoal.schedule.flight import Flight, check_sequences
from shoal.schedule.foresight import GuessWanted, offer, wanted_guesses
from shoal.schedule.groups import GroupGate
from shoal.schedule.limits import Limits, Pace
from shoal.schedule.lookup import PromptLookup
from shoal.schedule.outcome import apply_result, check_result
from shoal.schedule.sequence import Sequence, State
from shoal.schedule.speculation import add_drafts, land_draft
from shoal.schedule.waiting import WaitingQueue


class Scheduler:
    """Which tokens of which requests are computed next, and in which blocks.

    A request waits, runs and ends; a preemption sends it from running back to waiting, with the
    tokens it has emitted. Memory shortage, failures and drains are all preemptions. Rank is
    (priority, arrival, id), lowest first: it decides who runs first and who yields.

    Plans are computed in their order, so a long prompt may have chunks in several outstanding
    ones; whoever waits for a token to be drawn is in one only. Blocks stay held until all plans
    that write them have landed, even if their request is cancelled. Not thread-safe.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_context: int,
        max_step_tokens: int,
        max_running: int,
        max_waiting: int,
        prefix_caching: bool = True,
        max_in_flight: int = 1,
        max_drafted: int = 0,
        drafter: Callable[[], Drafter] = PromptLookup,
        epoch: int = 0,
    ) -> None:
        self.limits = Limits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_context=max_context,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
            max_drafted=max_drafted,
        )
        self._cache = BlockCache(num_blocks, block_size, prefix_caching=prefix_caching)
        self._alive: dict[int, Sequence] = {}
        self._waiting = WaitingQueue()
        self._gate = GroupGate()
        self._running: list[Sequence] = []  # sorted by rank
        self._flights: dict[int, Flight] = {}  # by step
        self._max_running = max_running
        self._drafter = drafter
        self._epoch = epoch
        self._step = 0
        self._tally = Tally()
        self._pace = Pace()

    # ---- what the engine sees -------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """False when nothing is left to plan and nothing to wait for."""
        return bool(self._alive or self._flights)

    @property
    def num_waiting(self) -> int:
        return len(self._alive) - len(self._running)

    @property
    def running_ids(self) -> list[int]:
        """Requests that hold a place, best rank first."""
        return [sequence.request_id for sequence in self._running]

    def wanted_guesses(self) -> list[GuessWanted]:
        """What is worth guessing now, if somebody can, for the next plan; then `offer` it."""
        return wanted_guesses(self._running)

    def offer(self, guesses: Mapping[int, list[int]]) -> None:
        """Of requests that have ended meanwhile they are forgotten."""
        offer(self._running, guesses)

    def emitted_tokens(self, request_id: int) -> list[int]:
        """What an open request has emitted, in this life and earlier ones."""
        sequence = self._alive[request_id]
        return sequence.tokens[sequence.num_prompt :]

    @property
    def preemptions_by_reason(self) -> dict[str, int]:
        return dict(self._tally.preemptions)

    def counts(self) -> SchedulerCounts:
        return self._tally.counts(self.num_waiting, len(self._running), self._cache.pool)

    # ---- requests come and go -------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, ContextTooLong or QueueFull."""
        self.add_all([request])

    def add_all(self, requests: Items[Request]) -> None:
        """Queue requests, such as the samples of a group: all of them, or none and an error."""
        for request in requests:
            self.limits.check(request)
            if request.request_id in self._alive:
                raise InternalError(f"request id {request.request_id} is already in use")
        self.limits.check_queue(requests, self.num_waiting, self._pace)
        previous: Sequence | None = None
        for request in requests:
            previous = self._new_sequence(request, previous)
            self._alive[request.request_id] = previous
            self._enqueue(previous)

    def cancel(self, request_id: int) -> Event | None:
        """End a request because nobody wants it any more; None if it has already ended."""
        sequence = self._alive.get(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return Event(
            request_id=request_id,
            finish_reason=FinishReason.CANCELLED,
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )

    def finish(self, request_id: int) -> None:
        """End a request whose answer is complete, for instance at a stop string."""
        if sequence := self._alive.get(request_id):
            self._end(sequence)

    def preempt(self, request_ids: Iterable[int], reason: str) -> None:
        """Send running requests back to the queue; one in flight goes once its plan completes."""
        for request_id in request_ids:
            sequence = self._alive.get(request_id)
            if sequence is None or sequence.state is not State.RUNNING:
                continue
            if sequence.in_flight:
                sequence.preempt_reason = reason
            else:
                self._preempt(sequence, reason)

    def new_epoch(self, epoch: int, *, cache_lost: bool) -> None:
        """Void every outstanding plan after a failure, and send every running request back.

        `cache_lost` when any worker's KV cache is: then no block's content is trusted again.
        """
        if epoch <= self._epoch:
            raise InternalError(f"epoch {epoch} does not come after epoch {self._epoch}")
        self._epoch = epoch
        for flight in self._flights.values():
            for sequence, _ in flight.parts:
                self._touch_down(sequence)
        self._flights.clear()
        for sequence in reversed(self._running.copy()):
            self._preempt(sequence, "failure")
        if cache_lost:
            self._cache.forget_content()

    def go_on(self, epoch: int) -> None:
        """After a `new_epoch` that kept the cache: `epoch` is the one that has begun in the end."""
        assert not self._flights and not self._running
        if epoch < self._epoch:
            raise InternalError(f"epoch {epoch} comes before epoch {self._epoch}")
        self._epoch = epoch

    def limit_running(self, max_running: int) -> None:
        """Admit no more than so many from now on; those that run already go on."""
        self._max_running = max_running

    def resize(self, *, num_blocks: int, max_in_flight: int, epoch: int) -> list[int]:
        """Go on with another cache and depth, after a `new_epoch` that lost the old cache.

        `epoch` is the one that has begun in the end, after perhaps several attempts. Returns the
        requests that do not fit the new cache and can never run; they stay queued.
        """
        self.go_on(epoch)
        limits = structs.replace(self.limits, num_blocks=num_blocks, max_in_flight=max_in_flight)
        self.limits = limits
        self._cache = BlockCache(
            num_blocks, limits.block_size, prefix_caching=self._cache.prefix_caching
        )
        return [i for i, sequence in self._alive.items() if not limits.fits(sequence.request)]

    # ---- plans go out ---------------------------------------------------------------------

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None: nothing can be scheduled, or enough plans are outstanding."""
        if len(self._flights) >= self.limits.max_in_flight:
            return None
        flight = Flight(self.limits.max_step_tokens)
        self._yield_to_priority()
        self._plan_decodes(flight)
        self._plan_prefills(flight)
        self._plan_admissions(flight, now_s)
        if not flight.parts:
            return None
        add_drafts(flight, self._cache, num_reserved=len(self._running))
        self._step += 1
        self._flights[self._step] = flight
        return Plan(epoch=self._epoch, step=self._step, chunks=flight.chunks)

    def _yield_to_priority(self) -> None:
        """Make room for the first in the queue by preempting requests of a worse priority.

        Rank alone is no reason: a later arrival has paid for its prefill and may keep it.
        """
        first = self._waiting.peek()
        while first is not None and (victim := self._lowest_idle()) is not None:
            is_worse = victim.request.priority > first.request.priority
            if not is_worse or self._has_room_for(first):
                return
            self._preempt(victim, "priority")

    def _plan_decodes(self, flight: Flight) -> None:
        """One token each for those that need no more: a share of them, as all plans in flight are
        to have some."""
        share = -(-len(self._running) // self.limits.max_in_flight)
        ready = [s for s in self._running if not s.in_flight and s.num_missing == 1]
        for sequence in ready[: min(share, flight.budget_tokens)]:
            if sequence.state is State.RUNNING and self._make_room(sequence):
                self._take_off(flight, sequence, 1)

    def _plan_prefills(self, flight: Flight) -> None:
        """Chunks for those admitted earlier that are still in the middle of their tokens."""
        for sequence in self._running:
            if flight.budget_tokens == 0:
                return
            if sequence.preempt_reason is None and sequence.num_unplanned > (
                0 if sequence.in_flight else 1
            ):
                self._take_off(flight, sequence, self._chunk_tokens(flight, sequence))

    def _plan_admissions(self, flight: Flight, now_s: float) -> None:
        """Start waiting requests in rank order, as far as tokens, places and blocks reach.

        The first that does not fit stops the others: overtaking would starve the large ones.
        """
        while flight.budget_tokens > 0 and len(self._running) < self._max_running:
            sequence = self._waiting.peek()
            if sequence is None:
                return
            too_large = not sequence.request.splittable and (
                sequence.num_missing > flight.budget_tokens
            )
            if too_large or not self._cache.open(sequence):
                return
            self._start(self._waiting.pop(), now_s)
            self._take_off(flight, sequence, self._chunk_tokens(flight, sequence))

    def _chunk_tokens(self, flight: Flight, sequence: Sequence) -> int:
        """A lone prompt is cut into as many chunks as plans can be under way, to fill them."""
        if not sequence.request.splittable:
            return sequence.num_unplanned
        limits = self.limits
        share = -(-limits.max_step_tokens // limits.max_in_flight)
        return min(sequence.num_unplanned, flight.budget_tokens, share)

    # ---- results come in ------------------------------------------------------------------

    def complete(self, result: StepResult) -> list[Event]:
        """Apply a step's result: what happened to whom. Stale and unknown results do nothing.

        Raises InternalError, and changes nothing, if a result is not what its chunk asked for.
        """
        if result.epoch != self._epoch or result.step not in self._flights:
            return []
        by_id = {part.request_id: part for part in result.results}
        landings = [
            (sequence, chunk, by_id.get(chunk.request_id, ChunkResult(request_id=chunk.request_id)))
            for sequence, chunk in self._flights[result.step].parts
        ]
        for _, chunk, part in landings:
            check_result(chunk, part)
        del self._flights[result.step]
        return [event for landing in landings for event in self._land(*landing)]

    def _land(self, sequence: Sequence, chunk: Chunk, result: ChunkResult) -> list[Event]:
        self._touch_down(sequence)
        if sequence.state is State.ENDED:
            return []
        events = apply_result(sequence, chunk, result)
        if chunk.num_drafted:
            land_draft(sequence, chunk, result, self._cache)
        self._cache.publish(sequence, chunk.start)
        self._tally.add(chunk, events)
        if sequence.prompt_computed:
            for follower in self._gate.release(sequence):
                self._waiting.push(follower)
        if events and events[-1].finish_reason is not None:
            self._end(sequence)
        elif sequence.preempt_reason is not None and not sequence.in_flight:
            self._preempt(sequence, sequence.preempt_reason)
        return events

    # ---- the moves of one sequence --------------------------------------------------------

    def _new_sequence(self, request: Request, previous: Sequence | None) -> Sequence:
        most = self.limits.max_drafted
        drafting = Drafting(most, self._drafter()) if most else None
        if previous is not None and previous.request.prompt_tokens == request.prompt_tokens:
            return Sequence.of(request, previous.chain.copy(), drafting)
        return Sequence.of(request, self._cache.new_chain(request.prompt_tokens), drafting)

    def _enqueue(self, sequence: Sequence) -> None:
        if not self._cache.shares_prefix(sequence) or self._gate.admits(sequence):
            self._waiting.push(sequence)

    def _start(self, sequence: Sequence, now_s: float) -> None:
        sequence.state = State.RUNNING
        insort(self._running, sequence)
        self._pace.note_admission(now_s)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self._tally.prompt_tokens += sequence.num_prompt
            self._tally.prefix_hit_tokens += min(sequence.num_computed, sequence.num_prompt)

    def _take_off(self, flight: Flight, sequence: Sequence, num_tokens: int) -> None:
        chunk = make_chunk(sequence, num_tokens, self.limits.block_size)
        sequence.num_planned += num_tokens
        sequence.num_in_flight += 1
        flight.parts.append((sequence, chunk))
        flight.budget_tokens -= num_tokens

    def _touch_down(self, sequence: Sequence) -> None:
        sequence.num_in_flight -= 1
        if sequence.state is State.ENDED and not sequence.in_flight:
            self._cache.release(sequence)

    def _preempt(self, sequence: Sequence, reason: str) -> None:
        """From running back to waiting, tokens kept, blocks given up."""
        self._running.remove(sequence)
        self._cache.release(sequence)
        sequence.restart()
        self._waiting.push(sequence)
        self._tally.preemptions[reason] += 1

    def _end(self, sequence: Sequence) -> None:
        del self._alive[sequence.request_id]
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
        elif not self._gate.discard(sequence):
            self._waiting.remove(sequence)
        sequence.state = State.ENDED
        if not sequence.in_flight:
            self._cache.release(sequence)
        for follower in self._gate.release(sequence):
            self._enqueue(follower)  # the first of them leads the others now

    # ---- room -----------------------------------------------------------------------------

    def _has_room_for(self, sequence: Sequence) -> bool:
        return len(self._running) < self._max_running and self._cache.fits(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for a running sequence's next token, at the cost of lower ranks if need be."""
        while not self._cache.grow(sequence):
            victim = self._lowest_idle()
            if victim is None:
                return False
            if victim is sequence and sequence is not self._running[-1]:
                return False  # those below are in flight: preempt one of them when it lands
            self._preempt(victim, "memory")
            if victim is sequence:
                return False
        return True

    def _lowest_idle(self) -> Sequence | None:
        """The lowest-ranked running sequence that is in no plan."""
        return next((s for s in reversed(self._running) if not s.in_flight), None)

    # ---- self-check -----------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant; O(everything), for tests and debugging."""
        running, waiting = self._running, [*self._waiting, *self._gate]
        assert {id(s) for s in running + waiting} == {id(s) for s in self._alive.values()}
        assert len(running) + len(waiting) == len(self._alive), "both running and waiting"
        ended = check_sequences(running, waiting, list(self._flights.values()), self.limits)
        self._cache.check(running + ended)
