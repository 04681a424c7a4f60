"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import ModelInfo
from shoal.server.errors import json_response
from shoal.server.service import service_of

PATH = "/v1/models"

router = APIRouter()


@router.get(PATH)
async def list_models(request: Request) -> Response:
    """The model served here."""
    info = service_of(request).engine.info
    return json_response({"object": "list", "data": [_model(info)]})


# A model's name may be a path or hold a slash.
@router.get(PATH + "/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One model by its name."""
    service = service_of(request)
    service.check_model(name)
    return json_response(_model(service.engine.info))


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created_s,
        "owned_by": "shoal",
        "max_model_len": info.max_context,
        "description": info.description,
    }
