"""Has a draft model guess before each plan, as long as that saves time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from shoal.messages import StepResult
from shoal.schedule.foresight import GuessWanted, Worth
from shoal.schedule.scheduler import Scheduler
from shoal.worker.draft_model import DraftModel

log = logging.getLogger(__name__)


class Foresight:
    """Of one engine's stepping thread; without a model it does nothing."""

    def __init__(
        self,
        model: DraftModel | None,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._clock = clock
        self._worth = Worth()
        self._guess_s: float | None = None
        """For the step under way; None if nobody guessed for it."""
        self._num_decoding = 0
        """Sequences that it draws a next token for; its time says nothing if it does more."""

    def look_ahead(self, lock: threading.Lock) -> None:
        """Before a plan is made. `lock` guards the scheduler, and is not held while guessing."""
        if self._model is None:
            return
        with lock:
            wanted = self._scheduler.wanted_guesses()
            self._num_decoding = len(self._scheduler.running_ids) if wanted else 0
        self._guess_s = None
        if not wanted or self._worth.is_resting:
            return
        start_s = self._clock()
        guesses = self._guesses(self._model, wanted)
        if any(guesses.values()):
            self._guess_s = self._clock() - start_s
        with lock:
            self._scheduler.offer(guesses)

    def finished(self, result: StepResult, step_s: float) -> None:
        """The step after the last look ahead has, in so many seconds."""
        if not self._num_decoding or len(result.results) != self._num_decoding:
            return
        if self._guess_s is None:
            self._worth.plain_step(step_s)
            return
        num_right = sum(max(len(each.token_ids) - 1, 0) for each in result.results)
        self._worth.guessed_step(self._guess_s, step_s, num_right / len(result.results))

    def _guesses(self, model: DraftModel, wanted: list[GuessWanted]) -> dict[int, list[int]]:
        try:
            return model.guess(wanted)
        except Exception:
            # Nobody's answer depends on it.
            log.exception("the draft model failed; nothing is guessed any more")
            self._model = None
            return {}
