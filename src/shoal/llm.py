"""The Python interface: a model on this machine, prompts in, answers out."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from shoal.config import DType, EngineConfig, KVDType, Quantize, Split, parse_bytes
from shoal.engine.api import Delta, ModelInfo
from shoal.engine.outputs import RequestOutput, gather
from shoal.engine.streams import SyncStream
from shoal.errors import QueueFull
from shoal.fleet.deployment import deploy
from shoal.request import SamplingParams
from shoal.weights.tokenizer import Tokenizer

Prompt = str | list[int]
Message = dict[str, Any]
Result = TypeVar("Result")

# Below this many prompts a progress bar is noise.
_PROGRESS_FROM = 8


class LLM:
    """A loaded model. Use it as a context manager, or `close()` it.

    `model` is a catalogue name, a GGUF file, a Hugging Face folder or id, or an fsspec URL.
    `kv_memory` is bytes or text such as "2GiB". With a `split` the model runs in worker processes
    of this machine; `spares` more stand by for those that die, and requests wait
    `recovery_timeout_s` for workers that cannot be had before they end with RetryError. With
    `speculate` up to so many tokens of each answer are guessed from what it repeats and computed
    together; answers stay as they are. A smaller `draft_model` with the same tokens guesses better.
    Raises SourceError, ConfigError, OutOfMemory, PeerLost.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: DType = "auto",
        quantize: Quantize = "auto",
        kv_dtype: KVDType = "auto",
        max_context: int | None = None,
        kv_memory: int | str | None = None,
        max_step_tokens: int = 512,
        max_running: int = 256,
        prefix_caching: bool = True,
        speculate: int = 0,
        draft_model: str | None = None,
        num_threads: int | None = None,
        split: Split | None = None,
        spares: int = 0,
        recovery_timeout_s: float = 60.0,
    ) -> None:
        config = EngineConfig(
            model=model,
            dtype=dtype,
            quantize=quantize,
            kv_dtype=kv_dtype,
            max_context=max_context,
            kv_memory_bytes=parse_bytes(kv_memory) if isinstance(kv_memory, str) else kv_memory,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            prefix_caching=prefix_caching,
            speculate=speculate,
            draft_model=draft_model,
            num_threads=num_threads,
            split=split or Split(),
            spares=spares,
            recovery_timeout_s=recovery_timeout_s,
        )
        self._deployment = deploy(config)
        self._engine = self._deployment.engine

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids), all together; answers in prompt order."""
        params = params or SamplingParams()
        all_tokens = [self._tokens(prompt) for prompt in _as_list(prompts)]

        def submit(tokens: list[int]) -> SyncStream:
            return self._engine.submit_sync(tokens, params)

        def finish(tokens: list[int], stream: SyncStream) -> RequestOutput:
            return gather(tokens, params.n, stream)

        return _run_all(all_tokens, submit, finish, progress=progress)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """The answer to a conversation, or to each of several. Always a list, as `generate`."""
        conversations = [one for one in messages if isinstance(one, list)]
        single = [one for one in messages if isinstance(one, dict)]
        prompts: list[Prompt] = [self._chat_tokens(one) for one in conversations or [single]]
        return self.generate(prompts, params, progress=progress)

    def embed(
        self, texts: Prompt | Sequence[Prompt], *, progress: bool = True
    ) -> list[list[float]]:
        """One vector of length 1 per text: the mean of the last hidden states."""
        all_tokens = [self._tokens(text) for text in _as_list(texts)]
        submit = self._engine.submit_embed_sync
        return _run_all(all_tokens, submit, lambda _, stream: stream.embedding(), progress=progress)

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """Deltas as they come; leaving the loop early cancels the request."""
        stream = self._engine.submit(self._tokens(prompt), params or SamplingParams())
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.cancel()

    def stream_sync(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas as they come; closing the iterator cancels the request."""
        yield from self._engine.submit_sync(self._tokens(prompt), params or SamplingParams())

    def close(self) -> None:
        self._deployment.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _chat_tokens(self, messages: list[Message]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages)
        return self.tokenizer.encode(text, add_special=False)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _run_all(
    all_tokens: list[list[int]],
    submit: Callable[[list[int]], SyncStream],
    finish: Callable[[list[int], SyncStream], Result],
    *,
    progress: bool,
) -> list[Result]:
    """Submit as fast as the queue takes them, finish in order; an error cancels the rest."""
    results: list[Result] = []
    submitted: deque[tuple[list[int], SyncStream]] = deque()
    to_submit = deque(all_tokens)
    try:
        for _ in _tracked(len(all_tokens), progress):
            while to_submit:
                try:
                    submitted.append((to_submit[0], submit(to_submit[0])))
                except QueueFull:
                    if not submitted:
                        raise
                    break
                to_submit.popleft()
            results.append(finish(*submitted.popleft()))
    finally:
        for _, stream in submitted:
            stream.cancel()
    return results


def _tracked(total: int, progress: bool) -> Iterable[int]:
    """Count to `total`, with a progress bar on stderr when there is enough to wait for."""
    if not progress or total < _PROGRESS_FROM or not sys.stderr.isatty():
        return range(total)
    return _with_bar(total)


def _with_bar(total: int) -> Iterator[int]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(range(total), description="requests")
