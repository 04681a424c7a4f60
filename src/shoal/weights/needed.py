"""Which of a checkpoint's tensors a shard reads."""

from __future__ import annotations

from shoal.models.config import DecoderConfig, decoder_config, encoder_config
from shoal.models.registry import model_kind
from shoal.parallel.partition import Shard
from shoal.weights import inventory
from shoal.weights.tensors import TensorSource


def needed_tensors(source: TensorSource, shard: Shard) -> frozenset[str]:
    """The names, as the checkpoint spells them, of what the shard reads whole or in part.

    All ranks of a stage need the same tensors. An encoder is never split. Raises UnsupportedModel.
    """
    if model_kind(source.config) == "encoder":
        return frozenset(inventory.encoder_names(source, encoder_config(source.config)).values())
    config = decoder_config(source.config)
    names = inventory.decoder_names(source, config)
    return frozenset(names[part] for part in needed_parts(config, shard))


def needed_parts(config: DecoderConfig, shard: Shard) -> list[str]:
    """The same by the names of the model's parts, which `inventory.decoder_shapes` uses."""
    head = inventory.EMBEDDING if config.tied_head else inventory.HEAD
    needed = [inventory.EMBEDDING] if shard.is_first else []
    for layer in range(shard.layers.start, shard.layers.stop):
        needed += inventory.decoder_layer_shapes(config, layer)
    if shard.is_last:
        needed += [inventory.FINAL_NORM] + [head] * (head not in needed)
    return needed
