"""What a decoder layer costs beside its matrices, in Shoal's own layers over a paged cache.

A narrow layer with one row shows what a layer costs whatever its size: calls, casts, launches. A
wide one whose matrices take no time shows what rows and the keys they attend to add.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from shoal.compute.kernels import choose_kv_dtype, choose_scheme
from shoal.compute.linear import Linear, Scheme, make_linear
from shoal.config import Quantize
from shoal.messages import Chunk
from shoal.models.config import DecoderConfig, LayerConfig
from shoal.models.layers import Attention, DecoderLayer, GatedMLP, Residual, RMSNorm, normed
from shoal.models.rope import RotaryEmbedding
from shoal.models.rope_config import DefaultRope
from shoal.parallel.partition import whole_shard
from shoal.worker.batch import Batch
from shoal.worker.kv_cache import KVCache, slot_bytes
from shoal.worker.runner import PagedAttend
from shoal.worker.stopwatch import Call, Timing, time_in_turn

_BLOCK_SIZE = 16
_NUM_LAYERS = 4
_ROWS = 32
_SHORT, _LONG = 16, 272

MakeLinear = Callable[[int, int], Linear]
"""From (in-features, out-features)."""


class _Types(NamedTuple):
    activations: torch.dtype
    cache: torch.dtype


class LayerCosts(NamedTuple):
    """As the fields of `NodeProfile`; a figure is 0 where noise was larger than what it costs."""

    layer_overhead_s: float
    activations_per_s: float
    cache_bytes_per_s: float
    spreads: dict[str, float]


def measure_layer(
    precision: Quantize, *, weights_per_s: float, budget_s: float, device: str
) -> LayerCosts:
    """`weights_per_s` is the rate of matrices at one row, whose time is no overhead."""
    scheme = choose_scheme("auto", precision)
    narrow, wide = _config(64, 2, 1, 32, 128), _config(1024, 16, 4, 64, 3072)
    types = _Types(scheme.dtype, choose_kv_dtype("auto", "auto", scheme))
    free = _free_linears(scheme.dtype)
    timings = time_in_turn(
        [
            _calls(narrow, _small_linears(scheme), types, device, 1, _SHORT),
            _calls(wide, free, types, device, 1, _SHORT),
            _calls(wide, free, types, device, _ROWS, _SHORT),
            _calls(wide, free, types, device, _ROWS, _LONG),
        ],
        budget_s=budget_s,
        device=device,
    )
    one, lone, many, long = (timing.seconds for timing in timings)
    num_activations = (_ROWS - 1) * layer_activations(wide)
    token_bytes = slot_bytes(wide, whole_shard(wide.dims), types.cache) // _NUM_LAYERS
    return LayerCosts(
        layer_overhead_s=max(0.0, one - layer_weights(narrow) / weights_per_s),
        activations_per_s=_rate(num_activations, many - lone),
        cache_bytes_per_s=_rate(_ROWS * (_LONG - _SHORT) * token_bytes, long - many),
        spreads=_spreads(timings),
    )


def layer_weights(config: DecoderConfig) -> int:
    """Elements of a layer's matrices."""
    heads = config.num_heads + config.num_kv_heads
    return config.hidden_size * (2 * heads * config.head_dim + 3 * config.mlp_size)


def layer_activations(config: DecoderConfig) -> int:
    """In- and out-features of a layer's four matrices."""
    heads = config.num_heads + config.num_kv_heads
    return 4 * config.hidden_size + 2 * heads * config.head_dim + 3 * config.mlp_size


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _spreads(timings: list[Timing]) -> dict[str, float]:
    return {
        "layer_overhead_s": timings[0].spread,
        "activations_per_s": timings[2].spread,
        "cache_bytes_per_s": timings[3].spread,
    }


def _config(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_size: int
) -> DecoderConfig:
    return DecoderConfig(
        family="Llama",
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=mlp_size,
        vocab_size=1,
        max_context=_LONG,
        norm_eps=1e-6,
        activation="silu",
        attention_scale=head_dim**-0.5,
        layers=(LayerConfig(rope=DefaultRope(theta=1e4)),) * _NUM_LAYERS,
    )


def _small_linears(scheme: Scheme) -> MakeLinear:
    def make(in_features: int, out_features: int) -> Linear:
        return make_linear(torch.randn(out_features, in_features), None, scheme)

    return make


def _free_linears(dtype: torch.dtype) -> MakeLinear:
    """Linears that answer with what lies ready: all that a layer takes is then its own."""

    def make(in_features: int, out_features: int) -> Linear:
        del in_features
        ready = torch.randn(_ROWS, out_features, dtype=dtype)
        return lambda x: ready[: x.shape[0]]

    return make


def _calls(
    config: DecoderConfig,
    make: MakeLinear,
    types: _Types,
    device: str,
    num_rows: int,
    num_keys: int,
) -> list[Call]:
    """Calls of layers with one row of each of `num_rows` streams, attending to `num_keys` keys."""
    num_blocks = -(-num_keys // _BLOCK_SIZE)
    chunks = [
        Chunk(
            request_id=row,
            start=num_keys - 1,
            tokens=[0],
            block_ids=list(range(row * num_blocks, (row + 1) * num_blocks)),
        )
        for row in range(num_rows)
    ]
    num_slots = num_rows * num_blocks * _BLOCK_SIZE
    # What a step needs once, it does not need per layer.
    batch = Batch(chunks, _BLOCK_SIZE)
    batch.places = batch.places.to(device)
    with torch.device(device):
        cache = KVCache(config, whole_shard(config.dims), num_slots=num_slots, dtype=types.cache)
        cache.take_memory()
        layers = [_layer(config, layer, make, types.activations) for layer in range(_NUM_LAYERS)]
        rotary = RotaryEmbedding(config.layers[0].rope, config.head_dim, types.activations)
        x_TE = torch.randn(num_rows, config.hidden_size, dtype=types.activations)
    attend = PagedAttend(cache, batch)
    rotation = rotary(batch.positions)
    return [partial(layer, x_TE, rotation, attend) for layer in layers]


def _layer(config: DecoderConfig, layer: int, make: MakeLinear, dtype: torch.dtype) -> DecoderLayer:
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    residual = Residual(None, None)
    norm = RMSNorm(torch.ones(hidden, dtype=dtype), config.norm_eps)
    return DecoderLayer(
        Attention(
            config,
            layer,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            qkv=normed(norm, make(hidden, query + 2 * config.num_kv_heads * config.head_dim)),
            output=make(query, hidden),
            qk_norm=None,
            residual=residual,
        ),
        GatedMLP(
            normed(norm, make(hidden, 2 * config.mlp_size)),
            make(config.mlp_size, hidden),
            "silu",
            residual,
        ),
    )
