"""Puts an engine together, wherever its workers are."""

from __future__ import annotations

import os
import time

from shoal.compute.threads import set_num_threads
from shoal.config import EngineConfig
from shoal.engine.api import ModelInfo
from shoal.engine.engine import Engine
from shoal.engine.executor import Capacity, Executor
from shoal.engine.serving import ServingEngine
from shoal.schedule.drafting import Offered
from shoal.schedule.lookup import PromptLookup
from shoal.schedule.scheduler import Scheduler
from shoal.weights.source import ModelFiles
from shoal.weights.tokenizer import Tokenizer
from shoal.worker.draft_model import DraftModel, load_draft_model


def assemble(
    config: EngineConfig,
    executor: Executor,
    capacity: Capacity,
    tokenizer: Tokenizer,
    info: ModelInfo,
    *,
    replica: str = "r0",
    draft_model: DraftModel | None = None,
) -> ServingEngine:
    """An engine over an executor that is ready for the epoch of its `capacity`."""
    # An encoder's prompts cannot be cut into chunks: a step must hold the longest.
    whole_prompt = 0 if info.can_generate else info.max_context
    scheduler = Scheduler(
        num_blocks=capacity.num_blocks,
        block_size=config.block_size,
        max_context=info.max_context,
        max_step_tokens=max(config.max_step_tokens, whole_prompt),
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching and info.can_generate,
        max_in_flight=capacity.max_in_flight,
        max_drafted=config.most_guesses,
        drafter=Offered if config.draft_model else PromptLookup,
        epoch=capacity.epoch,
    )
    engine = Engine(
        scheduler,
        executor,
        tokenizer,
        info,
        stall_s=config.stall_s,
        recovery_timeout_s=config.recovery_timeout_s,
        replica=replica,
        epoch=capacity.epoch,
        draft_model=draft_model,
    )
    return ServingEngine(engine)


def draft_model_of_head(config: EngineConfig, tokenizer: Tokenizer) -> DraftModel | None:
    """For a head that computes nothing else: its workers are processes of their own."""
    if config.draft_model is not None:
        set_num_threads(config.num_threads or len(usable_cores()))
    return load_draft_model(config, tokenizer)


def model_info(
    config: EngineConfig,
    files: ModelFiles,
    *,
    num_blocks: int,
    max_context: int,
    vocab_size: int,
    can_generate: bool,
    description: str,
) -> ModelInfo:
    """What clients are told; the context is bounded by what the KV cache holds."""
    num_slots = num_blocks * config.block_size
    return ModelInfo(
        name=config.served_name or files.name,
        max_context=min(max_context, num_slots),
        vocab_size=vocab_size,
        can_generate=can_generate,
        created_s=int(time.time()),
        description=description,
    )


def usable_cores() -> list[int]:
    """The cores this process may use; some systems only know how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
