"""Guesses that somebody makes before a plan: of which sequences, how many, and whether they pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from shoal.messages import Sampling
from shoal.schedule.chunk import sampling_of
from shoal.schedule.drafting import Offered
from shoal.schedule.sequence import Sequence
from shoal.schedule.speculation import MOST_ROWS, most_useful


class GuessWanted(msgspec.Struct, frozen=True, kw_only=True):
    """Up to `number` tokens that may follow `tokens`; the first is drawn as `sampling` says."""

    request_id: int
    tokens: list[int]
    number: int
    sampling: Sampling


def wanted_guesses(running: list[Sequence]) -> list[GuessWanted]:
    """For a step that computes nothing but the next token of each, and few of them."""
    if not running or any(s.in_flight or s.num_missing != 1 for s in running):
        return []
    room = MOST_ROWS // len(running) - 1
    return [
        GuessWanted(
            request_id=s.request_id,
            tokens=s.tokens.copy(),
            number=number,
            sampling=msgspec.structs.replace(sampling_of(s), num_logprobs=None),
        )
        for s in running
        if s.drafting is not None
        and (number := min(room, s.drafting.num_wanted, most_useful(s))) > 0
    ]


def offer(running: Iterable[Sequence], guesses: Mapping[int, list[int]]) -> None:
    """Guesses by request, for tokens that are still the last."""
    for sequence in running:
        guess, drafting = guesses.get(sequence.request_id), sequence.drafting
        if guess and drafting is not None and isinstance(drafting.drafter, Offered):
            drafting.drafter.offer(len(sequence.tokens), guess)


_FIRST_PLAIN = 4
"""Steps without guesses before the first with them: what these save is counted in those."""
_JUDGED_AFTER = 4
"""Steps with guesses before they are judged."""
_COMPARED_EVERY = 64
"""Steps with guesses before one without: what a step takes changes with the machine's load."""
_WEIGHT, _PLAIN_WEIGHT = 0.2, 0.5
"""Of the newest step in each mean; those without guesses may be few."""
_FIRST_REST, _LONGEST_REST = 32, 1024


@dataclass(slots=True)
class Worth:
    """Whether guesses that take time to make save more of it: if not, they rest, longer each time.

    All times in seconds. With `right` guesses of each sequence a step saves so many steps.
    """

    plain_s: float = 0.0
    cost_s: float = 0.0
    right: float = 0.0
    _num_judged: int = 0
    _rest: int = _FIRST_PLAIN
    _next_rest: int = _FIRST_REST

    @property
    def is_resting(self) -> bool:
        return self._rest > 0

    def plain_step(self, step_s: float) -> None:
        """A step of decodes that nobody guessed for."""
        self.plain_s = step_s if self.plain_s == 0.0 else _mean(self.plain_s, step_s, _PLAIN_WEIGHT)
        self._rest = max(0, self._rest - 1)

    def guessed_step(self, guess_s: float, step_s: float, right: float) -> None:
        """`right` guesses for each sequence, made in `guess_s`."""
        cost_s = guess_s + step_s - self.plain_s
        is_first = self._num_judged == 0
        self.cost_s = cost_s if is_first else _mean(self.cost_s, cost_s, _WEIGHT)
        self.right = right if is_first else _mean(self.right, right, _WEIGHT)
        self._num_judged += 1
        if self._num_judged < _JUDGED_AFTER:
            return
        if self.right * self.plain_s >= self.cost_s:
            self._next_rest = _FIRST_REST
            self._rest = int(self._num_judged % _COMPARED_EVERY == 0)
            return
        self._num_judged = 0
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)


def _mean(before: float, newest: float, weight: float) -> float:
    return before + weight * (newest - before)
