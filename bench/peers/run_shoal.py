"""Shoal as an engine that a benchmark asks: through its Python interface, whole engine included."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

import shoal
from bench.peers.protocol import Calls, Settings, Streams, serve
from shoal import LLM, SamplingParams
from shoal.config import Split
from shoal.evaluate.perplexity import english_text, measure_perplexity


def load(settings: Settings) -> tuple[dict[str, Any], Calls]:
    options = {"num_threads": settings["threads"], **settings.get("options", {})}
    if "split" in options:
        options["split"] = msgspec.convert(options["split"], Split)
    llm = LLM(settings["weights"], kv_memory="512MiB", **options)

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        return asyncio.run(follow_all(llm, prompts, new_tokens))

    def perplexity(num_tokens: int) -> float:
        tokens = llm.tokenizer.encode(english_text())[:num_tokens]
        return measure_perplexity(llm, tokens).perplexity

    about = {
        "engine": f"Shoal {shoal.__version__}",
        "computes": llm.info.description,
        "caches_prefixes": True,
        "source": str(shoal.__file__),
    }
    return about, {"generate": generate, "perplexity": perplexity}


async def follow_all(llm: LLM, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    streams = Streams(len(prompts))

    async def follow(number: int, prompt: list[int]) -> None:
        async for delta in llm.stream(prompt, params):
            streams.came(number, delta.token_ids)

    await asyncio.gather(*(follow(number, prompt) for number, prompt in enumerate(prompts)))
    return streams.answer()


if __name__ == "__main__":
    serve(load)
