"""Which kernels to use on this processor, from what was measured on processors like it.

docs/decisions/0002-kernels.md has the measurements behind the two thresholds below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.compute import native
from shoal.compute.linear import Scheme, Weights
from shoal.config import DType, KVDType, Quantize
from shoal.errors import ConfigError

# Up to so many rows the weight-only kernels beat those that have more arithmetic per byte read.
_FEW_ROWS = 3
# From so many rows on, emulated bfloat16 products are slower than widening the weights.
_WIDEN_ROWS = 8

_KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_WEIGHTS: Mapping[Quantize, Weights] = {"auto": "as_stored", "int8": "int8", "int4": "int4"}


def choose_scheme(dtype: DType, quantize: Quantize) -> Scheme:
    """The scheme for what was asked. Activations are float32 unless bfloat16 is asked for.

    `auto` is what costs no quality to speak of: the file's own 4-bit blocks, or 8 bits where it
    has none. An explicit dtype with `quantize="auto"` means that type and no quantisation. The
    native kernels take any number of rows. Without them, `auto` multiplies many rows in 16 bits,
    or does not quantise at all where torch lacks FBGEMM (processors other than x86), and `int8`
    and `int4` round the activations of many rows coarsely. Raises ConfigError if what was asked
    cannot run here.
    """
    if quantize == "none" or (quantize == "auto" and dtype != "auto"):
        return _whole(dtype)
    activations = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if native.is_available():
        return Scheme(dtype=activations, many="native", few=_WEIGHTS[quantize])
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if quantize == "auto":
        if not has_fbgemm:
            return _whole(dtype)
        return Scheme(dtype=activations, many="float16", few="as_stored", few_rows=_FEW_ROWS)
    if not has_fbgemm:
        raise ConfigError(
            f"--quantize {quantize} needs the native kernels, which are not installed, or FBGEMM, "
            f"which this build of torch lacks on this processor: use --quantize none"
        )
    few_rows = _FEW_ROWS if quantize == "int4" else 1
    return Scheme(dtype=activations, many="int8", few=_WEIGHTS[quantize], few_rows=few_rows)


def choose_kv_dtype(kv_dtype: KVDType, dtype: DType, scheme: Scheme) -> torch.dtype:
    """What a KV cache holds its numbers in, see `kv_types`.

    `auto` is float16 for the native kernels, unless `dtype` asks for a type of activations: else
    it is theirs.
    """
    if kv_dtype != "auto":
        return _KV_DTYPES[kv_dtype]
    return torch.float16 if scheme.many == "native" and dtype == "auto" else scheme.dtype


def _whole(dtype: DType) -> Scheme:
    widen_rows = None if has_native_bfloat16() else _WIDEN_ROWS
    return Scheme(dtype=_dense_dtype(dtype), widen_rows=widen_rows)


def has_native_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dense_dtype(dtype: DType) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if has_native_bfloat16() else torch.float32
    return torch.float32 if dtype == "float32" else torch.bfloat16
