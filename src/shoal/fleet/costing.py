"""What a model on this machine will cost the nodes that hold it; reads its header only."""

from __future__ import annotations

from shoal.cluster.costs import ModelCost
from shoal.compute.kernels import choose_scheme
from shoal.compute.linear import Scheme
from shoal.config import DType, Quantize
from shoal.errors import PlacementError
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.registry import model_kind
from shoal.weights import inventory
from shoal.weights.source import ModelFiles, open_source
from shoal.weights.tensors import TensorSource

# 4 bits, and a bfloat16 scale and minimum for every 32.
_INT4_BYTES = 0.5 + 4 / 32
_FEW_BYTES = {"int8": 1.0, "int4": _INT4_BYTES}
_MANY_BYTES = {"float16": 2.0, "int8": 1.0}
_TABLE_BYTES = 2.0
# What a layer does beside its matrices, in the matrix elements of that time: 16 rows through
# SmolLM2 on one core of an EPYC took 3.0 ms for a layer of 3.5 M elements, 13.3 for the head's 28.
_LAYER_OVERHEAD = 3.5e6


def cost_of(files: ModelFiles, dtype: DType, quantize: Quantize) -> ModelCost:
    """Raises SourceError, ConfigError, and PlacementError for what is not divided."""
    scheme = choose_scheme(dtype, quantize)
    source = open_source(files)
    try:
        if model_kind(source.config) != "decoder":
            raise PlacementError(
                f"{files.name} is an encoder, which runs whole: serve it without --cluster and "
                "--placement"
            )
        config = decoder_config(source.config)
        return model_cost(
            config,
            scheme,
            name=files.name,
            precision=quantize if scheme.few else "none",
            in_4_bits=scheme.few == "as_stored" and _is_in_4_bits(source, config),
        )
    finally:
        source.close()


def model_cost(
    config: DecoderConfig, scheme: Scheme, *, name: str, precision: Quantize, in_4_bits: bool
) -> ModelCost:
    """A scheme with a kernel for few rows holds the weights twice: see compute.linear."""
    dense, few = float(scheme.dtype.itemsize), scheme.few
    many = _MANY_BYTES.get(scheme.many, dense)
    if few == "as_stored":
        few = "int4" if in_4_bits else "int8"
    is_dense = scheme.many == "dense"
    return ModelCost(
        name=name,
        dims=config.dims,
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        precision=precision,
        weight_bytes=many + _FEW_BYTES[few] if few else many,
        embedding_bytes=dense if is_dense else _TABLE_BYTES,
        head_bytes=many + _FEW_BYTES["int8"] if few else many,
        kv_element_bytes=scheme.dtype.itemsize,
        activation_bytes=scheme.dtype.itemsize,
        is_tied=config.tied_head and is_dense,
    )


def head_in_layers(config: DecoderConfig) -> float:
    """How many layers take as long as the output head, roughly: for who has measured nothing."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.mlp_size)
    return config.hidden_size * config.vocab_size / (layer + _LAYER_OVERHEAD)


def _is_in_4_bits(source: TensorSource, config: DecoderConfig) -> bool:
    """Whether the file holds its layers in 4-bit blocks: asked of one row of the first matrix."""
    names = inventory.decoder_names(source, config)
    query = f"{inventory.layer_prefix(0)}self_attn.q_proj.weight"
    return source.affine4(names[query], rows=slice(0, 1)) is not None
