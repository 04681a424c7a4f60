"""Which kernels to use on this processor, from what was measured on processors like it.

docs/decisions/0002-kernels.md has the measurements behind the two thresholds below.
"""

from __future__ import annotations

import torch

from shoal.compute.linear import Scheme
from shoal.config import DType, Quantize

# With AVX-512 VNNI the 4-bit kernel is faster up to three rows; with AVX2 the 8-bit one always is.
_INT4_ROWS_WITH_VNNI = 3
# From so many rows on, emulated bfloat16 products are slower than widening the weights.
_WIDEN_ROWS = 8


def choose_scheme(dtype: DType, quantize: Quantize) -> Scheme:
    """The scheme for what was asked; `auto` is what is fastest here at a known small loss.

    An explicit dtype with `quantize="auto"` means that type and no quantisation.
    """
    if quantize == "none" or (quantize == "auto" and dtype != "auto"):
        widen_rows = None if has_native_bfloat16() else _WIDEN_ROWS
        return Scheme(dtype=_dense_dtype(dtype), widen_rows=widen_rows)
    activations = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    int4_is_fast = torch.cpu._is_vnni_supported()
    if quantize == "int8" or (quantize == "auto" and not int4_is_fast):
        return Scheme(dtype=activations, quantize="int8")
    int4_rows = _INT4_ROWS_WITH_VNNI if int4_is_fast else 1
    return Scheme(dtype=activations, quantize="int4", int4_rows=int4_rows)


def has_native_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dense_dtype(dtype: DType) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if has_native_bfloat16() else torch.float32
    return torch.float32 if dtype == "float32" else torch.bfloat16
