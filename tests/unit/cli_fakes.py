"""A model for the command line's tests: answers are fixed, nothing is loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from shoal.engine.api import Delta, ModelInfo
from shoal.engine.outputs import RequestOutput, SampleOutput
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason, SamplingParams


class FakeTokenizer:
    """One token per word; `<bos>` is token 0."""

    def __init__(self, *, has_chat_template: bool = True, bos: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self.bos_id = 0 if bos else None
        self._head = [0] if bos else []

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return (self._head if add_special else []) + [len(word) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)


class FakeLLM:
    """Answers with `pieces`, one token each; `log_p` is the score of every prompt token."""

    def __init__(
        self,
        *,
        pieces: tuple[str, ...] = ("It", " is", " blue."),
        max_context: int = 1000,
        tokenizer: FakeTokenizer | None = None,
        can_generate: bool = True,
        log_p: float = -2.0,
        during: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.tokenizer = tokenizer or FakeTokenizer()
        self.info = ModelInfo(
            name="fake",
            max_context=max_context,
            vocab_size=100,
            can_generate=can_generate,
            created_s=0,
            description="a fake",
        )
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.is_closed = False
        self.num_cancelled = 0
        self._pieces = pieces
        self._log_p = log_p
        self._during = during

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, progress: bool = True
    ) -> list[RequestOutput]:
        del progress
        self.asked += [(prompt, params) for prompt in prompts]
        return [self._output(prompt, params) for prompt in prompts]

    def stream_sync(
        self, prompt: list[int], params: SamplingParams
    ) -> Generator[Delta, None, None]:
        self.asked.append((prompt, params))
        try:
            for index, piece in enumerate(self._pieces):
                self._during(index)
                yield Delta(index=0, text=piece, token_ids=[index])
            yield Delta(index=0, finish_reason=FinishReason.STOP)
        finally:
            self.num_cancelled += 1

    async def stream(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Delta]:
        self.asked.append((prompt, params))
        for index in range(params.max_tokens or 0):
            yield Delta(index=0, text="x", token_ids=[index], num_cached_tokens=3)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def _output(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        score = TokenLogprobs(self._log_p, [], [])
        samples = [
            SampleOutput(
                text="".join(self._pieces),
                token_ids=list(range(len(self._pieces))),
                finish_reason=FinishReason.LENGTH,
            )
            for _ in range(params.n)
        ]
        return RequestOutput(
            prompt_tokens=prompt,
            samples=samples,
            prompt_logprobs=[score] * (len(prompt) - 1),
        )
