"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import AsyncEngine
from shoal.errors import InvalidRequest
from shoal.server.errors import json_response
from shoal.server.prompts import tokenize_prompts
from shoal.server.schema import request_body
from shoal.server.schema_embeddings import EmbeddingRequest
from shoal.server.service import service_of
from shoal.server.streaming import while_connected

PATH = "/v1/embeddings"

router = APIRouter()


@router.post(PATH, openapi_extra=request_body(EmbeddingRequest))
async def create_embeddings(request: Request) -> Response:
    """A vector of length 1 for each input."""
    service = service_of(request)
    asked = await service.read(request, EmbeddingRequest)
    engine = service.engine
    prompts = await tokenize_prompts(engine, asked.input, add_special=asked.add_special_tokens)
    for prompt in prompts:
        service.metrics.prompt_length.observe(len(prompt))
    vectors = await while_connected(request.receive, _embed_all(engine, prompts, asked))
    num_tokens = sum(len(prompt) for prompt in prompts)
    return json_response(
        {
            "object": "list",
            "data": [_item(index, vector, asked) for index, vector in enumerate(vectors)],
            "model": engine.info.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _embed_all(
    engine: AsyncEngine, prompts: list[list[int]], asked: EmbeddingRequest
) -> list[list[float]]:
    """Together, so that they share steps; the first refusal cancels the rest."""
    tasks = [
        asyncio.create_task(engine.embed(prompt, priority=asked.priority)) for prompt in prompts
    ]
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if asked.dimensions not in (None, len(vectors[0])):
        raise InvalidRequest(
            f"'dimensions' is {asked.dimensions}, but this model's embeddings have "
            f"{len(vectors[0])}, and they cannot be shortened",
            param="dimensions",
        )
    return list(vectors)


def _item(index: int, vector: list[float], asked: EmbeddingRequest) -> dict[str, Any]:
    embedding = vector if asked.encoding_format == "float" else _base64(vector)
    return {"object": "embedding", "index": index, "embedding": embedding}


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client decodes it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
