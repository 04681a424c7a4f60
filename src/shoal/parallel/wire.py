"""Activations as the body of a frame: their own bytes, or int8 codes with a scale for each row."""

from __future__ import annotations

import torch

from shoal.config import WireFormat
from shoal.errors import FrameError

_MAX_CODE = 127
_SCALE_BYTES = 4


def encode(x_TE: torch.Tensor, wire_format: WireFormat) -> memoryview:
    """The bytes to send for x [T, E]. "exact" copies nothing that lies contiguous on the CPU.

    "int8" is T float32 scales, then T·E codes: x ≈ code · scale, scale = max |x| of the row / 127.
    A row that holds an inf or nan decodes to nan.
    """
    x_TE = x_TE.detach()
    if wire_format == "exact":
        return _bytes_of(x_TE.contiguous().cpu())
    x_TE = x_TE.float()
    scales_T1 = x_TE.abs().amax(dim=1, keepdim=True) / _MAX_CODE
    codes_TE = (x_TE / scales_T1.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    num_tokens = x_TE.shape[0]
    packed = torch.empty(num_tokens * _SCALE_BYTES + x_TE.numel(), dtype=torch.uint8)
    scales, codes = packed[: num_tokens * _SCALE_BYTES], packed[num_tokens * _SCALE_BYTES :]
    scales.view(torch.float32).copy_(scales_T1[:, 0])
    codes.view(torch.int8).view(x_TE.shape).copy_(codes_TE)
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
    scales_T1 = torch.frombuffer(body, dtype=torch.float32, count=shape[0])[:, None]
    codes = torch.frombuffer(body, dtype=torch.int8, offset=shape[0] * _SCALE_BYTES)
    return (codes.view(shape) * scales_T1).to(dtype)


def num_wire_bytes(shape: tuple[int, int], dtype: torch.dtype, wire_format: WireFormat) -> int:
    """What [T, E] of `dtype` take on the wire."""
    num_tokens, width = shape
    if wire_format == "exact":
        return num_tokens * width * dtype.itemsize
    return num_tokens * (_SCALE_BYTES + width)


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.view(torch.uint8).flatten().numpy().data
