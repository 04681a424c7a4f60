"""Questions of every kind whose answers must not change, whatever happens to the workers."""

from __future__ import annotations

import random

from msgspec import structs

from shoal.evaluate.answers import Asked
from shoal.evaluate.perplexity import english_text
from shoal.request import SamplingParams

LONG_PROMPT = "long prompt"

_SHORT_WORDS, _LONG_WORDS = 12, 220
_MAX_SEED = 2**31


def make_questions(number: int, *, max_tokens: int, seed: int) -> list[Asked]:
    """Different prompts, of all kinds in turn; the same for the same seed."""
    draw = random.Random(seed)
    words = english_text().split()
    return [_question(index, draw, words, max_tokens) for index in range(number)]


def _question(index: int, draw: random.Random, words: list[str], max_tokens: int) -> Asked:
    seed = draw.randrange(_MAX_SEED)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    drawn = SamplingParams(temperature=0.9, max_tokens=max_tokens, ignore_eos=True, seed=seed)

    def ask(kind: str, params: SamplingParams, *, stream: bool = True, long: bool = False) -> Asked:
        length = _LONG_WORDS if long else _SHORT_WORDS
        start = draw.randrange(len(words) - length)
        prompt = " ".join(words[start : start + length])
        return Asked(kind=kind, prompt=prompt, params=params, stream=stream)

    match index % 8:
        case 0:
            return ask("greedy", greedy)
        case 1:
            return ask("seeded", structs.replace(drawn, top_p=0.95, top_k=50))
        case 2:
            return ask(
                "two samples with log-probabilities", structs.replace(drawn, n=2, logprobs=2)
            )
        case 3:
            return ask("repetition penalty", structs.replace(greedy, repetition_penalty=1.2))
        case 4:
            penalties = structs.replace(drawn, presence_penalty=0.6, frequency_penalty=0.4)
            return ask("penalties, not streamed", penalties, stream=False)
        case 5:
            return ask(
                "stop string", structs.replace(greedy, stop=(". ", "\n\n"), ignore_eos=False)
            )
        case 6:
            return ask(LONG_PROMPT, structs.replace(greedy, logprobs=0), long=True)
        case _:
            scored = structs.replace(greedy, prompt_logprobs=1, logprobs=1)
            return ask("prompt's log-probabilities, not streamed", scored, stream=False)
