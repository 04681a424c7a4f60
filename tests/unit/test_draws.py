"""What a step draws for its chunks, and the scores that go with it."""

from __future__ import annotations

import pytest
import torch

from shoal.messages import Chunk, Sampling
from shoal.worker.batch import Batch
from shoal.worker.draws import Draws


def chunk_of(request_id: int, sampling: Sampling) -> Chunk:
    return Chunk(request_id=request_id, start=0, tokens=[1], block_ids=[0], sampling=sampling)


def test_scores_are_the_models_own_whatever_a_request_changes_in_its_logits() -> None:
    logits_NV = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).repeat(3, 1)
    expected = logits_NV[0].log_softmax(0).tolist()
    plain = Sampling(seed=0, position=1, temperature=0.0, num_logprobs=2)
    banned = Sampling(seed=0, position=1, temperature=0.0, num_logprobs=1, banned_ids=(2,))
    unscored = Sampling(seed=0, position=1, temperature=0.0, logit_bias={0: 9.0})
    chunks = [chunk_of(number, each) for number, each in enumerate((plain, banned, unscored))]
    draws = Draws(Batch(chunks, 16))
    draws.draw(logits_NV)
    (tokens, [score]), (other_tokens, [other]), unscored_draw = map(draws.of, chunks)
    assert (tokens, other_tokens, unscored_draw) == ([2], [3], ([0], []))
    assert score.top_ids == [2, 3]
    assert score.top_logprobs == pytest.approx([expected[2], expected[3]])
    assert (score.logprob, other.logprob) == pytest.approx((expected[2], expected[3]))
    assert other.top_ids == [2]
