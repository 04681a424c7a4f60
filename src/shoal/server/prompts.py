"""From text or messages to token ids, without holding up the streams of other clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from shoal.engine.api import AsyncEngine
from shoal.errors import UnsupportedByModel
from shoal.server.schema_chat import Message, check_template_variables
from shoal.server.schema_prompt import Prompt

# Tokenising this much text takes about as long as handing it to a thread and back is worth.
INLINE_CHARS = 4096

T = TypeVar("T")


async def tokenize_prompts(
    engine: AsyncEngine, prompts: Sequence[Prompt], *, add_special: bool
) -> list[list[int]]:
    """Token ids are passed through as they are."""
    tokenizer = engine.tokenizer

    def encode_all() -> list[list[int]]:
        return [
            tokenizer.encode(prompt, add_special=add_special) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await _off_loop(encode_all, num_chars)


async def tokenize_chat(
    engine: AsyncEngine,
    messages: Sequence[Message],
    variables: dict[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Raises UnsupportedByModel without a template, InvalidRequest as the template does."""
    tokenizer = engine.tokenizer
    if not tokenizer.has_chat_template:
        raise UnsupportedByModel(
            f"'{engine.info.name}' has no chat template; use /v1/completions with the prompt "
            "as the model expects it"
        )
    check_template_variables(variables)

    def encode() -> list[int]:
        text = tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        # The template writes the special tokens itself.
        return tokenizer.encode(text, add_special=False)

    return await _off_loop(encode, sum(len(message.content) for message in messages))


async def decode(engine: AsyncEngine, token_ids: list[int], *, skip_special: bool) -> str:
    tokenizer = engine.tokenizer

    def decode_all() -> str:
        return tokenizer.decode(token_ids, skip_special=skip_special)

    return await _off_loop(decode_all, len(token_ids))


async def _off_loop(work: Callable[[], T], size: int) -> T:
    return work() if size <= INLINE_CHARS else await asyncio.to_thread(work)
