"""Fields of OpenAI's API that Shoal ignores on purpose, and those it refuses, each with why."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from shoal.errors import InvalidRequest

# Nothing a client could notice in the answer's text depends on these.
IGNORED = {
    "user": "a label for OpenAI's abuse monitoring",
    "safety_identifier": "a label for OpenAI's abuse monitoring",
    "metadata": "labels for OpenAI's dashboard",
    "store": "keeps the answer in OpenAI's dashboard",
    "service_tier": "a price class; here `priority` orders requests",
    "prompt_cache_key": "a routing hint; shared prefixes are found without it",
    "prompt_cache_retention": "a routing hint; shared prefixes are found without it",
    "prediction": "a speed hint; the text is the same without it",
    "parallel_tool_calls": "says how tools are called; without tools it says nothing",
    "reasoning_effort": "a wish to models trained to read it; ours are not",
    "verbosity": "a wish to models trained to read it; ours are not",
}

# These would change the answer. The values listed ask for nothing and are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
}


def without_ignored(payload: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """`payload` without the fields that ask for nothing here.

    Raises InvalidRequest, code `unsupported_parameter`, for one that asks for what Shoal has not.
    """
    kept = {}
    for name, value in payload.items():
        if name in known:
            kept[name] = value
        elif name in UNSUPPORTED:
            _check_supported(name, value)
        elif name not in IGNORED:
            kept[name] = value
    return kept


def unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{param}' is not supported by this server; leave it out",
        param=param,
        code="unsupported_parameter",
    )


def _check_supported(name: str, value: Any) -> None:
    if value is not None and value not in UNSUPPORTED[name]:
        raise unsupported(name)
