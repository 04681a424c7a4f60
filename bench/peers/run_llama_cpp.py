"""llama.cpp's server as an engine that a benchmark asks, through the wheel of `xllamacpp`.

It says with each piece of text how many tokens there are by now, but not which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import xllamacpp

from bench.peers.protocol import Calls, Settings, Streams, serve

_SLOTS = 32
_CONTEXT = _SLOTS * 640


def load(settings: Settings) -> tuple[dict[str, Any], Calls]:
    server = xllamacpp.Server(_params(settings))

    def generate(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        streams = Streams(len(prompts))
        threads = [
            threading.Thread(target=_follow, args=(server, prompt, new_tokens, streams, number))
            for number, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return streams.answer()

    about = {
        "engine": f"llama.cpp (xllamacpp {version('xllamacpp')})",
        "computes": xllamacpp.get_system_info().strip(" |"),
        "caches_prefixes": True,
    }
    return about, {"generate": generate}


def _params(settings: Settings) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings["weights"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.n_parallel = _SLOTS
    params.n_ctx = _CONTEXT
    params.kv_unified = True
    # No copies of idle slots' states: a slot's own prefix is what is measured.
    params.cache_ram_mib = 0
    return params


def _follow(server: Any, prompt: list[int], new_tokens: int, streams: Streams, number: int) -> None:
    request = {
        "prompt": prompt,
        "n_predict": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "timings_per_token": True,
        "cache_prompt": True,
    }
    server.handle_completions(request, _counter(streams, number))


def _counter(streams: Streams, number: int) -> Callable[[dict[str, Any]], None]:
    def came(piece: dict[str, Any]) -> None:
        if "timings" not in piece:
            raise RuntimeError(f"llama.cpp answered {piece}")
        known = len(streams.arrivals_s[number])
        streams.counted(number, piece["timings"]["predicted_n"] - known)

    return came


if __name__ == "__main__":
    serve(load)
