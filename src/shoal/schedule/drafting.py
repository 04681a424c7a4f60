"""How much is guessed for one sequence: as many tokens as were right lately."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from shoal.schedule.lookup import PromptLookup

_FIRST_LENGTH = 2
_FIRST_REST, _LONGEST_REST = 4, 64


class Drafter(Protocol):
    """What guesses at one sequence's next tokens."""

    def propose(self, tokens: list[int], at_most: int) -> list[int]: ...


@dataclass(slots=True)
class Offered:
    """Guesses that somebody made beforehand: good until the sequence has another token."""

    _num_tokens: int = 0
    _guesses: list[int] = field(default_factory=list)

    def offer(self, num_tokens: int, guesses: list[int]) -> None:
        self._num_tokens, self._guesses = num_tokens, guesses

    def propose(self, tokens: list[int], at_most: int) -> list[int]:
        return self._guesses[:at_most] if len(tokens) == self._num_tokens else []


@dataclass(slots=True)
class Drafting:
    """One sequence's drafts, of at most `most` tokens.

    `length` doubles when a whole draft was right, follows what was right of it, and halves when
    nothing was. Where it would be 0 there are no drafts for a while, longer each time in a row.
    """

    most: int
    drafter: Drafter = field(default_factory=PromptLookup)
    length: int = 0
    _rest: int = 0
    _next_rest: int = _FIRST_REST

    def __post_init__(self) -> None:
        self.length = min(_FIRST_LENGTH, self.most)

    @property
    def num_wanted(self) -> int:
        """Guesses for the next step."""
        return 0 if self._rest > 0 else self.length

    def propose(self, tokens: list[int], at_most: int) -> list[int]:
        """For one step, at most so many."""
        if self._rest > 0:
            self._rest -= 1
            return []
        return self.drafter.propose(tokens, min(self.length, at_most))

    def judge(self, num_drafted: int, num_right: int) -> None:
        """What became of a draft."""
        if num_right == num_drafted:
            self.length = min(2 * self.length, self.most)
        elif num_right > 0:
            self.length = num_right + 1
        else:
            self.length //= 2
        if num_right > 0:
            self._next_rest = _FIRST_REST
        elif self.length == 0:
            self.length, self._rest = 1, self._next_rest
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
