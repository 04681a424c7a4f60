"""Whether a model that was divided, or lost workers, has answered as it does otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shoal.engine.outputs import RequestOutput
from shoal.messages import TokenLogprobs


def same_answers(
    expected: Sequence[RequestOutput], got: Sequence[RequestOutput], *, within: float = 1e-3
) -> None:
    """All but what was cached; log-probabilities may differ by `within`."""
    for whole_output, output in zip(expected, got, strict=True):
        for calm_sample, sample in zip(whole_output.samples, output.samples, strict=True):
            assert sample.token_ids == calm_sample.token_ids, difference(whole_output, output)
            assert sample.text == calm_sample.text
            assert sample.finish_reason is calm_sample.finish_reason
            assert sample.stop_match == calm_sample.stop_match
            same_logprobs(calm_sample.logprobs, sample.logprobs, within)
        same_logprobs(whole_output.prompt_logprobs, output.prompt_logprobs, within)


def same_logprobs(
    expected: Sequence[TokenLogprobs] | None, got: Sequence[TokenLogprobs] | None, within: float
) -> None:
    assert (expected is None) == (got is None)
    for whole_entry, entry in zip(expected or [], got or [], strict=True):
        assert entry.logprob == pytest.approx(whole_entry.logprob, abs=within)
        assert entry.top_logprobs == pytest.approx(whole_entry.top_logprobs, abs=within)
        assert entry.top_ids == whole_entry.top_ids


def leads(output: RequestOutput) -> list[float]:
    """By how much the best token led the second best, step by step."""
    entries = output.samples[0].logprobs or []
    return [entry.top_logprobs[0] - entry.top_logprobs[1] for entry in entries]


def difference(expected: RequestOutput, got: RequestOutput) -> str:
    """Where the first sample's texts part, and how clear the choice was there."""
    pairs = zip(expected.samples[0].token_ids, got.samples[0].token_ids, strict=False)
    step = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if step is None:
        return "another sample, or the length, differs"
    told = leads(expected)
    lead = f"{told[step]:.1e}" if told else "unknown"
    return f"{expected.text!r} became {got.text!r} at step {step}, where the lead was {lead}"
