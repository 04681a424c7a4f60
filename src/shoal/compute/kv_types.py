"""How a KV cache holds keys and values; the native kernels do the same, bit for bit.

In 8 bits a head of a token is D codes of -127…127, then a step in float16 for each 64 of them. What
is stored for a token depends on nothing but its own key and value. D head width, W what a cache
holds for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_STEP_BYTES = 2
_GROUP = 64
_LARGEST_CODE = 127
_LARGEST_HALF = torch.finfo(torch.float16).max


def held_width(dtype: torch.dtype, head_dim: int) -> int:
    """Elements of `dtype` that hold one head of a token."""
    return head_dim + -(-head_dim // _GROUP) * _STEP_BYTES if dtype == torch.int8 else head_dim


def head_dim_of(held: torch.Tensor) -> int:
    """Of a cache [..., W]."""
    width = held.shape[-1]
    num_steps = -(-width // (_GROUP + _STEP_BYTES)) if held.dtype == torch.int8 else 0
    return width - num_steps * _STEP_BYTES


def head_bytes(dtype: torch.dtype, head_dim: int) -> int:
    return held_width(dtype, head_dim) * dtype.itemsize


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., D] as a cache of that type holds it, [..., W]."""
    if dtype == torch.int8:
        return _in_8_bits(x.float())
    if dtype == torch.float16:
        x = x.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return x.to(dtype)


def widen(held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a cache holds, [..., W], as numbers of `dtype`, [..., D]."""
    if held.dtype != torch.int8:
        return held.to(dtype)
    head_dim = head_dim_of(held)
    steps = held[..., head_dim:].contiguous().view(torch.float16).float()
    steps = steps.repeat_interleave(_GROUP, dim=-1)[..., :head_dim]
    return (held[..., :head_dim] * steps).to(dtype)


def _in_8_bits(x: torch.Tensor) -> torch.Tensor:
    head_dim = x.shape[-1]
    groups = F.pad(x, (0, -head_dim % _GROUP)).view(*x.shape[:-1], -1, _GROUP)
    exact_steps = groups.abs().amax(dim=-1) / _LARGEST_CODE
    halves = exact_steps.clamp_max(_LARGEST_HALF).half()
    steps = halves.float().unsqueeze(-1)
    per_step = torch.where(steps > 0, 1 / steps, 0)
    codes = (groups * per_step).clamp(-_LARGEST_CODE, _LARGEST_CODE).round().to(torch.int8)
    return torch.cat([codes.flatten(-2)[..., :head_dim], halves.view(torch.int8)], dim=-1)
