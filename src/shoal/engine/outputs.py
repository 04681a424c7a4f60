"""Finished answers, gathered from their deltas."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal.engine.api import Delta
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason


class SampleOutput(msgspec.Struct, kw_only=True):
    """One answer. `token_ids` includes the token that ended it; `logprobs` is parallel to it."""

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_match = delta.stop_match


class RequestOutput(msgspec.Struct, kw_only=True):
    """A prompt and its `n` answers. Entry i of `prompt_logprobs` scores prompt token i + 1."""

    prompt_tokens: list[int]
    samples: list[SampleOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.samples[0].text


def gather(prompt_tokens: list[int], num_samples: int, deltas: Iterable[Delta]) -> RequestOutput:
    """Read a stream to its end."""
    samples = [SampleOutput(token_ids=[]) for _ in range(num_samples)]
    output = RequestOutput(prompt_tokens=prompt_tokens, samples=samples)
    for delta in deltas:
        samples[delta.index].add(delta)
        if delta.index == 0 and delta.prompt_logprobs is not None:
            output.prompt_logprobs = delta.prompt_logprobs
        output.num_cached_tokens += delta.num_cached_tokens
    return output
