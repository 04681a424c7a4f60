"""The head of a replica: schedule, run, publish, over and over.

Submitting and cancelling are safe from any thread; `step` belongs to one thread. The lock is
held for bookkeeping only, never while a step computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import asdict

from shoal.engine.admission import generation_requests, pooling_request
from shoal.engine.api import EngineStats, Health, ModelInfo
from shoal.engine.chronicle import Chronicle
from shoal.engine.detokenizer import Detokenizer
from shoal.engine.executor import Capacity, Executor
from shoal.engine.foresight import Foresight
from shoal.engine.job import Deliver, Job, Sample, unit_mean
from shoal.engine.open_jobs import OpenJobs, both_held
from shoal.engine.recovery import Recovery, no_workers
from shoal.engine.vital_signs import vital_signs
from shoal.errors import EngineStopped, InternalError, PeerLost
from shoal.messages import Event, StepResult
from shoal.request import Request, SamplingParams
from shoal.schedule.caution import Caution
from shoal.schedule.scheduler import Scheduler
from shoal.weights.tokenizer import Tokenizer
from shoal.worker.draft_model import DraftModel

log = logging.getLogger(__name__)


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
        draft_model: DraftModel | None = None,
    ) -> None:
        """`epoch` is the one that executor and scheduler are in."""
        self.info = info
        self.tokenizer = tokenizer
        self._scheduler = scheduler
        self._executor = executor
        self._foresight = Foresight(draft_model, scheduler)
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._work_came = threading.Condition(self._lock)
        self._jobs = OpenJobs(scheduler)
        self._num_in_flight = 0
        self._epoch = epoch
        self._stopped: str | None = None
        self._recovery_timeout_s = recovery_timeout_s
        self._chronicle = Chronicle(replica)
        self._refusal: str | None = None  # why new requests are refused for now
        self._recovery: Recovery | None = None
        self._in_trouble: Callable[[float], None] = lambda _since_s: None
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
            if job.holder is self:
                self._jobs.cancel(job)
                self._work_came.notify()
                return
        job.holder.cancel(job)  # it has moved

    def hand_over(self, job: Job, to: Engine, moved: Callable[[], None]) -> bool:
        """Have another engine go on with a job, its submitter none the wiser.

        `moved` is called before anything else can happen to the job. False if it has ended, or is
        elsewhere by now. Raises what the other refuses it with; the job stays here then.
        """
        with both_held(self._lock, to._lock):
            if job.holder is not self or not job.open_ids:
                return False
            to._check_open()
            to._note_work()
            self._jobs.pass_on(job, to._jobs)
            job.holder = to
            moved()
            to._work_came.notify()
            return True

    def watch_recovery(self, in_trouble: Callable[[float], None]) -> None:
        """Call this all the time while workers are awaited, with the seconds since their loss."""
        self._in_trouble = in_trouble

    def stop(self, reason: str) -> None:
        """Refuse new work and end what is open with an error that says to try again."""
        with self._lock:
            self._stopped = self._stopped or reason
            self._jobs.fail(self._jobs, EngineStopped(reason))
            self._work_came.notify()

    def close(self) -> None:
        """After the last step."""
        self._executor.close()

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                **asdict(self._scheduler.counts()),
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
        recovery = self._recovery
        return vital_signs(
            stopped=self._stopped,
            refusal=self._refusal,
            trouble=None if recovery is None else recovery.trouble,
            recovering_s=None if recovery is None else recovery.since_s,
            waiting_s=time.monotonic() - self._last_progress_s if self._jobs else None,
            stall_s=self._stall_s,
        )

    @property
    def is_recovering(self) -> bool:
        return self._recovery is not None

    # ---- from the stepping thread ---------------------------------------------------------

    def wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is stopped."""
        with self._work_came:
            while self._stopped is None and not (
                self._executor.wants_restart or self._scheduler.has_work
            ):
                self._chronicle.end("recovered")  # there is nobody left to show it to
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
            self._foresight.finished(result, computed_s - planned_s)
            self._publish(result)
            self._num_steps += 1
        done_s = time.perf_counter()
        self._step_s += done_s - start_s
        self._schedule_s += (planned_s - start_s) + (done_s - computed_s)

    def _submit_plans(self) -> None:
        executor = self._executor
        if not self._num_in_flight:
            self._foresight.look_ahead(self._lock)
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
                self._jobs.fail([event.request_id], InternalError(message))
        self._last_progress_s = time.monotonic()
        if self._caution.is_careful:
            self._caution.finished()
            self._scheduler.limit_running(self._caution.max_running)
        self._chronicle.finished(result)

    def _publish_event(self, event: Event) -> None:
        sample = self._jobs.get(event.request_id)
        if sample is None:
            return
        if event.pooled is not None:
            self._jobs.end(sample, unit_mean(event.pooled))
        elif event.token_id is not None:
            self._publish_token(sample, event)

    def _publish_token(self, sample: Sample, event: Event) -> None:
        delta = sample.delta(event)
        if delta.finish_reason is None:
            sample.job.deliver(delta)
            return
        if event.finish_reason is None:
            self._scheduler.finish(event.request_id)
        self._jobs.end(sample, delta)

    # ---- bookkeeping ----------------------------------------------------------------------

    def _reserve_ids(self, number: int) -> int:
        with self._lock:
            return self._jobs.reserve_ids(number)

    def _enqueue(self, requests: Mapping[int, Request], deliver: Deliver) -> Job:
        job = Job(deliver, self)
        every = [
            Sample(job, index, request, self._detokenizer(request.params))
            for index, request in requests.items()
        ]
        ends = {sample.index: sample.resume() for sample in every}
        samples = [sample for sample in every if ends[sample.index] is None]
        with self._lock:
            self._check_open()
            self._note_work()
            self._jobs.add(job, samples)
            for end in filter(None, ends.values()):
                deliver(end)
            if not samples:
                deliver(None)
            self._work_came.notify()
        return job

    def _check_open(self) -> None:
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        if self._refusal is not None:
            raise no_workers(self._refusal)

    def _note_work(self) -> None:
        if not self._jobs:  # idle until now: that was no lack of progress
            self._last_progress_s = time.monotonic()

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
                self._jobs.fail([killer], InternalError(message))

    def _abandon(self, error: Exception) -> None:
        """A step failed: what was running gets an error, what waits goes on in a new epoch."""
        log.exception("a step failed; its requests end with an error", exc_info=error)
        with self._lock:
            message = f"the step that computed this request failed: {error}"
            self._jobs.fail(self._scheduler.running_ids, InternalError(message))
        self._begin_epoch(str(error), "report")

    # ---- recovering -----------------------------------------------------------------------

    def _begin_epoch(self, cause: str, noticed_by: str) -> None:
        """Every running request goes back to the queue with the tokens it has emitted."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        recovery = self._chronicle.begin(
            cause, noticed_by, num_requests=len(self._jobs), meanwhile=self._while_recovering
        )
        with self._lock:
            self._num_in_flight = 0
            self._epoch += 1
            self._scheduler.new_epoch(self._epoch, cache_lost=False)
        self._recovery = recovery
        try:
            capacity = self._executor.restart(self._epoch, recovery)
        finally:
            self._recovery = None
        with self._lock:
            self._epoch = capacity.epoch
            self._go_on_with(capacity)
            self._refusal = None
            self._last_progress_s = time.monotonic()
        self._chronicle.formed(self._epoch)

    def _go_on_with(self, now: Capacity) -> None:
        if now.is_cache_kept:
            self._scheduler.go_on(now.epoch)
            return
        too_long = self._scheduler.resize(
            num_blocks=now.num_blocks, max_in_flight=now.max_in_flight, epoch=now.epoch
        )
        shrunk = f"the KV cache shrank to {now.num_blocks} blocks: too few for this"
        self._jobs.fail(too_long, EngineStopped(shrunk))

    def _while_recovering(self, recovery: Recovery) -> None:
        """Raises EngineStopped when nobody waits for workers any more."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        self._in_trouble(recovery.since_s)
        if recovery.since_s < self._recovery_timeout_s:
            return
        reason = f"no workers since {recovery.since_s:.0f} s: {recovery.trouble}"
        self._chronicle.end("given up")
        with self._lock:
            self._refusal = f"{reason}; they are still looked for: try again later"
            self._jobs.fail(self._jobs, no_workers(self._refusal))

    def _wake(self) -> None:
        with self._lock:
            self._work_came.notify()
