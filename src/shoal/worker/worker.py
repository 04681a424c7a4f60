"""A worker: one shard on one device. It keeps weights and cache, and no request's state."""

from __future__ import annotations

import logging
from threading import Thread
from typing import Protocol

import torch

from shoal.compute import native
from shoal.compute.kernels import choose_kv_dtype, choose_scheme
from shoal.compute.kv_types import name_of
from shoal.compute.linear import Scheme
from shoal.compute.threads import leave_cores_to_layers
from shoal.config import EngineConfig
from shoal.errors import ConfigError, OutOfMemory
from shoal.messages import Chunk, ChunkResult, Plan, StepResult
from shoal.models.config import decoder_config, encoder_config
from shoal.models.registry import model_kind
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import whole_shard
from shoal.weights.loader import load_decoder, load_encoder
from shoal.weights.source import ModelFiles, open_source
from shoal.weights.tensors import TensorSource
from shoal.worker.kv_cache import KVCache, num_blocks_for
from shoal.worker.runner import DecoderRunner, EncoderRunner

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes a step's chunks; the results come in any order."""

    def run(self, chunks: list[Chunk]) -> list[ChunkResult]: ...


class Worker:
    """Executes plans. `num_blocks` is the size of its KV cache, `max_context` in tokens."""

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        max_context: int,
        vocab_size: int,
        can_generate: bool,
        description: str,
    ) -> None:
        self._runner = runner
        self.num_blocks = num_blocks
        self.max_context = max_context
        self.vocab_size = vocab_size
        self.can_generate = can_generate
        self.description = description

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        return StepResult(epoch=plan.epoch, step=plan.step, results=self._runner.run(plan.chunks))


def load_worker(files: ModelFiles, config: EngineConfig) -> Worker:
    """A worker that holds the whole model. Raises SourceError, OutOfMemory, ConfigError."""
    scheme = choose_scheme(config.dtype, config.quantize)
    source = open_source(files)
    try:
        if model_kind(source.config) == "encoder":
            return _load_encoder_worker(source, config, scheme)
        return _load_decoder_worker(source, config, scheme)
    finally:
        source.close()


def _load_decoder_worker(source: TensorSource, config: EngineConfig, scheme: Scheme) -> Worker:
    model = decoder_config(source.config)
    shard = whole_shard(model.dims)
    max_context = max_context_of(config, model.max_context)
    decoder = load_decoder(source, shard, scheme=scheme, communicator=Solo())
    leave_cores_to_layers(scheme)
    kv_dtype = choose_kv_dtype(config.kv_dtype, config.dtype, scheme)
    num_blocks = num_blocks_for(
        model,
        shard,
        kv_dtype,
        block_size=config.block_size,
        kv_memory_bytes=config.kv_memory_bytes,
    )
    num_slots = num_blocks * config.block_size
    cache = KVCache(model, shard, num_slots=num_slots, dtype=kv_dtype)
    Thread(target=_take_memory, args=(cache,), name="shoal-cache", daemon=True).start()
    return Worker(
        DecoderRunner(decoder, cache, block_size=config.block_size),
        num_blocks=num_blocks,
        max_context=max_context,
        vocab_size=model.vocab_size,
        can_generate=True,
        description=f"{model.family}, {describe(scheme)}, "
        f"{name_of(kv_dtype)} KV cache of {num_slots:,} tokens",
    )


def _take_memory(cache: KVCache) -> None:
    """Beside the first requests, which need little of it."""
    try:
        cache.take_memory()
    except OutOfMemory as error:
        log.error("the KV cache will not last: %s", error)


def _load_encoder_worker(source: TensorSource, config: EngineConfig, scheme: Scheme) -> Worker:
    model = encoder_config(source.config)
    max_context = max_context_of(config, model.max_context)
    # An encoder caches nothing; blocks only count the tokens of a step.
    num_blocks = (
        -(-max(config.max_step_tokens, max_context) // config.block_size) + config.max_running
    )
    return Worker(
        EncoderRunner(load_encoder(source, scheme=scheme)),
        num_blocks=num_blocks,
        max_context=max_context,
        vocab_size=model.vocab_size,
        can_generate=False,
        description=f"BERT encoder, {describe(scheme)}",
    )


def max_context_of(config: EngineConfig, trained: int) -> int:
    if config.max_context is not None and config.max_context > trained:
        raise ConfigError(
            f"max_context of {config.max_context} is more than the {trained} tokens the model "
            f"was trained for"
        )
    return config.max_context or trained


def describe(scheme: Scheme) -> str:
    """In words; whoever lacks the native kernels is told here that there is a faster way."""
    words = _describe(scheme)
    if native.is_available():
        return words
    return f"{words}, slower than it could be: the native kernels (csrc) were not built"


def _describe(scheme: Scheme) -> str:
    activations = name_of(scheme.dtype)
    if scheme.few is None:
        return activations
    few = "4- or 8-bit" if scheme.few == "as_stored" else f"{scheme.few.removeprefix('int')}-bit"
    if scheme.many == "native":
        return f"{few} weights, native kernels, {activations} activations"
    return (
        f"{few} weights for up to {scheme.few_rows} rows and {scheme.many} beyond, "
        f"{activations} activations"
    )
