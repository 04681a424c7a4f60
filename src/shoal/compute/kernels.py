"""Which kernels to use on this processor, from what was measured on processors like it.

docs/decisions/0002-kernels.md has the measurements behind the two thresholds below.
"""

from __future__ import annotations

from typing import Literal

import torch

from shoal.compute import native
from shoal.compute.linear import Scheme
from shoal.config import DType, Quantize
from shoal.errors import ConfigError

# Up to so many rows the weight-only kernels beat those that have more arithmetic per byte read.
_FEW_ROWS = 3
# From so many rows on, emulated bfloat16 products are slower than widening the weights.
_WIDEN_ROWS = 8


def choose_scheme(dtype: DType, quantize: Quantize) -> Scheme:
    """The scheme for what was asked. Activations are float32 unless bfloat16 is asked for.

    `auto` is what costs no quality to speak of: for a few rows the file's own 4-bit blocks, or 8
    bits where it has none, and 16 bits for many. `int8` and `int4` quantise the activations of
    many rows as well, for speed. An explicit dtype with `quantize="auto"` means that type and no
    quantisation, as does a torch without FBGEMM (processors other than x86). Raises ConfigError
    if what was asked cannot run here.
    """
    is_whole = quantize == "none" or (quantize == "auto" and dtype != "auto")
    if native.is_available() and not is_whole:
        activations = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return Scheme(dtype=activations, many="native", few=_weights(quantize))
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if quantize in ("int8", "int4") and not has_fbgemm:
        raise ConfigError(
            f"--quantize {quantize} needs FBGEMM, which this build of torch lacks on this "
            f"processor: use --quantize none"
        )
    if is_whole or (quantize == "auto" and not has_fbgemm):
        widen_rows = None if has_native_bfloat16() else _WIDEN_ROWS
        return Scheme(dtype=_dense_dtype(dtype), widen_rows=widen_rows)
    activations = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if quantize == "auto":
        return Scheme(dtype=activations, many="float16", few="as_stored", few_rows=_FEW_ROWS)
    few_rows = _FEW_ROWS if quantize == "int4" else 1
    return Scheme(dtype=activations, many="int8", few=quantize, few_rows=few_rows)


def _weights(quantize: Quantize) -> Literal["as_stored", "int8", "int4"]:
    assert quantize != "none", "weights as they are"
    return "as_stored" if quantize == "auto" else quantize


def has_native_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dense_dtype(dtype: DType) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if has_native_bfloat16() else torch.float32
    return torch.float32 if dtype == "float32" else torch.bfloat16
