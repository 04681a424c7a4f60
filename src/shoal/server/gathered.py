"""What the steps of a response add up to: its choices, what they used, the prompts' scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shoal.engine.api import Delta
from shoal.journal.api import Accepted, Entry
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason


@dataclass
class Sample:
    """One choice, put together from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.finish_reason = delta.finish_reason
        self.stop_match = delta.stop_match


class Gathered:
    """The choices of a response as far as its entries have been added."""

    def __init__(self, accepted: Accepted, entries: Iterable[Entry] = ()) -> None:
        self.prompts = accepted.prompts
        self.num_samples = accepted.num_samples
        self.samples = [Sample() for _ in range(accepted.num_choices)]
        self.prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in accepted.prompts]
        self._num_cached_tokens = 0
        for choice, delta in entries:
            self.add(choice, delta)

    def add(self, choice: int, delta: Delta) -> None:
        self.samples[choice].add(delta)
        self._num_cached_tokens += delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[choice // self.num_samples] = delta.prompt_logprobs

    def emitted(self) -> list[list[int] | None]:
        """By choice: its tokens so far, None if it has ended."""
        return [
            sample.token_ids if sample.finish_reason is None else None for sample in self.samples
        ]

    def usage(self, num_generated_tokens: int | None = None) -> dict[str, Any]:
        """OpenAI's usage object: a prompt counts once, however many samples it has."""
        num_prompt = sum(len(prompt) for prompt in self.prompts)
        num_generated = num_generated_tokens
        if num_generated is None:
            num_generated = sum(len(sample.token_ids) for sample in self.samples)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }
