"""The native draws against those by torch, and each row against itself in other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from each_isa import isa, kernels  # noqa: F401  # a fixture is used by its name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.compute import sampler
from shoal.compute.sampler import sample, token_logprobs
from shoal.messages import Sampling, TokenLogprobs

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-4},
    {"temperature": 1e-30, "top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**9},
    {"top_p": 1e-6},
    {"top_p": 0.9},
    {"top_p": 0.9999999},
    {"top_p": 0.5, "min_p": 0.3},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1500, "top_p": 0.7, "temperature": 50.0},
]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def by_torch(logits_NV: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "can_sample", lambda _: False)
        return sample(logits_NV.clone(), samplings)


def scores_by_torch(
    logits_NV: torch.Tensor, rows: list[int], targets: list[int], num_top: list[int]
) -> list[TokenLogprobs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "can_sample", lambda _: False)
        return token_logprobs(logits_NV, rows, targets, num_top)


def rows_of(rng: torch.Generator, number: int, vocabulary: int, width: float) -> torch.Tensor:
    """Some with tokens that are banned, some with tokens that tie."""
    logits_NV = torch.randn(number, vocabulary, generator=rng) * width
    logits_NV[::3, ::7] = -torch.inf
    logits_NV[1::3, : vocabulary // 2] = logits_NV[1::3, :1].clone()
    return logits_NV


@pytest.mark.parametrize("width", [0.1, 1.0, 4.0, 20.0], ids=["flat", "wide", "usual", "peaked"])
@pytest.mark.parametrize("vocabulary", [5, 8, 1000, 3001])
def test_the_kernels_draw_what_torch_draws(
    rng: torch.Generator, vocabulary: int, width: float
) -> None:
    number = 12 * len(OPTIONS)
    logits_NV = rows_of(rng, number, vocabulary, width)
    samplings = [
        Sampling(seed=5, position=row, **{"temperature": 0.9, **OPTIONS[row % len(OPTIONS)]})
        for row in range(number)
    ]
    assert sample(logits_NV.clone(), samplings) == by_torch(logits_NV, samplings)


def test_unlikely_tokens_race_as_one_and_then_among_themselves(rng: torch.Generator) -> None:
    """Of a vocabulary so large that no token is likely; half of them are below min-p, if it is."""
    logits_1V = torch.randn(1, 150_001, generator=rng).clamp(-0.1, 0.1)
    for min_p in (0.0, 0.95):
        samplings = [Sampling(seed=3, position=position, min_p=min_p) for position in range(8)]
        drawn = sample(logits_1V.expand(8, -1), samplings)
        assert drawn == by_torch(logits_1V.expand(8, -1), samplings)
        assert len(set(drawn)) == 8


def test_rows_may_be_a_part_of_wider_ones(rng: torch.Generator) -> None:
    wide_NW = torch.randn(5, 1013, generator=rng) * 3
    logits_NV = wide_NW[1:4, 3:1000]
    samplings = [Sampling(seed=1, position=row, top_p=0.8) for row in range(3)]
    assert sample(logits_NV, samplings) == by_torch(logits_NV, samplings)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.3}], ids=str)
@pytest.mark.parametrize("none", [torch.nan, -torch.inf], ids=str)
def test_a_row_that_is_no_distribution_draws_token_0(none: float, options: dict[str, Any]) -> None:
    logits_NV = torch.full((2, 500), none)
    if none != none:
        logits_NV[0, 1:] = torch.linspace(0.0, 5.0, 499)
    samplings = [Sampling(seed=1, position=2, **options)] * 2
    assert sample(logits_NV, samplings) == by_torch(logits_NV, samplings) == [0, 0]


def test_the_best_is_the_first_of_equals_and_may_be_infinite(rng: torch.Generator) -> None:
    logits_NV = torch.randn(4, 1003, generator=rng)
    logits_NV[0, [130, 127, 900]] = 9.0
    logits_NV[1, 1002] = torch.inf
    logits_NV[2] = -torch.inf
    logits_NV[3, 5] = torch.nan
    samplings = [Sampling(temperature=0.0, seed=1, position=2)] * 4
    assert sample(logits_NV, samplings) == [127, 1002, 0, 0]
    assert by_torch(logits_NV[:3], samplings[:3]) == [127, 1002, 0]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 700),
    chosen=st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
)
def test_a_draw_does_not_depend_on_its_company(
    seed: int, vocabulary: int, chosen: list[dict[str, Any]], order: Any
) -> None:
    noise = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(len(chosen), vocabulary, generator=noise) * 3
    samplings = [Sampling(seed=seed, position=i, **each) for i, each in enumerate(chosen)]
    alone = [sample(logits_NV[i : i + 1], [samplings[i]])[0] for i in range(len(chosen))]
    places = list(range(len(chosen)))
    order.shuffle(places)
    together = sample(logits_NV[places], [samplings[place] for place in places])
    assert together == [alone[place] for place in places]


def test_log_probabilities_are_those_of_torch(rng: torch.Generator) -> None:
    logits_NV = torch.randn(7, 1003, generator=rng) * 4
    logits_NV[2, ::3] = -torch.inf
    rows = [0, 1, 2, 3, 6, 5, 2]
    targets, num_top = [0, 1002, 3, 4, 5, 500, 7], [0, 1, 5, 20, 3, 1003, 2]
    pairs = zip(
        token_logprobs(logits_NV, rows, targets, num_top),
        scores_by_torch(logits_NV, rows, targets, num_top),
        strict=True,
    )
    for score, expected in pairs:
        assert score.logprob == pytest.approx(expected.logprob, rel=1e-6, abs=2e-6)
        assert score.top_ids == expected.top_ids
        assert score.top_logprobs == pytest.approx(expected.top_logprobs, rel=1e-6, abs=2e-6)


def test_log_probabilities_of_no_distribution_are_no_numbers() -> None:
    [score] = token_logprobs(torch.full((1, 50), torch.nan), [0], [3], [2])
    assert score.logprob != score.logprob
    assert len(score.top_ids) == 2
    assert all(value != value for value in score.top_logprobs)


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match="vocabulary"):
        token_logprobs(torch.zeros(1, 50), [0], [50], [0])
