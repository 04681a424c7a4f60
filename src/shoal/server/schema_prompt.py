"""A prompt, as completions and embeddings take it: text or token ids, one or a list."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

MAX_PROMPTS = 2048

Prompt = str | list[int]


def _is_tokens(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python, and not a token id.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(prompts, list) or not all(
        isinstance(prompt, str) or _is_tokens(prompt) for prompt in prompts
    ):
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts at once, got {len(prompts)}")
    if not all(prompts):
        raise ValueError("must not be empty")
    return tuple(prompts)


_STRINGS = {"type": "array", "items": {"type": "string"}}
_TOKENS = {"type": "array", "items": {"type": "integer"}}

Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _STRINGS, _TOKENS, {"type": "array", "items": _TOKENS}]}
    ),
]
