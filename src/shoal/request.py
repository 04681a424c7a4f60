"""What a client asks for: sampling parameters and the request itself. Values, never changed."""

from __future__ import annotations

import math
from enum import Enum

import msgspec

from shoal.errors import InvalidRequest

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
MAX_SEED = 2**63 - 1
MAX_BIAS = 100.0


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to draw tokens; an out-of-range value raises `InvalidRequest` naming the parameter.

    temperature 0 is greedy. top_k 0 (or -1) and top_p 1 are off. `max_tokens=None` runs to the
    end of the context. `logit_bias` is added to the logits of the token ids it names, at most
    ±100 as in OpenAI's API. `logprobs=n` returns the n best alternatives besides the drawn token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("n", self.n, 1, MAX_SAMPLES)
        _in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _optional_in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _optional_in_range("seed", self.seed, -MAX_SEED, MAX_SEED)
        _optional_in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _optional_in_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        _check_stop_strings(self.stop)
        for token_id, bias in self.logit_bias.items():
            _in_range(f"logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether a penalty looks at the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to compute. A request for n samples becomes n of these in one `group`.

    `max_tokens` and `seed` are resolved: the engine fills them in on submission, so that a
    recovered request draws the tokens it would have drawn.
    """

    request_id: int
    prompt_tokens: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    """Lower is served first."""
    arrival_s: float = 0.0
    group: int | None = None
    """Samples of one prompt: those behind the first wait for its blocks and share them."""
    pooling: bool = False
    """Wants the sum of the last hidden states, not tokens; never split by a prefix hit."""
    splittable: bool = True
    """False when the whole prompt must run in one step (bidirectional encoders)."""
    emitted_tokens: list[int] = []
    """Of an earlier life, at another replica or under an earlier head: not drawn again."""


def _check_stop_strings(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"at most {MAX_STOP_STRINGS} stop strings, got {len(stop)}", param="stop"
        )
    for text in stop:
        if not text or len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {len(text)}", param="stop"
            )


def _optional_in_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        _in_range(name, value, low, high)


def _in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not inside:
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}], got {value}", param=name)
