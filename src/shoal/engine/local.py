"""Starts an engine that runs a whole model in this process."""

from __future__ import annotations

import os
import time

import torch

from shoal.config import EngineConfig
from shoal.engine.api import ModelInfo
from shoal.engine.engine import Engine
from shoal.engine.executor import LocalExecutor
from shoal.engine.serving import ServingEngine
from shoal.schedule.scheduler import Scheduler
from shoal.weights.cache import Progress, silent
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.worker import Worker, load_worker


def start_engine(config: EngineConfig, *, report: Progress = silent) -> ServingEngine:
    """Fetch the model if need be, load it, and start stepping.

    Raises SourceError (no such model, a broken file, no network), ConfigError, OutOfMemory.
    """
    torch.set_num_threads(config.num_threads or _usable_cores())
    files = resolve(config.model, report=report)
    tokenizer = load_tokenizer(files, report=report)
    worker = load_worker(files, config)
    executor = LocalExecutor(worker)
    info = ModelInfo(
        name=config.served_name or files.name,
        max_context=min(worker.max_context, worker.num_blocks * config.block_size),
        vocab_size=worker.vocab_size,
        can_generate=worker.can_generate,
        created_s=int(time.time()),
        description=worker.description,
    )
    scheduler = _scheduler(config, worker, info, executor.max_in_flight)
    return ServingEngine(Engine(scheduler, executor, tokenizer, info, stall_s=config.stall_s))


def _scheduler(
    config: EngineConfig, worker: Worker, info: ModelInfo, max_in_flight: int
) -> Scheduler:
    # An encoder's prompts cannot be cut into chunks: a step must hold the longest.
    whole_prompt = 0 if worker.can_generate else info.max_context
    return Scheduler(
        num_blocks=worker.num_blocks,
        block_size=config.block_size,
        max_context=info.max_context,
        max_step_tokens=max(config.max_step_tokens, whole_prompt),
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching and worker.can_generate,
        max_in_flight=max_in_flight,
    )


def _usable_cores() -> int:
    """The cores this process may use; some systems only know how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
