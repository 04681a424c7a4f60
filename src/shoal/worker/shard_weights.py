"""A shard's weights in memory, and what there must be to read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from shoal.compute.kernels import choose_kv_dtype, choose_scheme
from shoal.compute.linear import Scheme
from shoal.config import EngineConfig
from shoal.models.config import DecoderConfig, decoder_config
from shoal.models.decoder import Decoder
from shoal.parallel.communicator import CurrentCommunicator
from shoal.parallel.partition import Shard
from shoal.weights.loader import load_decoder
from shoal.weights.model_cost import cost_of_source
from shoal.weights.source import ModelFiles, open_source
from shoal.weights.tensors import TensorSource
from shoal.worker.node_memory import usable_memory_bytes

# What is read ahead leaves as much to the cache of whoever reads it, and to those who serve.
_AHEAD_SHARE = 0.5


class Origin(NamedTuple):
    """What weights were made of, and how they are held: equal ones are the same weights."""

    model: str
    dtype: str
    quantize: str
    path: str
    version: str


@dataclass(frozen=True, slots=True)
class ShardWeights:
    """The layers add up through `communicator`, whichever they are told to use inside it."""

    origin: Origin
    shard: Shard
    model: DecoderConfig
    scheme: Scheme
    decoder: Decoder
    communicator: CurrentCommunicator
    num_read_bytes: int


def read_weights(
    files: ModelFiles,
    origin: Origin,
    shard: Shard,
    config: EngineConfig,
    communicator: CurrentCommunicator,
    held: Iterable[ShardWeights],
) -> ShardWeights:
    """What `held` has of the shard is shared with it rather than read.

    Raises SourceError, UnsupportedModel, ConfigError.
    """
    scheme = choose_scheme(config.dtype, config.quantize)
    source = open_source(files)
    try:
        decoder = load_decoder(
            source,
            shard,
            scheme=scheme,
            communicator=communicator,
            held=[each.decoder for each in held if each.origin == origin],
        )
        return ShardWeights(
            origin=origin,
            shard=shard,
            model=decoder_config(source.config),
            scheme=scheme,
            decoder=decoder,
            communicator=communicator,
            num_read_bytes=source.bytes_read,
        )
    finally:
        source.close()


def lack_of_memory(files: ModelFiles, shard: Shard, config: EngineConfig) -> str:
    """Why the shard cannot be read ahead of its need; "" if it can."""
    source = open_source(files)
    try:
        scheme = choose_scheme(config.dtype, config.quantize)
        num_bytes = _weight_bytes(source, scheme, config, shard)
    finally:
        source.close()
    usable = usable_memory_bytes()
    if num_bytes <= usable * _AHEAD_SHARE:
        return ""
    return (
        f"its layers [{shard.layers.start}, {shard.layers.stop}) take "
        f"{num_bytes / 2**20:,.0f} MiB, and of the {usable / 2**20:,.0f} MiB that can be used "
        f"now {_AHEAD_SHARE:.0%} are kept for caches and for those who serve"
    )


def _weight_bytes(
    source: TensorSource, scheme: Scheme, config: EngineConfig, shard: Shard
) -> float:
    kv_dtype = choose_kv_dtype(config.kv_dtype, config.dtype, scheme)
    model = decoder_config(source.config)
    cost = cost_of_source(source, model, scheme, kv_dtype, name="", quantize=config.quantize)
    layers = len(shard.layers) * cost.layer_bytes(shard.slice, kv_tokens=0)
    return layers + cost.table_bytes(shard.slice, is_first=shard.is_first, is_last=shard.is_last)
