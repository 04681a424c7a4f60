"""From a request for an answer to the answer: begun, or come back to after a break.

A client that streams comes back with `Last-Event-ID`, by POST on the same path or by GET with the
response's id, and gets what follows. One that waits for a whole answer knows no id before it has
it, so it sends an `Idempotency-Key` with its POST and repeats it all: the answer is the first's.
Whoever knows an id or a key can read the answer: ids cannot be guessed, and keys should not be.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.api import AsyncEngine, Delta
from shoal.errors import InvalidRequest
from shoal.journal.api import Accepted
from shoal.request import SamplingParams
from shoal.server.errors import json_response
from shoal.server.gathered import Gathered
from shoal.server.places import (
    FORGET_PLACE,
    event_id,
    idempotency_key,
    last_event_id,
    wanted_place,
)
from shoal.server.response_log import Follower, ResponseLog
from shoal.server.schema import parse
from shoal.server.schema_generation import GenerationRequest
from shoal.server.service import Service, service_of
from shoal.server.streaming import EventStream, event, while_connected

RESPONSE_ID_HEADER = "x-response-id"


AskedT = TypeVar("AskedT", bound=GenerationRequest)


class Answer(Protocol):
    """A response in the words of one API."""

    def body(self, gathered: Gathered) -> dict[str, Any]:
        """Whole."""
        ...

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any] | None]:
        """What one step adds, None where it shows nothing; from the first step, in order.

        Their number depends on the steps only, not on what is shown.
        """
        ...

    def closing(self) -> list[dict[str, Any]]:
        """What follows the last step."""
        ...


@dataclass(frozen=True)
class Endpoint(Generic[AskedT]):
    """What is different between one API and another; `prefix` begins its response ids."""

    path: str
    prefix: str
    schema: type[AskedT]
    params: Callable[[AskedT], SamplingParams]
    tokenize: Callable[[AsyncEngine, AskedT], Awaitable[list[list[int]]]]
    answer: Callable[[AsyncEngine, AskedT, Accepted], Awaitable[Answer]]


async def create(request: Request, endpoint: Endpoint[AskedT]) -> Response:
    """Answers a POST. Raises ShoalError."""
    service = service_of(request)
    place = last_event_id(request)
    if place is not None:
        response = await service.responses.find(place.response_id, endpoint.path)
        asked = _asked_before(endpoint, response.accepted, stream=True)
        return await _reply(request, endpoint, asked, response, after=place.number)
    body = await service.read_json(request)
    asked = service.parse(endpoint.schema, body)
    response = await _begin(service, endpoint, asked, body, idempotency_key(request))
    return await _reply(request, endpoint, asked, response, after=0)


async def come_back(request: Request, endpoint: Endpoint[AskedT], response_id: str) -> Response:
    """Answers a GET. Raises ShoalError."""
    place = wanted_place(request, response_id)
    response = await service_of(request).responses.find(response_id, endpoint.path)
    asked = _asked_before(endpoint, response.accepted, stream=place is not None)
    return await _reply(request, endpoint, asked, response, after=place.number if place else 0)


async def _begin(
    service: Service,
    endpoint: Endpoint[AskedT],
    asked: AskedT,
    body: dict[str, Any],
    key: str | None,
) -> ResponseLog:
    params = endpoint.params(asked)
    if key is not None:
        response = await service.responses.find_by_key(key, endpoint.path, body)
        if response is not None:
            return response
    return await service.responses.begin(
        response_id=f"{endpoint.prefix}-{uuid.uuid4().hex}",
        endpoint=endpoint.path,
        created_s=int(time.time()),
        body=body,
        prompts=await endpoint.tokenize(service.engine, asked),
        params=params,
        priority=asked.priority,
        key=key,
    )


def _asked_before(endpoint: Endpoint[AskedT], accepted: Accepted, *, stream: bool) -> AskedT:
    """The request as it was, but for how the answer is to come. Raises InvalidRequest."""
    asked = parse(endpoint.schema, accepted.body)
    options = asked.stream_options if stream else None
    asked = asked.model_copy(update={"stream": stream, "stream_options": options})
    endpoint.params(asked)  # some answers cannot be streamed
    return asked


async def _reply(
    request: Request,
    endpoint: Endpoint[AskedT],
    asked: AskedT,
    response: ResponseLog,
    *,
    after: int,
) -> Response:
    accepted = response.accepted
    headers = {RESPONSE_ID_HEADER: accepted.response_id}
    follower = response.follow()
    with ExitStack() as stack:
        stack.callback(follower.close)
        answer = await endpoint.answer(service_of(request).engine, asked, accepted)
        if not asked.stream:
            entries = await while_connected(request.receive, follower.to_the_end())
            return json_response(answer.body(Gathered(accepted, entries)), headers=headers)
        stack.pop_all()  # the stream closes it
    return EventStream(follower, _events(answer, follower, after), headers)


async def _events(answer: Answer, follower: Follower, after: int) -> AsyncGenerator[bytes, None]:
    """Those numbered above `after`. A place is told as long as the journal has what it covers."""
    response = follower.response
    number = 0
    was_told = after > 0

    def written(chunk: dict[str, Any]) -> bytes:
        nonlocal was_told
        if response.is_kept:
            was_told = True
            return event(chunk, event_id(response.accepted.response_id, number))
        return event(chunk, FORGET_PLACE if was_told else b"")

    async for choice, delta in follower:
        for chunk in answer.chunks(choice, delta):
            number += 1
            if chunk is not None and number > after:
                yield written(chunk)
    for chunk in answer.closing():
        number += 1
        if number > after:
            yield written(chunk)
    if after > number:
        raise InvalidRequest(
            f"there is no event {after}: this stream has {number}", code="invalid_last_event_id"
        )
