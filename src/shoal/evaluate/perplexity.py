"""How well a model predicts a text: exp of the mean negative log-likelihood per token.

The fixed text, `english.txt`, is from chapters I and II of Lewis Carroll's "Alice's Adventures in
Wonderland" (1865, public domain), slightly shortened, in English spelling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Protocol

import msgspec

from shoal.errors import InvalidRequest
from shoal.messages import TokenLogprobs
from shoal.request import SamplingParams


class Scored(Protocol):
    """The part of a finished request that holds its prompt's log-probabilities."""

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None: ...


class Scorer(Protocol):
    """The part of `shoal.LLM` that scores prompts."""

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, progress: bool = True
    ) -> Sequence[Scored]: ...


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """`mean_nll` is in nats per token; `num_tokens` counts the tokens that were scored."""

    perplexity: float
    mean_nll: float
    num_tokens: int
    num_windows: int
    elapsed_s: float


def english_text() -> str:
    """The fixed text, about 17 000 characters."""
    return files("shoal.evaluate").joinpath("english.txt").read_text(encoding="utf-8")


def cut_windows(tokens: Sequence[int], window: int, *, bos: int | None = None) -> list[list[int]]:
    """Cut `tokens` into runs of `window` tokens that do not overlap; drop a rest of one token.

    With `bos` each window begins with it, as the model saw it in training, and every token of
    the text is scored; without, the first token of each window is context only.
    """
    if window < 2:
        raise InvalidRequest(f"a window needs at least 2 tokens, got {window}", param="window")
    head = [] if bos is None else [bos]
    step = window - len(head)
    cut = [head + list(tokens[start : start + step]) for start in range(0, len(tokens), step)]
    return [run for run in cut if len(run) > 1]


def perplexity_of(logprobs: Iterable[float]) -> float:
    """exp(−mean) of natural-log probabilities. Raises InvalidRequest when there are none."""
    return math.exp(mean_nll(list(logprobs)))


def mean_nll(logprobs: Sequence[float]) -> float:
    """The mean negative log-likelihood in nats; summed exactly, so order does not matter."""
    if not logprobs:
        raise InvalidRequest("the text is too short: no token has a predecessor to predict it from")
    return -math.fsum(logprobs) / len(logprobs)


def measure_perplexity(
    model: Scorer,
    tokens: Sequence[int],
    *,
    window: int = 512,
    bos: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Score `tokens` in windows, each on its own."""
    windows = cut_windows(tokens, window, bos=bos)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    start_s = time.perf_counter()
    outputs = model.generate(windows, params, progress=progress)
    elapsed_s = time.perf_counter() - start_s
    logprobs = [entry.logprob for output in outputs for entry in output.prompt_logprobs or []]
    nll = mean_nll(logprobs)
    return Perplexity(
        perplexity=math.exp(nll),
        mean_nll=nll,
        num_tokens=len(logprobs),
        num_windows=len(windows),
        elapsed_s=elapsed_s,
    )
