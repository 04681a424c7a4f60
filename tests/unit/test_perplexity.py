"""Perplexity from known log-probabilities, and how a text is cut into windows."""

from __future__ import annotations

import math

import pytest
from cli_fakes import FakeLLM
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.evaluate.perplexity import (
    cut_windows,
    english_text,
    mean_nll,
    measure_perplexity,
    perplexity_of,
)


def test_perplexity_of_a_fair_choice_is_the_number_of_options() -> None:
    assert perplexity_of([math.log(1 / 8)] * 5) == pytest.approx(8)


def test_perplexity_is_the_geometric_mean_of_inverse_probabilities() -> None:
    probabilities = [0.5, 0.25, 0.125]
    expected = (1 / math.prod(probabilities)) ** (1 / 3)
    assert perplexity_of(math.log(p) for p in probabilities) == pytest.approx(expected)


def test_no_scores_no_perplexity() -> None:
    with pytest.raises(InvalidRequest, match="too short"):
        mean_nll([])


def test_windows_without_bos_lose_a_rest_of_one() -> None:
    assert cut_windows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]


def test_windows_with_bos_score_every_token() -> None:
    assert cut_windows([1, 2, 3, 4, 5], 3, bos=9) == [[9, 1, 2], [9, 3, 4], [9, 5]]


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least 2 tokens, got 1"):
        cut_windows([1, 2], 1)


@given(st.lists(st.integers()), st.integers(2, 40))
def test_windows_with_bos_hold_the_text_in_order(tokens: list[int], window: int) -> None:
    cut = cut_windows(tokens, window, bos=-1)
    assert [token for run in cut for token in run[1:]] == tokens
    assert all(run[0] == -1 and 2 <= len(run) <= window for run in cut)


def test_measured_over_all_windows() -> None:
    model = FakeLLM(log_p=-1.5)
    result = measure_perplexity(model, list(range(10)), window=4)
    assert result.mean_nll == pytest.approx(1.5)
    assert result.perplexity == pytest.approx(math.exp(1.5))
    assert (result.num_windows, result.num_tokens) == (3, 3 + 3 + 1)
    assert [prompt for prompt, _ in model.asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {(params.prompt_logprobs, params.max_tokens) for _, params in model.asked} == {(0, 1)}


def test_the_fixed_text_is_the_one_results_were_measured_with() -> None:
    text = english_text()
    assert len(text) > 12_000
    assert text.startswith("Alice was beginning to get very tired")
    assert text.endswith('However, everything is queer to-day."\n')
