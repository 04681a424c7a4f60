"""GGUF's blocks of values as tensors: dequantised, or repacked in 4 bits without loss.

gguf dequantises; it holds no 4-bit codes, so repacking is here. `raw` is uint8 [rows, row bytes].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type

from shoal.compute.affine import GROUP, Affine4

Bytes = npt.NDArray[np.uint8]

FLOAT_TYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
QUANTISED_TYPES = frozenset(
    {Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K}
)
READABLE_TYPES = QUANTISED_TYPES | FLOAT_TYPES.keys()
AFFINE4_TYPES = frozenset({Type.Q4_0, Type.Q4_1, Type.Q4_K})

_Q4_0_ZERO = 8.0
_Q4_K_BLOCK = 256
# So many stay in a processor's cache.
_ROWS_AT_ONCE = 256
_LOW_NIBBLES, _NIBBLE_BITS = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4)


def to_dense(raw: Bytes, tensor_type: Type) -> torch.Tensor:
    """The values [rows, columns]; float32 for blocks, else the type they are stored in."""
    if tensor_type in FLOAT_TYPES:
        return torch.from_numpy(np.ascontiguousarray(raw)).view(FLOAT_TYPES[tensor_type])
    if tensor_type == Type.Q8_0:
        return _dense_q8_0(raw)
    return torch.from_numpy(quants.dequantize(raw, tensor_type))


def _dense_q8_0(raw: Bytes) -> torch.Tensor:
    """As gguf does, in a tenth of its time: it takes 16 rows at a time, and tables are long."""
    blocks = raw.reshape(raw.shape[0], -1, 2 + GROUP)
    values = np.empty((*blocks.shape[:2], GROUP), dtype=np.float32)
    for first in range(0, len(blocks), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        values[rows] = np.ascontiguousarray(blocks[rows, :, 2:]).view(np.int8)
        values[rows] *= _halves(blocks[rows, :, :2])[..., None]
    return torch.from_numpy(values.reshape(raw.shape[0], -1))


def to_affine4(raw: Bytes, tensor_type: Type) -> Affine4:
    """The same values as `to_dense`, to the last bit, as codes, scales and minimums."""
    if tensor_type == Type.Q4_0:
        return _from_q4_0(raw)
    if tensor_type == Type.Q4_1:
        return _from_q4_1(raw)
    return _from_q4_k(raw)


def _from_q4_0(raw: Bytes) -> Affine4:
    blocks = raw.reshape(raw.shape[0], -1, 2 + GROUP // 2)
    scales_NG = _halves(blocks[..., :2])
    minimums_NG = scales_NG * np.float32(-_Q4_0_ZERO)
    return _affine(_nibbles(blocks[..., 2:]), scales_NG, minimums_NG)


def _from_q4_1(raw: Bytes) -> Affine4:
    blocks = raw.reshape(raw.shape[0], -1, 4 + GROUP // 2)
    return _affine(_nibbles(blocks[..., 4:]), _halves(blocks[..., :2]), _halves(blocks[..., 2:4]))


def _from_q4_k(raw: Bytes) -> Affine4:
    """Blocks of 256: fp16 scale and minimum, 8 pairs of 6-bit factors, then 8 groups of 32."""
    num_rows = raw.shape[0]
    blocks = raw.reshape(num_rows, -1, 2 + 2 + 12 + _Q4_K_BLOCK // 2)
    scale_factors, minimum_factors = quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    num_groups = _Q4_K_BLOCK // GROUP
    per_block = (num_rows, blocks.shape[1], num_groups)
    scales = _halves(blocks[..., :2])[..., None] * _floats(scale_factors).reshape(per_block)
    minimums = _halves(blocks[..., 2:4])[..., None] * _floats(minimum_factors).reshape(per_block)
    codes = _nibbles(blocks[..., 16:].reshape(num_rows, -1, GROUP))
    return _affine(codes, scales.reshape(num_rows, -1), -minimums.reshape(num_rows, -1))


def _nibbles(packed: Bytes) -> Bytes:
    """[rows, groups, B] bytes to [rows, groups * 2 * B]: all low nibbles, then all high ones."""
    num_rows, num_groups, num_bytes = packed.shape
    codes = np.empty((num_rows, num_groups, 2, num_bytes), dtype=np.uint8)
    # Whole words: the bytes of a group are too few for an operation of their own.
    words = np.ascontiguousarray(packed).view(np.uint64)
    halves = codes.view(np.uint64)
    np.bitwise_and(words, _LOW_NIBBLES, out=halves[:, :, 0])
    np.bitwise_and(words >> _NIBBLE_BITS, _LOW_NIBBLES, out=halves[:, :, 1])
    return codes.reshape(num_rows, -1)


def _halves(raw: Bytes) -> npt.NDArray[np.float32]:
    """fp16 pairs of bytes [..., 2] as float32 [...]."""
    return _floats(np.ascontiguousarray(raw).view(np.float16)[..., 0])


def _floats(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def _affine(
    codes_NK: Bytes, scales_NG: npt.NDArray[np.float32], minimums_NG: npt.NDArray[np.float32]
) -> Affine4:
    return Affine4(
        torch.from_numpy(codes_NK), torch.from_numpy(scales_NG), torch.from_numpy(minimums_NG)
    )
