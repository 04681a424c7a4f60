"""OpenVINO GenAI as an engine that a benchmark asks: continuous batching, one step at a time."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai

from bench.peers.protocol import Calls, Settings, Streams, serve

_CACHE_GIB = 1


def load(settings: Settings) -> tuple[dict[str, Any], Calls]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        settings["weights"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": settings["threads"]}
    )
    next_id = iter(range(2**62))

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
        )
        streams = Streams(len(prompts))
        handles = [
            pipeline.add_request(next(next_id), openvino.Tensor(np.array([prompt])), config)
            for prompt in prompts
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for stream, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        streams.came(stream, list(output.generated_ids))
        return streams.answer()

    about = {
        "engine": f"OpenVINO GenAI {version('openvino-genai')}",
        "computes": _defaults(),
        "caches_prefixes": True,
    }
    return about, {"generate": generate}


def _defaults() -> str:
    """What the CPU plugin does unless told otherwise, in its own words."""
    core = openvino.Core()
    kv = core.get_property("CPU", "KV_CACHE_PRECISION").get_type_name()
    activations = core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    group = core.get_property("CPU", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    return (
        f"keys and values in {kv}, activations in {activations}, "
        f"for products in 8 bits in groups of {group}"
    )


if __name__ == "__main__":
    serve(load)
