"""A request that goes on after any of its tokens, elsewhere, says the rest of the calm run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tiny_tokenizers import byte_level

from shoal.engine.api import Delta, ModelInfo
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.errors import InternalError, InvalidRequest
from shoal.messages import Chunk, ChunkResult, Plan, StepResult, TokenLogprobs
from shoal.request import FinishReason, SamplingParams
from shoal.schedule.scheduler import Scheduler
from shoal.weights.tokenizer import SpecialTokens, Tokenizer

BACKEND = byte_level()
END = BACKEND.token_to_id("<|im_end|>")
SPELLED = ["h", "e", "l", "o", "hello", "Ã", "©", "Ġ"]
LETTERS = [i for i in map(BACKEND.token_to_id, SPELLED) if i is not None] + [END]
PROMPT = [LETTERS[i % 3] for i in range(11)]


class Drawing:
    """Tokens depend on all that they should: seed, position, the token before, what was said."""

    max_in_flight = 1
    wants_restart = False

    def watch(self, wake: Callable[[], None]) -> None:
        pass

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.num_computed = 0

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)

    def collect(self) -> StepResult:
        plan = self.plans.pop(0)
        self.num_computed += plan.num_tokens
        results = [self._result(chunk) for chunk in plan.chunks]
        return StepResult(epoch=plan.epoch, step=plan.step, results=results)

    def _result(self, chunk: Chunk) -> ChunkResult:
        scores = [TokenLogprobs(-float(token), [], []) for token in chunk.score_targets]
        asked = chunk.sampling
        if asked is None:
            return ChunkResult(request_id=chunk.request_id, prompt_logprobs=scores)
        said = (asked.seed, asked.position, chunk.tokens[-1], *asked.output_history)
        chance = random.Random(repr(said))
        token_id = chance.choice([i for i in LETTERS if i not in asked.banned_ids])
        return ChunkResult(
            request_id=chunk.request_id,
            token_ids=[token_id],
            logprobs=[] if asked.num_logprobs is None else [TokenLogprobs(-0.5, [token_id], [])],
            prompt_logprobs=scores,
        )

    def workers(self) -> list[Any]:
        return []


def make_engine(executor: Drawing, *, max_context: int = 64) -> Engine:
    scheduler = Scheduler(
        num_blocks=64,
        block_size=4,
        max_context=max_context,
        max_step_tokens=8,
        max_running=8,
        max_waiting=16,
    )
    info = ModelInfo(
        name="drawing",
        max_context=max_context,
        vocab_size=len(BACKEND.get_vocab()),
        can_generate=True,
        created_s=0,
        description="",
    )
    tokenizer = Tokenizer(BACKEND, SpecialTokens(eos_ids=frozenset({END})))
    carrier: Executor = executor  # type: ignore[assignment]
    return Engine(scheduler, carrier, tokenizer, info)


def run(
    params: SamplingParams,
    emitted: Sequence[list[int] | None] = (),
    *,
    executor: Drawing | None = None,
) -> list[Delta]:
    engine = make_engine(executor or Drawing())
    items: list[Any] = []
    engine.submit(PROMPT, params, items.append, seed=params.seed or 0, emitted=emitted)
    for _ in range(200):
        if items and items[-1] is None:
            return items[:-1]
        engine._advance()
    raise AssertionError("no end in sight")


def so_far(deltas: list[Delta], num_samples: int) -> list[list[int] | None]:
    emitted: list[list[int] | None] = [[] for _ in range(num_samples)]
    for delta in deltas:
        emitted[delta.index] = [*(emitted[delta.index] or []), *delta.token_ids]
        if delta.finish_reason is not None:
            emitted[delta.index] = None
    return emitted


def by_sample(deltas: list[Delta], num_samples: int) -> list[list[Delta]]:
    return [[delta for delta in deltas if delta.index == i] for i in range(num_samples)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_eos": True},
        {"stop": ("lo", "eé", "hellohello")},
        {"n": 3, "logprobs": 1, "prompt_logprobs": 0},
        {"repetition_penalty": 1.2, "min_tokens": 9, "n": 2},
        {"stop_token_ids": (LETTERS[3],), "min_tokens": 2},
        {"prompt_logprobs": 0, "skip_special_tokens": False},
        {"stop": ("o h",), "min_tokens": 5, "presence_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(6))
def test_resumed_after_any_token_it_says_the_rest_of_the_calm_run(
    options: dict[str, Any], seed: int
) -> None:
    params = SamplingParams(**{"max_tokens": 16, "seed": seed, **options})
    calm = run(params)
    for cut in range(len(calm) + 1):
        emitted = so_far(calm[:cut], params.n)
        rest = run(params, emitted)
        assert by_sample(rest, params.n) == by_sample(calm[cut:], params.n)


def test_what_has_ended_is_not_computed() -> None:
    executor = Drawing()
    assert run(SamplingParams(n=2, seed=1), [None, None], executor=executor) == []
    assert executor.num_computed == 0


@pytest.mark.parametrize(
    ("options", "emitted", "end"),
    [
        ({"max_tokens": 2}, LETTERS[:2], Delta(index=0, finish_reason=FinishReason.LENGTH)),
        ({}, [LETTERS[0], END], Delta(index=0, finish_reason=FinishReason.STOP)),
        (
            {"stop_token_ids": (LETTERS[1],)},
            LETTERS[:2],
            Delta(index=0, finish_reason=FinishReason.STOP, stop_match=LETTERS[1]),
        ),
        (
            {"stop": ("he",)},
            LETTERS[:2],
            Delta(index=0, finish_reason=FinishReason.STOP, stop_match="he"),
        ),
        (
            {"stop": ("hex",), "max_tokens": 2},
            LETTERS[:2],
            Delta(index=0, text="he", finish_reason=FinishReason.LENGTH),
        ),
    ],
    ids=str,
)
def test_tokens_that_reach_the_end_need_only_the_word_that_it_is_the_end(
    options: dict[str, Any], emitted: list[int], end: Delta
) -> None:
    executor = Drawing()
    params = SamplingParams(seed=1, **options)
    assert run(params, [emitted], executor=executor) == [end]
    assert executor.num_computed == 0


def test_emitted_tokens_must_be_of_this_request_and_this_model() -> None:
    engine = make_engine(Drawing())
    with pytest.raises(InternalError, match="2 samples"):
        engine.submit(PROMPT, SamplingParams(max_tokens=1), print, seed=1, emitted=[[], []])
    with pytest.raises(InvalidRequest, match="token 9999"):
        engine.submit(PROMPT, SamplingParams(), print, seed=1, emitted=[[9999]])


def test_usage_of_the_cache_counts_prompt_tokens_only() -> None:
    engine = make_engine(Drawing())
    items: list[Any] = []
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.submit(PROMPT, params, items.append, seed=3)
    while not items or items[-1] is not None:
        engine._advance()
    emitted = [token for delta in items[:-1] for token in delta.token_ids]
    engine.submit(PROMPT, params, print, seed=3, emitted=[emitted[:7]])
    engine._advance()
    assert engine.stats().prefix_hit_tokens == len(PROMPT)
