"""The bodies of POST /v1/tokenize and /v1/detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictInt

from shoal.server.schema import Schema
from shoal.server.schema_chat import Messages


class TokenizeRequest(Schema):
    """One of `prompt`, `text` (the same) and `messages`."""

    model: str | None = None
    prompt: str | None = None
    text: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(Schema):
    model: str | None = None
    tokens: list[StrictInt]
    skip_special_tokens: bool = False
