"""What a draft model is asked for and keeps: its guesses are those of the whole text, always."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import EngineConfig
from shoal.errors import ConfigError
from shoal.messages import Chunk, ChunkResult, Plan, Sampling, StepResult
from shoal.schedule.foresight import GuessWanted
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker import draft_model
from shoal.worker.draft_model import DraftModel, check_draft_model

BLOCK = 4
VOCABULARY = 100


def next_token(context: list[int], sampling: Sampling) -> int:
    """Of an imaginary model: it depends on every token, on the seed and on what was said."""
    assert sampling.position == len(context)
    assert context[len(context) - len(sampling.output_history) :] == sampling.output_history
    return hash((tuple(context), sampling.seed)) % VOCABULARY


class Paged:
    """A worker that knows no more of a text than what its cache holds."""

    def __init__(self, *, num_blocks: int = 64, max_context: int = 10_000) -> None:
        self.num_blocks = num_blocks
        self.max_context = max_context
        self.slots = [-1] * (num_blocks * BLOCK)
        self.num_tokens: list[int] = []

    def execute(self, plan: Plan) -> StepResult:
        self.num_tokens.append(plan.num_tokens)
        results = [self._result(chunk) for chunk in plan.chunks]
        return StepResult(epoch=plan.epoch, step=plan.step, results=results)

    def _result(self, chunk: Chunk) -> ChunkResult:
        where = [block * BLOCK + i for block in chunk.block_ids for i in range(BLOCK)]
        stop = chunk.start + len(chunk.tokens)
        for slot, token in zip(where[chunk.start : stop], chunk.tokens, strict=True):
            self.slots[slot] = token
        context = [self.slots[slot] for slot in where[:stop]]
        token_ids = [next_token(context, chunk.sampling)] if chunk.sampling else []
        return ChunkResult(request_id=chunk.request_id, token_ids=token_ids)


def model(worker: Paged, *, vocab_size: int = VOCABULARY) -> DraftModel:
    return DraftModel(worker, block_size=BLOCK, vocab_size=vocab_size)  # type: ignore[arg-type]


def wanted(request_id: int, tokens: list[int], number: int, **sampling: Any) -> GuessWanted:
    how = Sampling(seed=request_id, position=len(tokens), **sampling)
    return GuessWanted(request_id=request_id, tokens=tokens, number=number, sampling=how)


def expected(each: GuessWanted) -> list[int]:
    tokens = each.tokens.copy()
    for _ in range(each.number):
        how = Sampling(seed=each.sampling.seed, position=len(tokens))
        tokens.append(next_token(tokens, how))
    return tokens[len(each.tokens) :]


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)),
            min_size=1,
            max_size=4,
            unique_by=lambda each: each[0],
        ),
        max_size=12,
    )
)
def test_guesses_are_those_of_the_whole_text(rounds: list[list[tuple[int, int, int]]]) -> None:
    """However much of the guesses before was right, and who else was asked about meanwhile."""
    worker = Paged()
    drafts = model(worker)
    texts = {request_id: [request_id + 1] * 3 for request_id in range(6)}
    for asked in rounds:
        questions = [wanted(request_id, texts[request_id], n) for request_id, n, _ in asked]
        guesses = drafts.guess(questions)
        for each, (request_id, _, num_right) in zip(questions, asked, strict=True):
            assert guesses[request_id] == expected(each)
            texts[request_id] = each.tokens + guesses[request_id][:num_right] + [num_right]


def test_only_what_is_new_is_computed() -> None:
    worker = Paged()
    drafts = model(worker)
    text = list(range(20))
    first = drafts.guess([wanted(0, text, 3)])[0]
    assert worker.num_tokens == [20, 1, 1]
    drafts.guess([wanted(0, [*text, *first, 99], 2)])  # all right: the last guess is new to it
    assert worker.num_tokens[3:] == [2, 1]
    drafts.guess([wanted(0, [*text, *first, 99, 98], 1)])  # none: it took a wrong one's place
    assert worker.num_tokens[5:] == [1]


def test_a_long_prompt_is_read_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_model, "_MOST_AT_ONCE", 8)
    worker = Paged()
    drafts = model(worker)
    questions = [wanted(0, list(range(20)), 2), wanted(1, [5, 6], 2)]
    assert [drafts.guess(questions)[0] for _ in range(2)] == [[], []]
    assert drafts.guess(questions) == {each.request_id: expected(each) for each in questions}
    assert max(worker.num_tokens) == 8 + 2


def test_texts_asked_about_longest_ago_give_way() -> None:
    worker = Paged(num_blocks=5)
    drafts = model(worker)
    texts = {request_id: [request_id] * 8 for request_id in range(4)}
    for request_id in (0, 1, 0, 2):
        question = wanted(request_id, texts[request_id], 1)
        assert drafts.guess([question])[request_id] == expected(question)
    worker.num_tokens.clear()
    drafts.guess([wanted(0, texts[0], 1)])
    drafts.guess([wanted(1, texts[1], 1)])
    assert worker.num_tokens == [1, 8], "the wrong text gave way"
    together = [wanted(request_id, texts[request_id], 1) for request_id in texts]
    guesses = drafts.guess(together)
    assert [len(guesses[each.request_id]) for each in together].count(0) == 2


def test_nothing_is_guessed_beyond_its_context_or_the_vocabulary() -> None:
    question = wanted(0, [1, 2, 3, 4, 5], 4)
    short = model(Paged(max_context=8)).guess([question])[0]
    assert short == expected(question)[:3]
    token = expected(question)[0]
    assert model(Paged(), vocab_size=token).guess([question]) == {0: []}


@pytest.mark.parametrize("name", ["gemma3-270m", "minilm-l6"])
def test_a_model_with_other_tokens_is_refused(name: str) -> None:
    config = EngineConfig(model="smollm2-135m", draft_model=name)
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    with pytest.raises(ConfigError, match="other tokens than smollm2-135m"):
        check_draft_model(config, tokenizer)
