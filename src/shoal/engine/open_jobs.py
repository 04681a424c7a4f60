"""The jobs that an engine has, and how one goes over to another engine."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from shoal.engine.api import Delta
from shoal.engine.job import Item, Job, Sample
from shoal.errors import ShoalError
from shoal.request import Request
from shoal.schedule.scheduler import Scheduler


class OpenJobs:
    """Samples by request id, each known to the scheduler too. The engine's lock guards it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._samples: dict[int, Sample] = {}
        self._next_id = 1

    def __len__(self) -> int:
        """How many samples are open."""
        return len(self._samples)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._samples))

    def get(self, request_id: int) -> Sample | None:
        return self._samples.get(request_id)

    def reserve_ids(self, number: int) -> int:
        """The first of so many that follow each other."""
        first_id = self._next_id
        self._next_id += number
        return first_id

    def add(self, job: Job, samples: Sequence[Sample]) -> None:
        """Raises as `Scheduler.add_all`, and has changed nothing then."""
        self._scheduler.add_all([sample.request for sample in samples])
        self._hold(job, samples)

    def cancel(self, job: Job) -> None:
        if self._drop(job):
            job.deliver(None)

    def end(self, sample: Sample, last: Delta | list[float]) -> None:
        job, request_id = sample.job, sample.request.request_id
        job.deliver(last)
        self._samples.pop(request_id, None)
        job.open_ids.discard(request_id)
        if not job.open_ids:
            job.deliver(None)

    def fail(self, request_ids: Iterable[int], error: ShoalError) -> None:
        """The whole jobs of these requests end with an error."""
        jobs = {id(s.job): s.job for i in request_ids if (s := self._samples.get(i)) is not None}
        for job in jobs.values():
            self._drop(job)
            item: Item = error
            job.deliver(item)

    def pass_on(self, job: Job, to: OpenJobs) -> None:
        """What is open of a job goes on among others, after the tokens that it has emitted.

        Raises as `Scheduler.add_all`, and has changed nothing then.
        """
        samples = [self._samples[request_id] for request_id in sorted(job.open_ids)]
        first_id = to.reserve_ids(len(samples))
        requests = [
            self._continued(sample.request, first_id, first_id + offset)
            for offset, sample in enumerate(samples)
        ]
        to._scheduler.add_all(requests)
        self._drop(job)
        for sample, request in zip(samples, requests, strict=True):
            sample.request = request
        to._hold(job, samples)

    def _continued(self, request: Request, group: int, request_id: int) -> Request:
        return replace(
            request,
            request_id=request_id,
            group=None if request.group is None else group,
            emitted_tokens=self._scheduler.emitted_tokens(request.request_id),
        )

    def _hold(self, job: Job, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._samples[sample.request.request_id] = sample
            job.open_ids.add(sample.request.request_id)

    def _drop(self, job: Job) -> bool:
        """False if there was nothing left of it."""
        was_open = bool(job.open_ids)
        for request_id in sorted(job.open_ids):
            self._scheduler.cancel(request_id)
            self._samples.pop(request_id, None)
        job.open_ids.clear()
        return was_open


@contextmanager
def both_held(one: threading.Lock, other: threading.Lock) -> Iterator[None]:
    """In the same order whoever asks, so that two who move jobs to and fro do not block."""
    first, second = sorted((one, other), key=id)
    with first, second:
        yield
