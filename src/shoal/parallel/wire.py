"""Activations as the body of a frame: their own bytes, or int8 codes in groups with a scale each.

G is the number of groups in a row.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from shoal.config import WireFormat
from shoal.errors import FrameError

_MAX_CODE = 127
_SCALE_BYTES = 4
# One scale for a whole row loses several times as much: a few columns are far larger than others.
_GROUP_SIZE = 64


def encode(x_TE: torch.Tensor, wire_format: WireFormat) -> memoryview:
    """The bytes to send for x [T, E]. "exact" copies nothing that lies contiguous on the CPU.

    "int8" is T·G float32 scales, then T·E codes: x ≈ code · scale, and the scale is max |x| of 64
    columns of a row / 127. A group that holds an inf or nan decodes to nan.
    """
    x_TE = x_TE.detach()
    if wire_format == "exact":
        return _bytes_of(x_TE.contiguous().cpu())
    x_TE = x_TE.float()
    num_tokens, width = x_TE.shape
    groups_TGC = pad(x_TE, (0, -width % _GROUP_SIZE)).reshape(num_tokens, -1, _GROUP_SIZE)
    scales_TG1 = groups_TGC.abs().amax(dim=2, keepdim=True) / _MAX_CODE
    codes_TGC = (groups_TGC / scales_TG1.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    num_scale_bytes = scales_TG1.numel() * _SCALE_BYTES
    packed = torch.empty(num_scale_bytes + x_TE.numel(), dtype=torch.uint8)
    packed[:num_scale_bytes].view(torch.float32).copy_(scales_TG1.flatten())
    codes_TE = packed[num_scale_bytes:].view(torch.int8).view(x_TE.shape)
    codes_TE.copy_(codes_TGC.view(num_tokens, -1)[:, :width])
    return _bytes_of(packed)


def decode(
    body: bytearray | memoryview,
    wire_format: WireFormat,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [T, E] again; "exact" is a view of `body`. Raises FrameError if it has another length."""
    expected = num_wire_bytes(shape, dtype, wire_format)
    if len(body) != expected or expected == 0:
        raise FrameError(
            f"{len(body)} bytes of activations where [{shape[0]}, {shape[1]}] of {dtype} as "
            f"{wire_format} take {expected}"
        )
    if wire_format == "exact":
        return torch.frombuffer(body, dtype=dtype).view(shape)
    num_tokens, width = shape
    num_scales = num_tokens * _num_groups(width)
    scales_TG = torch.frombuffer(body, dtype=torch.float32, count=num_scales).view(num_tokens, -1)
    codes = torch.frombuffer(body, dtype=torch.int8, offset=num_scales * _SCALE_BYTES)
    scales_TE = scales_TG.repeat_interleave(_GROUP_SIZE, dim=1)[:, :width]
    return (codes.view(shape) * scales_TE).to(dtype)


def num_wire_bytes(shape: tuple[int, int], dtype: torch.dtype, wire_format: WireFormat) -> int:
    """What [T, E] of `dtype` take on the wire."""
    num_tokens, width = shape
    if wire_format == "exact":
        return num_tokens * width * dtype.itemsize
    return num_tokens * (_SCALE_BYTES * _num_groups(width) + width)


def _num_groups(width: int) -> int:
    return -(-width // _GROUP_SIZE)


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.view(torch.uint8).flatten().numpy().data
