"""Starts an engine that runs a whole model in this process."""

from __future__ import annotations

from shoal.compute.threads import set_num_threads, torch_threads_kept
from shoal.config import EngineConfig
from shoal.engine.assembly import assemble, model_info, usable_cores
from shoal.engine.executor import LocalExecutor
from shoal.engine.serving import ServingEngine
from shoal.weights.cache import Progress, silent
from shoal.weights.source import resolve
from shoal.weights.tokenizer import load_tokenizer
from shoal.worker.draft_model import check_draft_model, load_draft_model
from shoal.worker.worker import load_worker


def start_engine(config: EngineConfig, *, report: Progress = silent) -> ServingEngine:
    """Fetch the model if need be, load it, and start stepping.

    Raises SourceError (no such model, a broken file, no network), ConfigError, OutOfMemory.
    """
    set_num_threads(config.num_threads or len(usable_cores()))
    files = resolve(config.model, report=report)
    tokenizer = load_tokenizer(files, report=report)
    check_draft_model(config, tokenizer)
    worker = load_worker(files, config)
    info = model_info(
        config,
        files,
        num_blocks=worker.num_blocks,
        max_context=worker.max_context,
        vocab_size=worker.vocab_size,
        can_generate=worker.can_generate,
        description=worker.description,
    )
    executor = LocalExecutor(worker)
    with torch_threads_kept():
        draft_model = load_draft_model(config, tokenizer)
    return assemble(config, executor, executor.capacity, tokenizer, info, draft_model=draft_model)
