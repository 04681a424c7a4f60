"""Rotary position embeddings: the angles of one step, and turning queries and keys by them.

Angles are computed once per step, not looked up: next to the layers' matrices they cost nothing,
and there is no table to size, grow or send to a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shoal.compute import native
from shoal.models.rope_config import (
    DefaultRope,
    FactorsRope,
    LinearRope,
    Llama3Rope,
    Rope,
    YarnRope,
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The turn of each token of one step, for every layer with the same rope.

    cos_T1D, sin_T1D: the first half of sin is negated, so that turning needs no negation.
    """

    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor

    def __call__(self, x_TJD: torch.Tensor) -> torch.Tensor:
        """Turned heads [T, J, D]; element i pairs with element i + D/2, as in the checkpoints.

        `x` may be turned where it lies.
        """
        if native.can_rotate(x_TJD):
            native.rotate(x_TJD, self.cos_T1D, self.sin_T1D)
            return x_TJD
        swapped_TJD = x_TJD.roll(x_TJD.shape[-1] // 2, -1)
        return torch.addcmul(x_TJD * self.cos_T1D, swapped_TJD, self.sin_T1D)


class RotaryEmbedding:
    def __init__(self, rope: Rope, head_dim: int, dtype: torch.dtype) -> None:
        inv_freq_F, self._scaling = inverse_frequencies(rope, head_dim)
        # cos is even and sin is odd: negative frequencies negate the first half of sin only.
        self._signed_freq_D = torch.cat((-inv_freq_F, inv_freq_F))
        self._dtype = dtype

    def __call__(self, positions: list[int]) -> Rotation:
        positions_T = torch.tensor(positions, device=self._signed_freq_D.device)
        angles_T1D = positions_T.float().view(-1, 1, 1) * self._signed_freq_D
        cos_T1D, sin_T1D = angles_T1D.cos(), angles_T1D.sin()
        if self._scaling != 1.0:
            cos_T1D, sin_T1D = cos_T1D * self._scaling, sin_T1D * self._scaling
        return Rotation(cos_T1D.to(self._dtype), sin_T1D.to(self._dtype))


class NativeRotaryEmbedding:
    """By the kernels, in float32: a call instead of six. Some cosines differ in their last place,
    which is of no account beside weights of 4 or 8 bits."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self.inv_freq_F, self.scaling = inverse_frequencies(rope, head_dim)

    def __call__(self, positions: list[int]) -> Rotation:
        return Rotation(*native.find_turns(positions, self.inv_freq_F, self.scaling))


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, float32 [D // 2], and the factor on cos and sin."""
    if isinstance(rope, YarnRope):
        return _yarn(rope, head_dim), _yarn_scaling(rope)
    inv_freq_F = _default(rope.theta, head_dim)
    match rope:
        case DefaultRope():
            return inv_freq_F, 1.0
        case LinearRope():
            # Position interpolation, Chen et al. 2023, arXiv 2306.15595.
            return inv_freq_F / rope.factor, 1.0
        case Llama3Rope():
            return _llama3(rope, inv_freq_F), 1.0
        case FactorsRope():
            # As `freq_factors` of ggml_rope_ext in llama.cpp.
            return inv_freq_F / torch.tensor(rope.factors), 1.0


def _default(theta: float, head_dim: int) -> torch.Tensor:
    """Su et al. 2021, arXiv 2104.09864."""
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents_F)


def _llama3(rope: Llama3Rope, inv_freq_F: torch.Tensor) -> torch.Tensor:
    """`apply_scaling` of meta-llama/llama-models: only wavelengths beyond the context stretch."""
    wavelength_F = 2 * math.pi / inv_freq_F
    smooth_F = (rope.original_context / wavelength_F - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth_F = smooth_F.clamp(0.0, 1.0)
    return (1 - smooth_F) * inv_freq_F / rope.factor + smooth_F * inv_freq_F


def _yarn(rope: YarnRope, head_dim: int) -> torch.Tensor:
    """Peng et al. 2023, arXiv 2309.00071, section 3.2: interpolate only the low frequencies."""
    low = _yarn_pair_index(rope, head_dim, rope.beta_fast)
    high = _yarn_pair_index(rope, head_dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    pairs_F = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolated_F = ((pairs_F - low) / width).clamp(0.0, 1.0)
    inv_freq_F = _default(rope.theta, head_dim)
    return inv_freq_F / rope.factor * interpolated_F + inv_freq_F * (1 - interpolated_F)


def _yarn_pair_index(rope: YarnRope, head_dim: int, num_rotations: float) -> float:
    """The pair that turns `num_rotations` times over the original context."""
    wavelength = rope.original_context / (num_rotations * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def _yarn_scaling(rope: YarnRope) -> float:
    """Section 3.4 of the paper; two mscales are DeepSeek's variant of it."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
