"""Guesses at the next tokens of a sequence: what came after its last few tokens before."""

from __future__ import annotations

_LONGEST, _SHORTEST = 3, 2
"""Tokens that must have come before in the same order; a single one says too little."""
_MOST_AT_ONCE = 512
"""Tokens taken up in one call: a step must not wait until all of a long prompt is."""


class PromptLookup:
    """An index of one sequence's runs of tokens: each, and where the latest ended.

    A call costs the same however long the sequence is. About 250 bytes a token.
    """

    __slots__ = ("_end_of", "_num_indexed")

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, tokens: list[int], at_most: int) -> list[int]:
        """Up to `at_most` tokens that may follow; none if nothing like the last ones came before.

        `tokens` is the whole sequence: those seen before, unchanged, then new ones.
        """
        self._take_up(tokens)
        if self._num_indexed < len(tokens) - 1:
            return []
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._end_of.get(tuple(tokens[-length:]))
            if end is not None:
                return _continuation(tokens, end, at_most)
        return []

    def _take_up(self, tokens: list[int]) -> None:
        """All but the last token, whose own run would be the latest."""
        end_of = self._end_of
        last = min(len(tokens) - 1, self._num_indexed + _MOST_AT_ONCE)
        for end in range(self._num_indexed + 1, last + 1):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                end_of[tuple(tokens[end - length : end])] = end
        self._num_indexed = last


def _continuation(tokens: list[int], end: int, number: int) -> list[int]:
    """What follows from `end` on; a run that reaches the sequence's end goes on in its period."""
    guess = tokens[end : end + number]
    for i in range(len(guess), number):
        guess.append(guess[i - (len(tokens) - end)])
    return guess
