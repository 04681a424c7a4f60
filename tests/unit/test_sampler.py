"""The sampler: distributions, truncation, penalties, and randomness from (seed, position) alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from shoal.compute import native, sampler
from shoal.compute.race import LIKELY, draw_key, exponentials
from shoal.compute.sampler import sample, sample_seed, token_logprobs
from shoal.messages import Sampling

VOCAB = 200


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(sampler, "can_sample", lambda _: False)
    elif not native.is_available():
        pytest.skip("csrc was not built: no compiler")
    yield request.param


@pytest.fixture
def logits_V() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def draws(logits_V: torch.Tensor, number: int, **options: object) -> Counter[int]:
    samplings = [Sampling(seed=11, position=i, **options) for i in range(number)]  # type: ignore[arg-type]
    return Counter(sample(logits_V.repeat(number, 1), samplings))


def best_ids(logits_V: torch.Tensor, number: int) -> list[int]:
    ids: list[int] = logits_V.topk(number).indices.tolist()
    return ids


def test_arrivals_are_exponential_and_depend_on_seed_position_and_token() -> None:
    ids = torch.arange(10)
    keys = [draw_key(seed, position) for seed in range(40) for position in range(25)]
    numbers = torch.cat([exponentials(ids, torch.tensor(key >> 1)) for key in keys])
    assert len(set(numbers.tolist())) == 10_000
    assert float(numbers.min()) > 0.0
    buckets = Counter(((1 - (-numbers).exp()) * 10).long().tolist())
    assert all(abs(count - 1000) < 150 for count in buckets.values())


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """They race as one at first: half of what there is here, none of them likely."""
    probs_V = torch.full((100_001,), 0.5 / 100_000)
    probs_V[7] = 0.5
    assert float(probs_V[0]) < LIKELY
    logits_1V = probs_V.log().unsqueeze(0)
    drawn = [sample(logits_1V, [Sampling(seed=5, position=i)])[0] for i in range(300)]
    assert 100 < drawn.count(7) < 200
    assert len(set(drawn)) > 100


def test_rounding_moves_hardly_any_draw() -> None:
    """As a computation in another batch rounds; inverting a running sum moves one in a hundred."""
    noise = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(4000, VOCAB, generator=noise) * 2
    near_NV = logits_NV + 1e-5 * torch.randn(4000, VOCAB, generator=noise)
    for options in ({}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}):
        samplings = [Sampling(seed=3, position=i, **options) for i in range(4000)]  # type: ignore[arg-type]
        pairs = zip(
            sample(logits_NV.clone(), samplings), sample(near_NV.clone(), samplings), strict=True
        )
        assert sum(one != other for one, other in pairs) <= 2


def test_samples_of_one_request_have_seeds_of_their_own() -> None:
    assert sample_seed(5, 0) == 5
    assert len({sample_seed(5, index) for index in range(100)}) == 100


def test_draws_follow_the_distribution(logits_V: torch.Tensor) -> None:
    counts = draws(logits_V, 20_000)
    probs = logits_V.softmax(0).tolist()
    for token in best_ids(logits_V, 5):
        deviation = math.sqrt(probs[token] * (1 - probs[token]) / 20_000)
        assert abs(counts[token] / 20_000 - probs[token]) < 5 * deviation


def test_top_k_and_top_p_and_min_p_keep_exactly_the_right_tokens(logits_V: torch.Tensor) -> None:
    assert set(draws(logits_V, 4000, top_k=3)) == set(best_ids(logits_V, 3))
    assert set(draws(logits_V, 100, top_k=1)) == set(best_ids(logits_V, 1))
    probs = logits_V.softmax(0).sort(descending=True).values
    nucleus = int((probs.cumsum(0) < 0.5).sum()) + 1
    assert set(draws(logits_V, 8000, top_p=0.5)) == set(best_ids(logits_V, nucleus))
    kept = int((probs >= 0.3 * probs[0]).sum())
    assert set(draws(logits_V, 8000, min_p=0.3)) == set(best_ids(logits_V, kept))
    assert set(draws(logits_V, 8000, min_p=0.3, top_k=50)) == set(best_ids(logits_V, kept))
    assert draws(logits_V, 500, top_k=-1, top_p=0.5) == draws(logits_V, 500, top_p=0.5)
    assert set(draws(logits_V, 50, top_p=1e-6)) == set(best_ids(logits_V, 1))


def test_top_p_counts_within_top_k(logits_V: torch.Tensor) -> None:
    probs = logits_V.softmax(0).sort(descending=True).values[:10]
    nucleus = int(((probs / probs.sum()).cumsum(0) < 0.6).sum()) + 1
    assert set(draws(logits_V, 4000, top_k=10, top_p=0.6)) == set(best_ids(logits_V, nucleus))


def test_top_p_counts_within_a_top_k_that_is_more_than_the_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 10)
    even_V = torch.linspace(0.0, -0.01, VOCAB)
    assert len(draws(even_V, 2000, top_k=100, top_p=0.04)) == 4


def test_a_flat_distribution_takes_the_slow_road_to_the_same_tokens(
    logits_V: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = draws(logits_V, 500, top_p=0.9, temperature=3.0)
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 4)
    assert draws(logits_V, 500, top_p=0.9, temperature=3.0) == fast


def test_a_draw_does_not_depend_on_its_neighbours(logits_V: torch.Tensor) -> None:
    mixed = [
        Sampling(seed=1, position=9),
        Sampling(seed=1, position=9, top_k=7),
        Sampling(seed=2, position=4, top_p=0.8, temperature=1.7),
        Sampling(seed=3, position=4, temperature=0.0),
        Sampling(seed=4, position=4, min_p=0.1),
    ]
    together = sample(logits_V.repeat(5, 1), mixed)
    alone = [sample(logits_V.repeat(1, 1), [sampling])[0] for sampling in mixed]
    assert together == alone


def test_zero_and_tiny_temperatures_are_greedy(logits_V: torch.Tensor) -> None:
    assert set(draws(logits_V, 20, temperature=0.0)) == set(best_ids(logits_V, 1))
    assert set(draws(logits_V, 20, temperature=1e-30)) == set(best_ids(logits_V, 1))


def test_penalties_bias_and_bans(logits_V: torch.Tensor) -> None:
    first, second, third = best_ids(logits_V, 3)
    greedy = {"temperature": 0.0}
    assert set(draws(logits_V, 1, **greedy, banned_ids=(first,))) == {second}
    assert set(draws(logits_V, 1, **greedy, logit_bias={third: 100.0})) == {third}
    assert set(draws(logits_V, 1, **greedy, output_history=[first], presence_penalty=2.0))
    repeated = {"output_history": [first] * 50, "frequency_penalty": 2.0}
    assert set(draws(logits_V, 1, **greedy, **repeated)) == {second}
    prompted = {"prompt_history": [first, second], "repetition_penalty": 50.0}
    assert set(draws(logits_V, 1, **greedy, **prompted)) == {third}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    """Once, however often a token came."""
    logits_NV = torch.tensor([[2.0, -1.0, 0.5]])
    histories = {"prompt_history": [0, 1, 0], "output_history": [1, 0]}
    sample(logits_NV, [Sampling(seed=0, position=0, repetition_penalty=2.0, **histories)])
    assert logits_NV.tolist() == [[1.0, -2.0, 0.5]]


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits_NV = torch.zeros(1, 4)
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    sample(logits_NV, [Sampling(seed=0, position=0, output_history=[2, 0, 2, 2], **penalties)])
    assert logits_NV.tolist() == [[-0.75, 0.0, -1.25, 0.0]]


def test_logprobs_are_the_models_own(logits_V: torch.Tensor) -> None:
    expected = logits_V.log_softmax(0)
    scores = token_logprobs(logits_V.repeat(3, 1), [0, 2], [5, 6], [0, 3])
    assert scores[0].logprob == pytest.approx(float(expected[5]))
    assert scores[0].top_ids == []
    assert scores[1].top_ids == best_ids(logits_V, 3)
    assert scores[1].top_logprobs == pytest.approx(expected.topk(3).values.tolist())


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_tiny_repetition_penalty_draws_the_best_of_what_was_seen(
    logits_V: torch.Tensor, options: dict[str, float]
) -> None:
    logits_V[:4] = torch.tensor([2.0, -1.0, -2.0, -3.0])
    drawn = draws(logits_V, 3, repetition_penalty=1e-300, prompt_history=[0, 1, 2, 3], **options)
    assert set(drawn) == {0}
