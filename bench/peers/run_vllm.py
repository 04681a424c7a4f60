"""vLLM's engine as one that a benchmark asks: in this process, one step at a time."""

from __future__ import annotations

import os
from typing import Any

# Before vLLM is imported: it reads them once. Steps are to be this process's own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import vllm

from bench.peers.protocol import Calls, Settings, Streams, serve


def load(settings: Settings) -> tuple[dict[str, Any], Calls]:
    # Its best: twice as fast as float32, where the processor has instructions for it.
    dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    engine = vllm.LLM(
        model=settings["weights"], dtype=dtype, enable_prefix_caching=True, max_model_len=2048
    ).llm_engine
    next_id = iter(range(2**62))

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        streams = Streams(len(prompts))
        number_of: dict[str, int] = {}
        for number, prompt in enumerate(prompts):
            name = str(next(next_id))
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
            number_of[name] = number
        while engine.has_unfinished_requests():
            for output in engine.step():
                number = number_of[output.request_id]
                tokens = list(output.outputs[0].token_ids)
                streams.came(number, tokens[len(streams.tokens[number]) :])
        return streams.answer()

    about = {
        "engine": f"vLLM {vllm.__version__}",
        "computes": dtype,
        "caches_prefixes": True,
    }
    return about, {"generate": generate}


if __name__ == "__main__":
    serve(load)
