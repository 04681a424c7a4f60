"""What a model on this machine will cost the nodes that hold it; reads its header only."""

from __future__ import annotations

from shoal.cluster.costs import ModelCost
from shoal.compute.kernels import choose_kv_dtype, choose_scheme
from shoal.config import DType, KVDType, Quantize
from shoal.errors import PlacementError
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.registry import model_kind
from shoal.weights.model_cost import cost_of_source
from shoal.weights.source import ModelFiles, open_source

# What a layer does beside its matrices, in the matrix elements of that time: 16 rows through
# SmolLM2 on one core of an EPYC took 3.0 ms for a layer of 3.5 M elements, 13.3 for the head's 28.
_LAYER_OVERHEAD = 3.5e6


def cost_of(
    files: ModelFiles, dtype: DType, quantize: Quantize, kv_dtype: KVDType = "auto"
) -> ModelCost:
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
        held = choose_kv_dtype(kv_dtype, dtype, scheme)
        return cost_of_source(source, config, scheme, held, name=files.name, quantize=quantize)
    finally:
        source.close()


def head_in_layers(config: DecoderConfig) -> float:
    """How many layers take as long as the output head, roughly: for who has measured nothing."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.mlp_size)
    return config.hidden_size * config.vocab_size / (layer + _LAYER_OVERHEAD)
