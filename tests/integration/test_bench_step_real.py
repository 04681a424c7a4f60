"""A step of the real model, told apart: nothing is left out, and the kernels are found."""

from __future__ import annotations

import pytest

from bench.roofline import Rates, shape_of
from bench.step import measure
from bench.works import Work
from shoal.compute import native
from shoal.config import EngineConfig
from shoal.engine.local import start_engine
from shoal.weights.source import resolve

KV_BYTES = 2**26


@pytest.mark.slow
def test_every_millisecond_of_a_step_has_a_name() -> None:
    config = EngineConfig(model="smollm2-135m", kv_memory_bytes=KV_BYTES, num_threads=1)
    engine = start_engine(config)
    try:
        num_slots = engine.stats().num_blocks * config.block_size
        shape = shape_of(resolve(config.model), KV_BYTES / num_slots)
        work = Work(name="two", figure="decode", num_streams=2, prompt_tokens=16, new_tokens=6)
        rates = Rates(bytes_per_s=1e10, operations_per_s=1e11)
        account = measure(engine, work, 1, shape, rates)
    finally:
        engine.close()
    assert sum(account.parts.values()) == pytest.approx(account.framed_ms)
    assert account.period_ms is not None and account.period_ms >= account.step_ms * 0.9
    largest = "native layers" if native.is_available() else "linear layers"
    assert {largest, "output head", "sampling"} <= account.parts.keys()
    assert account.parts[largest] == max(account.parts.values())
    # 30 layers of 576 x 576 query and output, 576 x 192 keys and values, three of 576 x 1536.
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert shape.head_weights == 49152 * 576
    assert shape.layer_weights == 30 * layer + 61 * 576
    # In float32: keys and values of 3 heads of 64, in 30 layers.
    assert shape.kv_bytes_per_token == pytest.approx(2 * 30 * 192 * 2, rel=0.02)
