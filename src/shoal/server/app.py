"""The app: routes, error answers and middleware around one engine."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from shoal.engine.api import AsyncEngine
from shoal.errors import ShoalError
from shoal.journal.api import Journal, NoJournal
from shoal.server.errors import error_form, error_response, json_response
from shoal.server.metrics import Metrics
from shoal.server.request_id import RequestIdMiddleware
from shoal.server.responses import Responses
from shoal.server.routes import chat, completions, embeddings, models, operations, tokenize
from shoal.server.service import Service

MAX_BODY_BYTES = 8 * 2**20

_ROUTES = (chat, completions, embeddings, tokenize, models, operations)

_NAMES = {
    f"{models.PATH}/": "{name}",
    f"{chat.PATH}/": "{response_id}",
    f"{completions.PATH}/": "{response_id}",
}
"""What follows these paths is the client's choice."""


def create_app(
    engine: AsyncEngine,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    journal: Journal | None = None,
) -> FastAPI:
    """An ASGI app that serves `engine`; it neither starts nor stops it, nor `journal`."""
    metrics = Metrics(engine)
    app = FastAPI(
        title="Shoal",
        description="OpenAI's API over one model on many machines.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # What happens here is in /metrics; nothing is to be sent to anyone's collector.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = Service(
        engine, metrics, max_body_bytes, Responses(engine, metrics, journal or NoJournal())
    )
    for routes in _ROUTES:
        app.include_router(routes.router)
    known = frozenset(str(path) for path in app.openapi()["paths"])

    def count_response(scope: Scope, status: int) -> None:
        metrics.responses.labels(_endpoint(scope["path"], known), str(status)).inc()

    app.add_middleware(RequestIdMiddleware, count_response=count_response)
    app.add_exception_handler(ShoalError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    return app


def _endpoint(path: str, known: frozenset[str]) -> str:
    """A label of few values, whatever paths clients make up."""
    if path in known:
        return path
    of_one = (f"{start}{name}" for start, name in _NAMES.items() if path.startswith(start))
    return next(of_one, "other")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ShoalError)
    return error_response(error)


async def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, which starlette itself finds."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}"
        code = "method_not_allowed"
    elif error.status_code == 404:
        message = f"there is no {request.url.path:.200} here; see /docs for what there is"
        code = "not_found"
    else:
        message, code = error.detail, "http_error"
    body = error_form(message, "invalid_request_error", None, code)
    return json_response(body, error.status_code, dict(error.headers or {}))
