"""Rotations; the variants' frequencies are checked against transformers in tests/golden."""

from __future__ import annotations

import pytest
import torch

from shoal.compute import native
from shoal.models.rope import NativeRotaryEmbedding, RotaryEmbedding, inverse_frequencies
from shoal.models.rope_config import DefaultRope, FactorsRope, Llama3Rope, YarnRope

PLAIN = DefaultRope(theta=10_000.0)


def test_factors_that_state_llama3_scaling_give_its_frequencies():
    """What GGUF converters write into `rope_freqs.weight` for Llama 3."""
    llama3 = Llama3Rope(
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )
    expected_F, _ = inverse_frequencies(llama3, 64)
    plain_F, _ = inverse_frequencies(DefaultRope(theta=500_000.0), 64)
    factors = tuple((plain_F / expected_F).tolist())
    stated_F, scaling = inverse_frequencies(FactorsRope(theta=500_000.0, factors=factors), 64)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert scaling == 1.0
    assert torch.allclose(stated_F, expected_F, rtol=1e-6)


def test_scores_depend_only_on_the_distance():
    rotary = RotaryEmbedding(PLAIN, 16, torch.float64)
    q_D, k_D = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(q_position: int, k_position: int) -> float:
        turned = rotary([q_position, k_position])(torch.stack((q_D, k_D))[:, None])
        return float(turned[0, 0] @ turned[1, 0])

    assert abs(score(9, 4) - score(105, 100)) < 1e-5
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_position_zero_is_left_as_it_is():
    x_TJD = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = RotaryEmbedding(PLAIN, 16, torch.float32)([0])(x_TJD)
    assert torch.equal(turned, x_TJD)


@pytest.mark.skipif(not native.is_available(), reason="csrc was not built: no compiler")
def test_the_kernels_find_the_turns_that_torch_finds():
    rope = YarnRope(theta=10_000.0, factor=4.0, original_context=2048)
    positions = [0, 1, 17, 8191, 131_071]
    ours = NativeRotaryEmbedding(rope, 64)(positions)
    expected = RotaryEmbedding(rope, 64, torch.float32)(positions)
    assert expected.cos_T1D.amax() > 1.1, "not scaled"
    torch.testing.assert_close(ours.cos_T1D, expected.cos_T1D, atol=2e-7, rtol=0)
    torch.testing.assert_close(ours.sin_T1D, expected.sin_T1D, atol=2e-7, rtol=0)
