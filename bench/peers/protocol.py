"""The lines between a benchmark and an engine in a process of its own: JSON, a call and its answer.

Standard library only: the environments of other engines hold nothing of Shoal's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Settings = dict[str, Any]
Calls = Mapping[str, Callable[..., Any]]
Load = Callable[[Settings], tuple[dict[str, Any], Calls]]
"""From settings to what is to be said of the engine, and what it can be called for."""


class Streams:
    """When which tokens of which stream came, in seconds since this was made."""

    def __init__(self, number: int) -> None:
        self._started_s = time.perf_counter()
        self.arrivals_s: list[list[float]] = [[] for _ in range(number)]
        self.tokens: list[list[int]] = [[] for _ in range(number)]

    def came(self, stream: int, tokens: list[int]) -> None:
        self.counted(stream, len(tokens))
        self.tokens[stream] += tokens

    def counted(self, stream: int, number: int) -> None:
        """For an engine that tells how many tokens came, and not which."""
        now_s = time.perf_counter() - self._started_s
        self.arrivals_s[stream] += [now_s] * number

    def answer(self) -> dict[str, Any]:
        return {"arrivals_s": self.arrivals_s, "tokens": self.tokens}


def serve(load: Load) -> None:
    """An engine's process: load with the settings of the command line, answer till stdin ends."""
    lines = _own_stdout()
    about, calls = load(json.loads(sys.argv[1]))
    _send(lines, {"answer": about})
    for line in sys.stdin:
        _send(lines, answer_to(line, calls))


def answer_to(line: str, calls: Calls) -> dict[str, Any]:
    try:
        call = json.loads(line)
        return {"answer": calls[call.pop("call")](**call)}
    except Exception:
        return {"error": traceback.format_exc(limit=4)}


def call_line(call: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps({"call": call, **arguments}) + "\n"


def parse_answer(line: str, engine: str) -> Any:
    """Raises RuntimeError for an error, and for what is no answer."""
    try:
        reply = json.loads(line)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{engine} answered what is not JSON: {line[:200]!r}") from error
    if not isinstance(reply, dict) or reply.keys() - {"answer", "error"} or len(reply) != 1:
        raise RuntimeError(f"{engine} answered neither an answer nor an error: {line[:200]!r}")
    if "error" in reply:
        raise RuntimeError(f"{engine} failed:\n{reply['error']}")
    return reply["answer"]


def _own_stdout() -> TextIO:
    """Libraries print to what they take for stdout: from here on, that is stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lines


def _send(lines: TextIO, reply: dict[str, Any]) -> None:
    lines.write(json.dumps(reply) + "\n")
    lines.flush()
