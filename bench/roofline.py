"""What a step needs at the least, and how fast this machine can do that.

The least is counted from the model's file: every tensor is read once, in the bytes it has there,
keys and values once, in the bytes that the cache holds them in; two operations per weight and row,
four per element of a key and query head. Kernels that hold weights in more bytes read more. Rates
are measured by all threads: a sum over 256 MiB, and products of float32 matrices of 2048 x 2048.
Kernels of 8-bit integers can pass the second.
"""

from __future__ import annotations

import math
from functools import partial

import msgspec
import torch

from shoal.models.config import decoder_config
from shoal.weights.source import ModelFiles, open_source
from shoal.worker.node_memory import usable_memory_bytes
from shoal.worker.profile_matrices import measure_reading
from shoal.worker.stopwatch import time_in_turn

_SIZE = 2048
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    head = _EMBEDDING if model.tied_head else _HEAD
    looked_up = {_EMBEDDING} - {head}
    return Shape(
        weight_bytes=sum(extents[name].num_bytes for name in sizes.keys() - looked_up),
        layer_weights=sum(sizes[name] for name in sizes.keys() - looked_up - {head}),
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
