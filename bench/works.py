"""What engines are asked to do, and which figure each work gives.

Everybody gets the same token ids, greedy, with end-of-sequence ignored, so that everybody computes
the same number of tokens. Figures come from when each token of each stream arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Arrivals = Sequence[Sequence[float]]
"""Seconds from submission to each token, by stream."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """`figure` is tokens/s, but milliseconds for `cached`: the same prompt once more."""

    name: str
    figure: Literal["decode", "prefill", "cached"]
    num_streams: int = 1
    prompt_tokens: int
    new_tokens: int

    @property
    def unit(self) -> str:
        return "ms to the first token" if self.figure == "cached" else "tokens/s"

    @property
    def is_better_lower(self) -> bool:
        return self.figure == "cached"


WORKS = {
    work.name: work
    for work in (
        Work(name="decode-1", figure="decode", prompt_tokens=128, new_tokens=64),
        Work(name="decode-32", figure="decode", num_streams=32, prompt_tokens=128, new_tokens=64),
        Work(name="prefill-512", figure="prefill", prompt_tokens=512, new_tokens=1),
        Work(name="cached-512", figure="cached", prompt_tokens=512, new_tokens=1),
    )
}


def prompts_of(work: Work, turn: int, text: Sequence[int]) -> list[list[int]]:
    """Windows of `text`, each behind a token of its own: no cache knows any of an earlier turn.

    Of 16 384 prompts in a row no two begin alike. Raises ValueError for too short a text.
    """
    num_starts = len(text) - work.prompt_tokens
    if num_starts < 1:
        raise ValueError(f"{len(text)} tokens of text hold no prompt of {work.prompt_tokens}")
    place = list(WORKS).index(work.name) if work.name in WORKS else 0
    prompts = []
    for stream in range(work.num_streams):
        number = (turn * len(WORKS) + place) * work.num_streams + stream
        start = number * 61 % num_starts
        first = 1000 + number % 16384
        prompts.append([first, *text[start : start + work.prompt_tokens - 1]])
    return prompts


def figure_of(work: Work, arrivals_s: Arrivals) -> float:
    """Raises ValueError unless every stream has all of its tokens."""
    _check(work, arrivals_s)
    if work.figure == "decode":
        return decode_rate(arrivals_s)
    first_s = arrivals_s[0][0]
    return first_s * 1e3 if work.figure == "cached" else work.prompt_tokens / first_s


def decode_rate(arrivals_s: Arrivals) -> float:
    """Tokens/s while every stream decodes: after the last one's first token, to the first's last.

    Raises ValueError if there was no such time.
    """
    begin_s = max(stream[0] for stream in arrivals_s)
    end_s = min(stream[-1] for stream in arrivals_s)
    if end_s <= begin_s:
        raise ValueError(
            f"the first stream had ended {begin_s - end_s:.3f} s before the last one began"
        )
    num_tokens = sum(begin_s < at_s <= end_s for stream in arrivals_s for at_s in stream)
    return num_tokens / (end_s - begin_s)


def tokens_in_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two greedy answers have in common before they part."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _check(work: Work, arrivals_s: Arrivals) -> None:
    counts = [len(stream) for stream in arrivals_s]
    if counts != [work.new_tokens] * work.num_streams:
        raise ValueError(
            f"{work.name} asks {work.num_streams} streams for {work.new_tokens} tokens each, but "
            f"{counts} came"
        )
