"""GET /health, /metrics, /docs and /: for operators, load balancers and newcomers."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from shoal.engine.api import Health
from shoal.server.docs_page import docs_page
from shoal.server.errors import json_response
from shoal.server.service import service_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while work can progress; 503 with the reason when it cannot."""
    service = service_of(request)
    state, stats = service.engine.health(), service.engine.stats()
    body = {
        **_signs(state),
        "since_progress_s": state.since_progress_s,
        "waiting": stats.num_waiting,
        "running": stats.num_running,
        "journal": service.responses.journal.trouble,
        "replicas": {name: _signs(each) for name, each in state.replicas.items()},
    }
    return json_response(body, 200 if state.ok else 503)


@router.get("/health/live")
async def live(request: Request) -> Response:
    """503 once the engine has stopped for good: only a new process helps."""
    state = service_of(request).engine.health()
    return _probed("live", state.live, state.reason)


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """503 while new requests are refused."""
    state = service_of(request).engine.health()
    return _probed("ready", state.ready, state.reason)


@router.get("/health/progress")
async def progress(request: Request) -> Response:
    """503 when work waits, or workers are awaited, and nothing has moved for too long."""
    state = service_of(request).engine.health()
    return _probed("progressing", state.progressing, state.reason)


def _signs(state: Health) -> dict[str, object]:
    return {
        "ok": state.ok,
        "live": state.live,
        "ready": state.ready,
        "progressing": state.progressing,
        "reason": state.reason,
    }


def _probed(question: str, is_so: bool, reason: str) -> Response:
    return json_response({question: is_so, "reason": reason}, 200 if is_so else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where asked for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    registry = service_of(request).metrics.registry
    return Response(encode(registry), headers={"content-type": content_type})


@router.get("/", include_in_schema=False)
async def welcome(request: Request) -> Response:
    info = service_of(request).engine.info
    return json_response(
        {
            "server": "shoal",
            "model": info.name,
            "api": str(request.base_url) + "v1",
            "docs": str(request.base_url) + "docs",
            "openapi": str(request.base_url) + "openapi.json",
        }
    )


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    info = service_of(request).engine.info
    return HTMLResponse(docs_page(str(request.base_url).rstrip("/"), info))
