"""What a step needs at the least, and how fast this machine can do that.

The least is counted from the model's file: every tensor is read once, in the bytes it has there,
keys and values once, in the bytes that the cache holds them in; two operations per weight and row,
four per element of a key and query head. Kernels that hold weights in more bytes read more. Rates
are measured by all threads: a sum over 256 MiB, and products of float32 matrices of 2048 x 2048.
Kernels of 8-bit integers can pass the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import msgspec
import torch

from shoal.models.config import DecoderConfig, decoder_config
from shoal.weights.inventory import EMBEDDING, HEAD, decoder_shapes
from shoal.weights.source import ModelFiles, open_source
from shoal.worker.node_memory import usable_memory_bytes
from shoal.worker.profile_matrices import measure_reading
from shoal.worker.stopwatch import time_in_turn

_SIZE = 2048
_EMBEDDING, _HEAD = f"model.{EMBEDDING}", HEAD
# A number of a block of 32, with its share of the scale, and in 4 bits of the minimum.
_BLOCK_BYTES = {4: 0.625, 8: 1.0625}


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    bytes_per_s: float
    operations_per_s: float


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model: `weight_bytes` are those read in every step, head included."""

    weight_bytes: int
    layer_weights: int
    head_weights: int
    attention_operations_per_key: int
    kv_bytes_per_token: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Of a step: `keys` counts those read, once per sequence, `pairs` those of each query."""

    rows: int
    head_rows: int
    keys: int
    pairs: int


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds that memory and arithmetic take at the least; they overlap at best."""

    memory_ms: float
    arithmetic_ms: float

    @property
    def ms(self) -> float:
        return max(self.memory_ms, self.arithmetic_ms)

    @property
    def binds(self) -> str:
        return "memory" if self.memory_ms >= self.arithmetic_ms else "arithmetic"


def measure_rates(budget_s: float) -> Rates:
    """With as many threads as torch has been given."""
    read, _ = measure_reading(
        budget_s=budget_s / 2, device="cpu", memory_bytes=usable_memory_bytes("cpu")
    )
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    (timing,) = time_in_turn([[partial(torch.mm, a, b)]], budget_s=budget_s / 2)
    return Rates(bytes_per_s=read, operations_per_s=2 * _SIZE**3 / timing.seconds)


def shape_of(files: ModelFiles, kv_bytes_per_token: float) -> Shape:
    """From the file's own tensors. Raises SourceError."""
    source = open_source(files)
    try:
        model = decoder_config(source.config)
        sizes = {name: math.prod(source.shape(name)) for name in source.names()}
        extents = source.layout().tensors
    finally:
        source.close()
    held = {name: extents[name].num_bytes for name in sizes}
    return _shape(model, sizes, held, kv_bytes_per_token)


def shape_in_blocks(
    config: Mapping[str, Any], bits: Literal[4, 8], kv_bytes_per_token: float
) -> Shape:
    """Of weights that are rounded as they are loaded, in the bytes that GGUF's Q4_1 or Q8_0 has.

    The head has 8 bits in either, vectors have 32.
    """
    model = decoder_config(config)
    shapes = {
        name if name == _HEAD else f"model.{name}": size
        for name, size in decoder_shapes(model).items()
    }
    sizes = {name: math.prod(size) for name, size in shapes.items()}
    held = {}
    for name, size in shapes.items():
        each = _BLOCK_BYTES[8 if name in (_EMBEDDING, _HEAD) else bits]
        held[name] = round(sizes[name] * (4 if len(size) == 1 else each))
    return _shape(model, sizes, held, kv_bytes_per_token)


def _shape(
    model: DecoderConfig,
    sizes: Mapping[str, int],
    held_bytes: Mapping[str, int],
    kv_bytes_per_token: float,
) -> Shape:
    head = _EMBEDDING if model.tied_head else _HEAD
    read = sizes.keys() - ({_EMBEDDING} - {head})
    return Shape(
        weight_bytes=sum(held_bytes[name] for name in read),
        layer_weights=sum(sizes[name] for name in read - {head}),
        head_weights=sizes[head],
        attention_operations_per_key=4 * model.num_layers * model.num_heads * model.head_dim,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def limit_of(shape: Shape, load: Load, rates: Rates) -> Limit:
    num_bytes = shape.weight_bytes + load.keys * shape.kv_bytes_per_token
    operations = (
        2 * load.rows * shape.layer_weights
        + 2 * load.head_rows * shape.head_weights
        + load.pairs * shape.attention_operations_per_key
    )
    return Limit(
        memory_ms=num_bytes / rates.bytes_per_s * 1e3,
        arithmetic_ms=operations / rates.operations_per_s * 1e3,
    )
