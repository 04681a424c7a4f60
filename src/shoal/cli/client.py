"""Talks to a running server as any OpenAI client would, and turns its errors into Shoal's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from shoal.errors import (
    CallerError,
    ConfigError,
    ContextTooLong,
    InvalidRequest,
    OperatorError,
    RetryError,
    ShoalError,
)

TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_DATA = "data: "


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """`max_context` is None when the server does not say."""

    name: str
    max_context: int | None


def base_url(url: str) -> str:
    """`127.0.0.1:8000`, `http://host/` and `http://host/v1` all become `http://host`."""
    url = url if "://" in url else f"http://{url}"
    parts = httpx.URL(url)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"'{url}' is not the address of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Raises ConfigError or OperatorError, with the address, for what httpx raises."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ConfigError(
            f"nothing answers at {url}; start a server with 'shoal serve MODEL', or correct --url"
        ) from error
    except httpx.TimeoutException as error:
        raise OperatorError(f"{url} did not answer in time; see its /health and its log") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OperatorError(f"the connection to {url} failed: {error}") from error


def served_model(client: httpx.Client, name: str | None = None) -> ServedModel:
    """The model called `name`, or the first that the server lists."""
    response = client.get("/v1/models")
    raise_for_error(response)
    listed = response.json()["data"]
    for entry in listed:
        if name in (None, entry["id"]):
            return ServedModel(name=entry["id"], max_context=entry.get("max_model_len"))
    names = ", ".join(entry["id"] for entry in listed) or "none"
    raise ConfigError(f"{client.base_url} does not serve '{name}'; it serves: {names}")


def raise_for_error(response: httpx.Response) -> None:
    """Raise what an error answer says; its body must have been read."""
    if response.is_success:
        return
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"{response.url} answered {response.status_code}: {response.text:.200}"}
    raise server_error(error, response.status_code)


def server_error(error: dict[str, Any], status: int = 500) -> ShoalError:
    """OpenAI's error object as one of Shoal's errors."""
    message, code = str(error.get("message")), error.get("code")
    if code == "context_length_exceeded":
        return ContextTooLong(message, code=code)
    if status in (429, 503):
        return RetryError(message, code=code)
    if status == 400:
        return InvalidRequest(message, code=code)
    return CallerError(message, code=code) if status < 500 else OperatorError(message, code=code)


def event_of(line: str) -> dict[str, Any] | None:
    """The JSON of one line of an event stream, None for other lines and the end.

    Raises what an error event says.
    """
    if not line.startswith(_DATA) or line == f"{_DATA}[DONE]":
        return None
    event: dict[str, Any] = msgspec.json.decode(line.removeprefix(_DATA))
    if "error" in event:
        raise server_error(event["error"])
    return event
