"""What was asked and what came back, and where two answers to the same question part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import msgspec

from shoal.request import SamplingParams

# Sums in another order change the last bits; a float32 model over six workers was measured at 2e-5.
_LOGPROB_TOLERANCE = 1e-3
_CHARS_BEFORE, _CHARS_AFTER = 24, 24

Kind = Literal["lost", "repeated", "differs"]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` names what is special about it, for who reads a report."""

    kind: str
    prompt: str
    params: SamplingParams
    stream: bool = True


class AnsweredSample(msgspec.Struct, kw_only=True):
    """`arrivals_s` are the times of its pieces, if it was streamed."""

    token_ids: list[int] = msgspec.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = msgspec.field(default_factory=list)
    finish_reason: str | None = None
    stop_match: str | int | None = None
    arrivals_s: list[float] = msgspec.field(default_factory=list)


class Answer(msgspec.Struct, kw_only=True):
    """Times are in seconds on one clock. `num_output_tokens` is what the server counted."""

    sent_s: float
    ended_s: float
    samples: list[AnsweredSample]
    prompt_logprobs: list[float] = msgspec.field(default_factory=list)
    num_output_tokens: int | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    def broken(self) -> str | None:
        """What is wrong with it, whatever it says."""
        unended = [i for i, each in enumerate(self.samples) if each.finish_reason is None]
        if self.error is not None:
            return self.error
        return f"sample {unended[0]} has no end" if unended else None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens are lost if what follows them is there without them, and repeated if all is."""

    kind: Kind
    num_tokens: int
    text: str


def first_difference(calm: Answer, got: Answer) -> Difference | None:
    """Between two whole answers to the same question."""
    for index, (before, after) in enumerate(zip_longest(calm.samples, got.samples)):
        if before is None or after is None:
            return _other(f"{len(calm.samples)} samples became {len(got.samples)}")
        found = _in_sample(before, after)
        if found is not None:
            return msgspec.structs.replace(found, text=f"sample {index}, {found.text}")
    if calm.num_output_tokens != got.num_output_tokens:
        return _other(f"usage: {calm.num_output_tokens} tokens became {got.num_output_tokens}")
    if not _close(calm.prompt_logprobs, got.prompt_logprobs):
        return _other("the prompt's log-probabilities")
    return None


def _in_sample(calm: AnsweredSample, got: AnsweredSample) -> Difference | None:
    if calm.token_ids != got.token_ids:
        return _in_tokens(calm, got)
    if calm.text != got.text:
        return _other(f"same tokens, another text: {_parting(calm.text, got.text)}")
    ends = [(each.finish_reason, each.stop_match) for each in (calm, got)]
    if ends[0] != ends[1]:
        return _other(f"same text, another end: {ends[0]} became {ends[1]}")
    if not _close(calm.logprobs, got.logprobs):
        return _other("same text, other log-probabilities")
    return None


def _in_tokens(calm: AnsweredSample, got: AnsweredSample) -> Difference:
    before, after = calm.token_ids, got.token_ids
    pairs = zip(before, after, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    at = min(len(before), len(after)) if at is None else at
    kind, number = _shift(before, after, at)
    where = f"token {at}: {_parting(calm.text, got.text)}"
    return Difference(kind=kind, num_tokens=number, text=where)


def _shift(calm: Sequence[int], got: Sequence[int], at: int) -> tuple[Kind, int]:
    if at == len(got):
        return "lost", len(calm) - at
    for number in range(1, len(calm) - at):
        if _goes_on(calm[at + number :], got[at:]):
            return "lost", number
    for number in range(1, at + 1):
        if got[at : at + number] == calm[at - number : at] and _goes_on(
            calm[at:], got[at + number :]
        ):
            return "repeated", number
    return "differs", max(len(calm), len(got)) - at


def _goes_on(calm: Sequence[int], got: Sequence[int]) -> bool:
    """As far as both reach: an answer of limited length has more at its end if it lacks some."""
    common = min(len(calm), len(got))
    return calm[:common] == got[:common]


def _parting(calm: str, got: str) -> str:
    at = next((i for i, pair in enumerate(zip_longest(calm, got)) if pair[0] != pair[1]), len(calm))
    shared = calm[max(at - _CHARS_BEFORE, 0) : at]
    before, after = calm[at : at + _CHARS_AFTER], got[at : at + _CHARS_AFTER]
    return f"after {shared!r} {before!r} became {after!r}"


def _close(calm: Sequence[float], got: Sequence[float]) -> bool:
    return len(calm) == len(got) and all(
        abs(one - other) <= _LOGPROB_TOLERANCE for one, other in zip(calm, got, strict=True)
    )


def _other(text: str) -> Difference:
    return Difference(kind="differs", num_tokens=0, text=text)
