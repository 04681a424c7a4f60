"""The head of a replica: schedule, run, publish, over and over.

Submitting and cancelling are safe from any thread; `step` belongs to one thread. The lock is
held for bookkeeping only, never while a step computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from shoal.engine.admission import generation_requests, pooling_request
from shoal.engine.api import Delta, EngineStats, Health, ModelInfo
from shoal.engine.chronicle import Chronicle
from shoal.engine.detokenizer import Detokenizer
from shoal.engine.executor import Executor
from shoal.engine.job import Deliver, Item, Job, Sample, unit_mean
from shoal.engine.recovery import Recovery
from shoal.errors import EngineStopped, InternalError, PeerLost, ShoalError
from shoal.messages import Event, StepResult
from shoal.request import Request, SamplingParams
from shoal.schedule.caution import Caution
from shoal.schedule.scheduler import Scheduler
from shoal.weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0


class Engine:
    """Requests in, deltas out. `stall_s`: how long work may wait without a finished step.

    While workers are lacking requests wait, for `recovery_timeout_s`; then they are told to come
    again, and so are new ones, until there are workers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer,
        info: ModelInfo,
        *,
        stall_s: float = 30.0,
        recovery_timeout_s: float = 60.0,
        replica: str = "r0",
        epoch: int = 0,
    ) -> None:
        """`epoch` is the one that executor and scheduler are in."""
        self.info = info
        self.tokenizer = tokenizer
        self._scheduler = scheduler
        self._executor = executor
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._work_came = threading.Condition(self._lock)
        self._next_id = 1
        self._samples: dict[int, Sample] = {}
        self._num_in_flight = 0
        self._epoch = epoch
        self._stopped: str | None = None
        self._recovery_timeout_s = recovery_timeout_s
        self._chronicle = Chronicle(replica)
        self._refusal: str | None = None
        """Why new requests are refused for now."""
        self._caution = Caution(scheduler.limits.max_running)
        self._last_progress_s = time.monotonic()
        self._num_steps = 0
        self._step_s = 0.0
        self._schedule_s = 0.0
        executor.watch(self._wake)

    # ---- from any thread ------------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        deliver: Deliver,
        *,
        seed: int,
        priority: int = 0,
        emitted: Sequence[list[int] | None] = (),
    ) -> Job:
        """Queue every sample of a prompt. `deliver` is called from the stepping thread, or for
        what `emitted` had ended already, from this one.

        Raises InvalidRequest, ContextTooLong, UnsupportedByModel, QueueFull, EngineStopped.
        """
        requests = generation_requests(
            prompt_tokens,
            params,
            info=self.info,
            eos_ids=self.tokenizer.eos_ids,
            first_id=self._reserve_ids(params.n),
            seed=seed,
            priority=priority,
            arrival_s=time.monotonic(),
            emitted=emitted,
        )
        return self._enqueue(requests, deliver)

    def submit_pooling(
        self, prompt_tokens: list[int], deliver: Deliver, *, priority: int = 0
    ) -> Job:
        """Queue a prompt for its embedding. Raises as `submit` does."""
        request = pooling_request(
            prompt_tokens,
            info=self.info,
            request_id=self._reserve_ids(1),
            priority=priority,
            arrival_s=time.monotonic(),
        )
        return self._enqueue({0: request}, deliver)

    def cancel(self, job: Job) -> None:
        """End what is left of a job; all that its submitter still hears is the end."""
        with self._lock:
            if not job.open_ids:
                return
            for request_id in sorted(job.open_ids):
                self._scheduler.cancel(request_id)
                self._samples.pop(request_id, None)
            job.open_ids.clear()
            job.deliver(None)
            self._work_came.notify()

    def stop(self, reason: str) -> None:
        """Refuse new work and end what is open with an error that says to try again."""
        with self._lock:
            self._stopped = self._stopped or reason
            self._fail(list(self._samples), EngineStopped(reason))
            self._work_came.notify()

    def close(self) -> None:
        """After the last step."""
        self._executor.close()

    def stats(self) -> EngineStats:
        with self._lock:
            counts = self._scheduler.counts()
            return EngineStats(
                num_waiting=counts.num_waiting,
                num_running=counts.num_running,
                num_blocks=counts.num_blocks,
                num_used_blocks=counts.num_used_blocks,
                num_cached_blocks=counts.num_cached_blocks,
                prompt_tokens=counts.prompt_tokens,
                prefix_hit_tokens=counts.prefix_hit_tokens,
                generated_tokens=counts.generated_tokens,
                preemptions=counts.preemptions,
                steps=self._num_steps,
                step_seconds=self._step_s,
                schedule_seconds=self._schedule_s,
                epoch=self._epoch,
                workers=self._executor.workers(),
                incidents=self._chronicle.incidents(),
                recoveries=self._chronicle.tally,
            )

    def health(self) -> Health:
        # Without the lock: a stuck step must not make the question about it hang.
        since_s = time.monotonic() - self._last_progress_s if self._samples else 0.0
        if self._stopped is not None:
            return Health(ok=False, reason=self._stopped, since_progress_s=since_s)
        if self._refusal is not None:
            return Health(ok=False, reason=self._refusal, since_progress_s=since_s)
        if since_s > self._stall_s:
            reason = f"work waits but no step has finished for {since_s:.0f} s"
            return Health(ok=False, reason=reason, since_progress_s=since_s)
        return Health(
            ok=True, reason="working" if self._samples else "idle", since_progress_s=since_s
        )

    # ---- from the stepping thread ---------------------------------------------------------

    def wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is stopped."""
        with self._work_came:
            while self._stopped is None and not self._has_work():
                self._work_came.wait()
            return self._stopped is None

    def step(self) -> None:
        """Plan as far as may be in flight, wait for the oldest result, publish it."""
        try:
            self._step()
        except EngineStopped:
            if self._stopped is None:
                raise

    def _step(self) -> None:
        try:
            if self._executor.wants_restart and not self._num_in_flight:
                self._begin_epoch("other workers are to go on", "operator")
            else:
                self._advance()
        except PeerLost as error:
            self._beware(error)
            self._begin_epoch(error.message, error.noticed_by)
        except EngineStopped:
            raise
        except Exception as error:
            self._abandon(error)

    def _has_work(self) -> bool:
        return self._executor.wants_restart or self._scheduler.has_work

    def _advance(self) -> None:
        start_s = time.perf_counter()
        self._submit_plans()
        planned_s = time.perf_counter()
        if not self._num_in_flight:
            return
        result = self._executor.collect()
        computed_s = time.perf_counter()
        with self._lock:
            self._num_in_flight -= 1
            self._publish(result)
            self._num_steps += 1
        done_s = time.perf_counter()
        self._step_s += done_s - start_s
        self._schedule_s += (planned_s - start_s) + (done_s - computed_s)

    def _submit_plans(self) -> None:
        executor = self._executor
        while not executor.wants_restart and self._num_in_flight < executor.max_in_flight:
            with self._lock:
                plan = self._scheduler.plan(time.monotonic())
            if plan is None:
                return
            # Without the lock: workers that do not read must not keep clients waiting too.
            executor.submit(plan)
            self._num_in_flight += 1

    def _publish(self, result: StepResult) -> None:
        for event in self._scheduler.complete(result):
            try:
                self._publish_event(event)
            except Exception as error:
                # Its own request only; and if the scheduler has ended that, nobody else tells it.
                log.exception("a result could not be published; its request ends with an error")
                message = f"the result of a step could not be published: {error}"
                self._fail([event.request_id], InternalError(message))
        self._last_progress_s = time.monotonic()
        if self._caution.is_careful:
            self._caution.finished()
            self._scheduler.limit_running(self._caution.max_running)
        if self._chronicle.open and any(part.token_id is not None for part in result.results):
            self._chronicle.end("recovered")

    def _publish_event(self, event: Event) -> None:
        sample = self._samples.get(event.request_id)
        if sample is None:
            return
        if event.pooled is not None:
            self._end(sample, unit_mean(event.pooled))
        elif event.token_id is not None:
            self._publish_token(sample, event)

    def _publish_token(self, sample: Sample, event: Event) -> None:
        delta = sample.delta(event)
        if delta.finish_reason is None:
            sample.job.deliver(delta)
            return
        if event.finish_reason is None:
            self._scheduler.finish(event.request_id)
        self._end(sample, delta)

    def _end(self, sample: Sample, last: Delta | list[float]) -> None:
        sample.job.deliver(last)
        self._samples.pop(sample.request.request_id, None)
        sample.job.open_ids.discard(sample.request.request_id)
        if not sample.job.open_ids:
            sample.job.deliver(None)

    # ---- bookkeeping ----------------------------------------------------------------------

    def _reserve_ids(self, number: int) -> int:
        with self._lock:
            first_id = self._next_id
            self._next_id += number
            return first_id

    def _enqueue(self, requests: Mapping[int, Request], deliver: Deliver) -> Job:
        job = Job(deliver)
        every = [
            Sample(job, index, request, self._detokenizer(request.params))
            for index, request in requests.items()
        ]
        ends = {sample.index: sample.resume() for sample in every}
        samples = [sample for sample in every if ends[sample.index] is None]
        with self._lock:
            if self._stopped is not None:
                raise EngineStopped(self._stopped)
            if self._refusal is not None:
                raise self._unavailable(self._refusal)
            if not self._samples:
                self._last_progress_s = time.monotonic()
            self._scheduler.add_all([sample.request for sample in samples])
            for sample in samples:
                self._samples[sample.request.request_id] = sample
                job.open_ids.add(sample.request.request_id)
            for end in filter(None, ends.values()):
                deliver(end)
            if not samples:
                deliver(None)
            self._work_came.notify()
        return job

    def _detokenizer(self, params: SamplingParams) -> Detokenizer:
        stream = self.tokenizer.stream(skip_special=params.skip_special_tokens)
        return Detokenizer(stream, params.stop)

    def _beware(self, error: PeerLost) -> None:
        """A request that kills whoever computes it must not keep all others waiting for ever."""
        with self._lock:
            killer = self._caution.lost(self._scheduler.running_ids)
            self._scheduler.limit_running(self._caution.max_running)
            if killer is not None:
                message = f"computing this request has ended its workers several times: {error}"
                self._fail([killer], InternalError(message))

    def _abandon(self, error: Exception) -> None:
        """A step failed: what was running gets an error, what waits goes on in a new epoch."""
        log.exception("a step failed; its requests end with an error", exc_info=error)
        with self._lock:
            message = f"the step that computed this request failed: {error}"
            self._fail(self._scheduler.running_ids, InternalError(message))
        self._begin_epoch(str(error), "report")

    # ---- recovering -----------------------------------------------------------------------

    def _begin_epoch(self, cause: str, noticed_by: str) -> None:
        """Every running request goes back to the queue with the tokens it has emitted."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        recovery = self._chronicle.begin(
            cause,
            noticed_by,
            num_requests=len(self._samples),
            meanwhile=self._while_recovering,
        )
        with self._lock:
            self._num_in_flight = 0
            self._epoch += 1
            self._scheduler.new_epoch(self._epoch, cache_lost=True)
        capacity = self._executor.restart(self._epoch, recovery)
        with self._lock:
            self._epoch = capacity.epoch
            too_long = self._scheduler.resize(
                num_blocks=capacity.num_blocks,
                max_in_flight=capacity.max_in_flight,
                epoch=capacity.epoch,
            )
            room = f"{capacity.num_blocks} blocks"
            self._fail(too_long, EngineStopped(f"the KV cache shrank to {room}: too few for this"))
            self._refusal = None
            self._last_progress_s = time.monotonic()
        self._chronicle.formed(self._epoch)
        if not self._scheduler.has_work:
            self._chronicle.end("recovered")

    def _while_recovering(self, recovery: Recovery) -> None:
        """Raises EngineStopped when nobody waits for workers any more."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        if recovery.since_s < self._recovery_timeout_s:
            return
        reason = f"no workers since {recovery.since_s:.0f} s: {recovery.trouble}"
        self._chronicle.end("given up")
        with self._lock:
            self._refusal = f"{reason}; they are still looked for: try again later"
            self._fail(list(self._samples), self._unavailable(self._refusal))

    def _unavailable(self, reason: str) -> EngineStopped:
        return EngineStopped(reason, retry_after_s=_RETRY_AFTER_S, code="no_workers")

    def _wake(self) -> None:
        with self._lock:
            self._work_came.notify()

    def _fail(self, request_ids: Iterable[int], error: ShoalError) -> None:
        jobs = {id(s.job): s.job for i in request_ids if (s := self._samples.get(i)) is not None}
        for job in jobs.values():
            for request_id in sorted(job.open_ids):
                self._scheduler.cancel(request_id)
                del self._samples[request_id]
            job.open_ids.clear()
            item: Item = error
            job.deliver(item)
