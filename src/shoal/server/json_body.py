"""Reading a request's body: bounded while it arrives, then decoded as strict JSON."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.requests import Request

from shoal.errors import InvalidRequest
from shoal.server.errors import RequestTooLarge, WrongContentType

# A client that is still sending does not read yet: it sees the refusal only if the rest of a
# body not much too large is taken off its hands.
DISCARD_FACTOR = 4

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises RequestTooLarge, WrongContentType, InvalidRequest (not UTF-8, not JSON, no object), and
    starlette's ClientDisconnect.
    """
    _check_content_type(request)
    payload = _decode(await _read(request, max_bytes))
    if not isinstance(payload, dict):
        raise InvalidRequest(
            f"the body must be a JSON object, got {_json_type(payload)}", code="invalid_json"
        )
    return payload


def _check_content_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongContentType(
            f"the body must be JSON: send the header 'content-type: application/json', "
            f"not '{content_type}'",
            code="unsupported_media_type",
        )


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    declared_bytes = int(declared) if declared.isdecimal() else 0
    asks_first = "100-continue" in request.headers.get("expect", "").lower()
    if declared_bytes > max_bytes and (asks_first or declared_bytes > DISCARD_FACTOR * max_bytes):
        raise _too_large(max_bytes)
    body = bytearray()
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes <= max_bytes:
            body += piece
        elif num_bytes > DISCARD_FACTOR * max_bytes:
            break
    if num_bytes > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the body is larger than the {max_bytes} bytes this server accepts; "
        "send less text or fewer prompts at once",
        code="request_too_large",
    )


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise _not_json(f"not valid UTF-8 ({error.reason})") from error
    except msgspec.DecodeError as error:
        if _SURROGATE_ESCAPE.search(body):
            raise _not_json(f"{error}, or half of a surrogate pair") from error
        raise _not_json(str(error)) from error
    except RecursionError as error:
        raise _not_json("nested too deeply") from error


def _not_json(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
