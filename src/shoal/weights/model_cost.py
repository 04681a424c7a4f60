"""What holding a decoder takes, from its configuration and how its weights are to be held."""

from __future__ import annotations

import torch

from shoal.cluster.costs import ModelCost
from shoal.compute.kv_types import head_bytes
from shoal.compute.linear import Scheme
from shoal.config import Quantize
from shoal.models.config import DecoderConfig
from shoal.weights import inventory
from shoal.weights.tensors import TensorSource

# 4 bits, and a bfloat16 scale and minimum for every 32.
_INT4_BYTES = 0.5 + 4 / 32
_FEW_BYTES = {"int8": 1.0, "int4": _INT4_BYTES}
# The same with float16 scales, of 8-bit weights too.
_NATIVE_BYTES = {"int8": 1.0 + 2 / 32, "int4": _INT4_BYTES}
_MANY_BYTES = {"float16": 2.0, "int8": 1.0, "native": 0.0}
_TABLE_BYTES = 2.0


def model_cost(
    config: DecoderConfig,
    scheme: Scheme,
    kv_dtype: torch.dtype,
    *,
    name: str,
    precision: Quantize,
    in_4_bits: bool,
) -> ModelCost:
    """A scheme with a kernel for few rows holds the weights twice: see compute.linear."""
    dense, few = float(scheme.dtype.itemsize), scheme.few
    many = _MANY_BYTES.get(scheme.many, dense)
    few_bytes = _NATIVE_BYTES if scheme.many == "native" else _FEW_BYTES
    if few == "as_stored":
        few = "int4" if in_4_bits else "int8"
    is_dense = scheme.many == "dense"
    return ModelCost(
        name=name,
        dims=config.dims,
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        precision=precision,
        weight_bytes=many + few_bytes[few] if few else many,
        embedding_bytes=dense if is_dense else _TABLE_BYTES,
        head_bytes=many + few_bytes["int8"] if few else many,
        kv_element_bytes=head_bytes(kv_dtype, config.head_dim) / config.head_dim,
        activation_bytes=scheme.dtype.itemsize,
        is_tied=config.tied_head and is_dense,
    )


def cost_of_source(
    source: TensorSource,
    config: DecoderConfig,
    scheme: Scheme,
    kv_dtype: torch.dtype,
    *,
    name: str,
    quantize: Quantize,
) -> ModelCost:
    """The same for an open checkpoint, of which it reads a single row. Raises SourceError."""
    return model_cost(
        config,
        scheme,
        kv_dtype,
        name=name,
        precision=quantize if scheme.few else "none",
        in_4_bits=scheme.few == "as_stored" and _is_in_4_bits(source, config),
    )


def _is_in_4_bits(source: TensorSource, config: DecoderConfig) -> bool:
    """Whether the file holds its layers in 4-bit blocks: asked of one row of the first matrix."""
    names = inventory.decoder_names(source, config)
    query = f"{inventory.layer_prefix(0)}self_attn.q_proj.weight"
    return source.affine4(names[query], rows=slice(0, 1)) is not None
