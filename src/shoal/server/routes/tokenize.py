"""POST /v1/tokenize and /v1/detokenize: the model's own tokens, for clients that count them."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import AsyncEngine
from shoal.errors import InvalidRequest
from shoal.server.errors import json_response
from shoal.server.prompts import decode, tokenize_chat, tokenize_prompts
from shoal.server.schema import request_body
from shoal.server.schema_tokenize import DetokenizeRequest, TokenizeRequest
from shoal.server.service import service_of

router = APIRouter()


@router.post("/v1/tokenize", openapi_extra=request_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of messages as the chat template writes them."""
    service = service_of(request)
    asked = await service.read(request, TokenizeRequest)
    tokens = await _tokens(service.engine, asked)
    return json_response(
        {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": service.engine.info.max_context,
        }
    )


@router.post("/v1/detokenize", openapi_extra=request_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    asked = await service.read(request, DetokenizeRequest)
    vocab_size = service.engine.info.vocab_size
    for token_id in asked.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary [0, {vocab_size})", param="tokens"
            )
    text = await decode(service.engine, asked.tokens, skip_special=asked.skip_special_tokens)
    return json_response({"prompt": text})


async def _tokens(engine: AsyncEngine, asked: TokenizeRequest) -> list[int]:
    given = [name for name in ("prompt", "text", "messages") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"give one of 'prompt', 'text' and 'messages', got {' and '.join(given) or 'none'}",
            param=given[-1] if given else "prompt",
        )
    if asked.messages is not None:
        return await tokenize_chat(
            engine,
            asked.messages,
            asked.chat_template_kwargs,
            add_generation_prompt=asked.add_generation_prompt,
        )
    text = asked.prompt if asked.prompt is not None else asked.text or ""
    [tokens] = await tokenize_prompts(engine, [text], add_special=asked.add_special_tokens)
    return tokens
