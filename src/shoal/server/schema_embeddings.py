"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from shoal.server.schema import Int, Schema
from shoal.server.schema_prompt import Prompts


class EmbeddingRequest(Schema):
    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = None
    priority: Int = 0
    add_special_tokens: bool = True
