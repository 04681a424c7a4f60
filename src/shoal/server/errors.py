"""How an error becomes an answer: one table of statuses and words, in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from shoal.errors import (
    CallerError,
    ContextTooLong,
    EngineStopped,
    InternalError,
    InvalidRequest,
    OperatorError,
    QueueFull,
    RetryError,
    ShoalError,
    UnknownModel,
    UnsupportedByModel,
)


class Answer(NamedTuple):
    """What clients see of an error class: its `type`, and its `code` when it brings none."""

    type: str
    code: str | None


# The first class that matches counts, so the derived ones stand above their bases. The status
# is the error's own.
ANSWERS: tuple[tuple[type[ShoalError], Answer], ...] = (
    (ContextTooLong, Answer("invalid_request_error", "context_length_exceeded")),
    (UnknownModel, Answer("invalid_request_error", "model_not_found")),
    (UnsupportedByModel, Answer("invalid_request_error", "unsupported_by_model")),
    (InvalidRequest, Answer("invalid_request_error", None)),
    (CallerError, Answer("invalid_request_error", None)),
    (QueueFull, Answer("rate_limit_error", "queue_full")),
    (EngineStopped, Answer("service_unavailable_error", "engine_stopped")),
    (RetryError, Answer("service_unavailable_error", "try_again")),
    (OperatorError, Answer("server_error", "operator_must_act")),
    (InternalError, Answer("server_error", "internal_error")),
    (ShoalError, Answer("server_error", None)),
)


class RequestTooLarge(InvalidRequest):
    status = 413


class UnknownResponse(InvalidRequest):
    status = 404


class WrongContentType(InvalidRequest):
    status = 415


def error_body(error: ShoalError) -> dict[str, Any]:
    """OpenAI's error object, under the key `error`."""
    answer = next(answer for kind, answer in ANSWERS if isinstance(error, kind))
    return error_form(error.message, answer.type, error.param, error.code or answer.code)


def error_form(
    message: str, error_type: str, param: str | None, code: str | None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def error_response(error: ShoalError) -> Response:
    headers = {}
    if isinstance(error, RetryError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, RequestTooLarge):
        # What is left of the body must not be read as the next request.
        headers["connection"] = "close"
    return json_response(error_body(error), error.status, headers)


def unexpected(request_id: str) -> InternalError:
    """What a client hears of an exception nobody meant: nothing but where to find it."""
    return InternalError(
        f"the server failed in a way it should not; its log tells more under {request_id}"
    )


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")
