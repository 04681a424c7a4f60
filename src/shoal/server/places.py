"""How a client names a response, and how far it has read it."""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.requests import Request

from shoal.errors import InvalidRequest

_PLACE = re.compile(r"([a-z]+-[0-9a-f]{32}):([0-9]{1,12})")
_KEY = re.compile(r"[\x21-\x7e]{1,128}")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class Place(NamedTuple):
    """After event `number` of a response's stream; 0 is before its first.

    Every step of every choice has a number, whether it shows anything or not, and so has what
    opens a choice and what closes the stream. So numbers are the same for every reader.
    """

    response_id: str
    number: int


def event_id(response_id: str, number: int) -> bytes:
    """The line of a server-sent event that tells its place."""
    return f"id: {response_id}:{number}\n".encode()


FORGET_PLACE = b"id\n"
"""The line that makes a client forget what it would send as Last-Event-ID."""


def last_event_id(request: Request) -> Place | None:
    """None if there is none. Raises InvalidRequest."""
    value = request.headers.get("last-event-id", "")
    if not value:
        return None
    match = _PLACE.fullmatch(value)
    if match is None:
        raise InvalidRequest(
            f"Last-Event-ID is '{value:.60}'; send the 'id' of an event of this server, such as "
            "'chatcmpl-…:17'",
            code="invalid_last_event_id",
        )
    return Place(match[1], int(match[2]))


def wanted_place(request: Request, response_id: str) -> Place | None:
    """From where a GET wants the stream; None if it wants the whole answer.

    By Last-Event-ID, or ?stream=true with or without &starting_after=. Raises InvalidRequest.
    """
    place = last_event_id(request)
    if place is not None:
        if place.response_id != response_id:
            raise InvalidRequest(
                f"Last-Event-ID names {place.response_id}, but {response_id} is asked for",
                code="invalid_last_event_id",
            )
        return place
    asked = request.query_params.get("stream", "false").lower()
    after = request.query_params.get("starting_after")
    if asked not in _FLAGS:
        raise InvalidRequest(f"stream is true or false, not '{asked:.20}'", param="stream")
    if after is not None and not (after.isascii() and after.isdecimal() and len(after) <= 12):
        raise InvalidRequest(
            f"starting_after is the number of an event, not '{after:.20}'", param="starting_after"
        )
    if not _FLAGS[asked]:
        if after is not None:
            raise InvalidRequest("starting_after needs stream=true", param="starting_after")
        return None
    return Place(response_id, int(after or 0))


def idempotency_key(request: Request) -> str | None:
    """The client's own name for a request that it may have to repeat. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and _KEY.fullmatch(key) is None:
        raise InvalidRequest(
            "Idempotency-Key has 1 to 128 characters without spaces", code="invalid_key"
        )
    return key
