"""An engine that says what a test scripts, and a byte-level tokenizer, for the server's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

from shoal.engine.api import Delta, EngineStats, Health, ModelInfo
from shoal.errors import ContextTooLong, InvalidRequest, UnsupportedByModel
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason, SamplingParams
from shoal.server.app import create_app
from shoal.server.run import bind, make_server, url_of

MODEL = "fake/model"
EOS = 256
CONTEXT = 200


class ByteTokenizer:
    """Token i is byte i; 256 is special and ends a text."""

    vocab_size = 257
    eos_ids = frozenset({EOS})
    has_chat_template = True

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        del add_special
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        kept = [i for i in ids if i != EOS]
        tail = "" if skip_special else "<eos>" * (len(ids) - len(kept))
        return bytes(kept).decode(errors="replace") + tail

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        if messages[-1]["content"] == "refuse me":
            raise InvalidRequest("the template refuses", param="messages")
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        mood = f"[{variables['mood']}]" if "mood" in variables else ""
        return text + mood + ("<assistant>" if add_generation_prompt else "")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<eos>" if token_id == EOS else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")


class FakeStream:
    def __init__(self, deltas: list[Delta | Exception], engine: FakeEngine) -> None:
        self._deltas = deltas
        self._engine = engine
        self.cancelled = False
        self.num_read = 0

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for delta in self._deltas:
            await asyncio.sleep(self._engine.delay_s)
            if isinstance(delta, Exception):
                raise delta
            self.num_read += 1
            yield delta

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """Sample i of a prompt says `answers[i % len(answers)]`, one character a step.

    `refusals` maps the number of a submission to what it raises; `breaks` is raised by streams
    after their first character. Log-probabilities are -0.5 for sample 0, -0.25 for sample 1 and
    so on, halved each time, so that later samples are better.
    """

    def __init__(self, *answers: str, can_generate: bool = True) -> None:
        self.answers = answers or ("Hallo",)
        self.tokenizer: Any = ByteTokenizer()
        self.info = ModelInfo(
            name=MODEL,
            max_context=CONTEXT,
            vocab_size=257,
            can_generate=can_generate,
            created_s=1_700_000_000,
            description="a fake",
        )
        self.delay_s = 0.0
        self.refusals: dict[int, Exception] = {}
        self.breaks: Exception | None = None
        self.embed_error: Exception | None = None
        self.streams: list[FakeStream] = []
        self.submitted: list[tuple[list[int], SamplingParams, int]] = []
        self.embeds_cancelled = 0
        self.state = Health(reason="", since_progress_s=0.5)

    def submit(
        self,
        prompt_tokens: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        emitted: Sequence[list[int] | None] = (),
    ) -> FakeStream:
        number = len(self.submitted)
        self.submitted.append((prompt_tokens, params, priority))
        if number in self.refusals:
            raise self.refusals[number]
        self._check(prompt_tokens)
        stream = FakeStream(list(self._script(prompt_tokens, params, emitted)), self)
        self.streams.append(stream)
        return stream

    async def embed(self, prompt_tokens: list[int], *, priority: int = 0) -> list[float]:
        del priority
        if self.embed_error is not None and prompt_tokens == [0]:
            raise self.embed_error
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.embeds_cancelled += 1
            raise
        return [len(prompt_tokens), 0.1, -2.5]

    def stats(self) -> EngineStats:
        return EngineStats(num_waiting=3, num_running=2, num_blocks=10, num_used_blocks=4, steps=7)

    def health(self) -> Health:
        return self.state

    def _check(self, prompt_tokens: list[int]) -> None:
        if not self.info.can_generate:
            raise UnsupportedByModel("an encoder cannot generate")
        if not all(0 <= token_id < 257 for token_id in prompt_tokens):
            raise InvalidRequest("a token id is outside the vocabulary", param="prompt")
        if len(prompt_tokens) >= CONTEXT:
            raise ContextTooLong(
                f"the prompt has {len(prompt_tokens)} tokens and the context {CONTEXT}",
                param="prompt",
            )

    def _script(
        self,
        prompt: list[int],
        params: SamplingParams,
        emitted: Sequence[list[int] | None],
    ) -> Iterator[Delta | Exception]:
        for index in range(params.n):
            said = emitted[index] if emitted else []
            if said is None:
                continue
            token_ids = list(self.answers[index % len(self.answers)].encode())
            limit = params.max_tokens or CONTEXT
            cut = len(token_ids) > limit
            token_ids = token_ids[:limit]
            for position, token_id in list(enumerate(token_ids))[len(said) :]:
                last = position == len(token_ids) - 1
                yield Delta(
                    index=index,
                    text=chr(token_id),
                    token_ids=[token_id],
                    logprobs=_scores(token_id, params.logprobs, -(0.5 ** (index + 1))),
                    finish_reason=(FinishReason.LENGTH if cut else FinishReason.STOP)
                    if last
                    else None,
                    stop_match=EOS if last and not cut else None,
                    prompt_logprobs=_prompt_scores(prompt, params)
                    if (index, position) == (0, 0)
                    else None,
                    num_cached_tokens=1 if (index, position) == (0, 0) else 0,
                )
                if self.breaks is not None:
                    yield self.breaks


def _scores(token_id: int, num: int | None, logprob: float) -> list[TokenLogprobs] | None:
    if num is None:
        return None
    others = [token_id, 65, 66, 67, 68][:num]
    return [TokenLogprobs(logprob, others, [logprob - rank for rank in range(len(others))])]


def _prompt_scores(prompt: list[int], params: SamplingParams) -> list[TokenLogprobs] | None:
    if params.prompt_logprobs is None:
        return None
    return [
        TokenLogprobs(float("-inf") if token_id == ord("!") else -1.0, [88], [-0.125])
        for token_id in prompt[1:]
    ]


@contextmanager
def running_server(engine: Any, **settings: Any) -> Iterator[str]:
    """The app in uvicorn in a thread, on a free port; gives its URL."""
    listener = bind("127.0.0.1", 0)
    server = make_server(create_app(engine, **settings), grace_s=5)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
