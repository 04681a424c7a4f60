"""What `make demo` shows: a server, a question asked over HTTP as any client would, its answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

MODEL = "smollm2-135m"
QUESTION = "Why is the sky blue? Answer in two or three sentences."
SHOAL = Path(sys.executable).parent / "shoal"
START_LIMIT_S = 180
STOP_LIMIT_S = 20
LOG_TAIL_LINES = 30


class DemoFailed(Exception):
    pass


def main() -> int:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            _show(log)
        except (DemoFailed, httpx.HTTPError) as error:
            print(f"\nThe demo failed: {error}", file=sys.stderr)
            print(f"The end of the server's log:\n{_tail(log)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


def _show(log: IO[str]) -> None:
    _say(f"Fetching {MODEL}, a real model of 135 million parameters (98 MB, once)")
    _pull()
    _say("Starting the server")
    with _server(log) as (url, process):
        print(f"$ curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\")
        print(f"    -d '{json.dumps(_body())}'")
        _say(f"Asking it over HTTP: {QUESTION}")
        num_tokens, elapsed_s = _ask(url)
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with status {process.returncode}")
        print(f"\n({num_tokens} tokens in {elapsed_s:.1f} s)")
        _say("The API and its docs, while a server runs")
        print("  API   http://127.0.0.1:8000/v1    any OpenAI client: base_url, any key")
        print("  docs  http://127.0.0.1:8000/docs")
        print("  keep one running with:  make serve")


def _pull() -> None:
    pulled = subprocess.run([SHOAL, "pull", MODEL], stdout=subprocess.DEVNULL, check=False)
    if pulled.returncode != 0:
        raise DemoFailed(f"'shoal pull {MODEL}' ended with status {pulled.returncode}")


@contextmanager
def _server(log: IO[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that is ready, and its process. It is stopped at the end."""
    command = [SHOAL, "serve", MODEL, "--port", "0"]
    # A wide terminal: the address is read from what the server says, and must not be wrapped.
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield _wait_for_health(process, log), process
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGINT)
    try:
        status = process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise DemoFailed(f"the server did not stop within {STOP_LIMIT_S} s") from error
    if status != 0:
        raise DemoFailed(f"the server ended with status {status}")


def _wait_for_health(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with status {process.returncode}")
        url = _url_in(_read(log))
        if url is not None and _is_healthy(url):
            return url
        time.sleep(0.1)
    raise DemoFailed(f"the server was not ready within {START_LIMIT_S} s")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.TransportError:
        return False


def _ask(url: str) -> tuple[int, float]:
    """Print the answer as it streams in. Returns its length in tokens, and the seconds it took."""
    start_s = time.monotonic()
    num_tokens, text = 0, ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=_body(), timeout=120) as answer:
        if not answer.is_success:
            raise DemoFailed(f"HTTP status {answer.status_code}: {answer.read().decode()}")
        for event in _events(answer):
            if "error" in event:
                raise DemoFailed(event["error"]["message"])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                text += piece
                print(piece, end="", flush=True)
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    if not text.strip() or num_tokens == 0:
        raise DemoFailed("the answer is empty")
    return num_tokens, time.monotonic() - start_s


def _body() -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _url_in(log_text: str) -> str | None:
    """The server says `  API   http://127.0.0.1:PORT/v1` once it listens."""
    for line in log_text.splitlines():
        if line.strip().startswith("API "):
            return line.split()[-1].removesuffix("/v1")
    return None


def _read(log: IO[str]) -> str:
    # pread leaves alone the position at which the server goes on writing.
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def _tail(log: IO[str]) -> str:
    return "\n".join(_read(log).splitlines()[-LOG_TAIL_LINES:])


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
