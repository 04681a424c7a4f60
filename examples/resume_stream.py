"""Reads a stream to its end, whatever breaks: the connection, or the server itself.

`python examples/resume_stream.py http://127.0.0.1:8000 smollm2-135m "Once upon a time"`, and then
kill the server and start it again while the text runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import httpx

PATIENCE_S = 120


class Broken(Exception):
    """The stream has ended too early; the rest may be had later."""


class Reader:
    """`place` is what the server calls the last event read, as it wants to hear it again."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        self._url = url
        self._body = body
        self.place = ""

    def read(self) -> Iterator[str]:
        """The text that follows `place`, piece by piece. Raises Broken."""
        headers = {"Last-Event-ID": self.place} if self.place else {}
        try:
            with httpx.stream(
                "POST", self._url, json=self._body, headers=headers, timeout=60
            ) as answer:
                if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    raise Broken("the server is not ready")
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        return
                    yield from self._text(line)
        except httpx.TransportError as error:
            raise Broken(str(error)) from error
        raise Broken("the server has closed the connection")

    def _text(self, line: str) -> Iterator[str]:
        name, _, value = line.partition(": ")
        if name == "id":
            self.place = value
        elif name == "data":
            chunk = json.loads(value)
            if "error" in chunk:
                raise Broken(chunk["error"]["message"])
            yield chunk["choices"][0]["text"]


def main() -> None:
    url, model, prompt = sys.argv[1:]
    body = {"model": model, "prompt": prompt, "max_tokens": 400, "stream": True}
    reader = Reader(f"{url}/v1/completions", body)
    limit_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            for text in reader.read():
                print(text, end="", flush=True)
                limit_s = time.monotonic() + PATIENCE_S
            print()
            return
        except Broken as broken:
            if not reader.place or time.monotonic() > limit_s:
                raise SystemExit(f"\n{broken}") from broken
            time.sleep(0.5)


if __name__ == "__main__":
    main()
