"""What `make demo` shows: a server, a question asked over HTTP as any client would, its answer.

Then the model over two processes, one of which is killed in the middle of the answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

MODEL = "smollm2-135m"
QUESTION = "Why is the sky blue? Answer in two or three sentences."
SPLIT = ("--pipeline", "2", "--spares", "1", "--dtype", "float32")
HALF = 30
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
        answer = _ask(url)
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with status {process.returncode}")
        print(f"\n({answer.num_tokens} tokens in {answer.elapsed_s:.1f} s)")
    _say("The same model over two processes, with a third that stands by")
    with _server(log, *SPLIT) as (url, process):
        print(f"$ shoal serve {MODEL} {' '.join(SPLIT)}")
        calm = _ask(url, shows=False)
        _say("Asking again, and killing one of the two in the middle of its answer")
        victim = _worker_of(process.pid)
        answer = _ask(url, on_half=lambda: _kill(victim))
        if answer.text != calm.text:
            raise DemoFailed(f"the answer differs from the calm one: {calm.text}")
        print(f"\n(the same answer; its longest pause was {answer.longest_gap_s:.2f} s)")
        _say("The API and its docs, while a server runs")
        print("  API   http://127.0.0.1:8000/v1    any OpenAI client: base_url, any key")
        print("  docs  http://127.0.0.1:8000/docs")
        print("  keep one running with:  make serve")


def _pull() -> None:
    pulled = subprocess.run([SHOAL, "pull", MODEL], stdout=subprocess.DEVNULL, check=False)
    if pulled.returncode != 0:
        raise DemoFailed(f"'shoal pull {MODEL}' ended with status {pulled.returncode}")


def _worker_of(server_pid: int) -> int:
    words = [str(SHOAL), "status", "--json", "--pid", str(server_pid)]
    told = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    pid: int = told["fleet"]["replicas"][0]["stats"]["workers"][0]["pid"]
    return pid


def _kill(pid: int) -> None:
    print(f" [kill -9 {pid}] ", end="", flush=True)
    os.kill(pid, signal.SIGKILL)


@contextmanager
def _server(log: IO[str], *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that is ready, and its process. It is stopped at the end."""
    start = len(_read(log))
    command = [str(SHOAL), "serve", MODEL, "--port", "0", *options]
    # A wide terminal: the address is read from what the server says, and must not be wrapped.
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield _wait_for_health(process, log, start), process
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


def _wait_for_health(process: subprocess.Popen[bytes], log: IO[str], start: int) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with status {process.returncode}")
        url = _url_in(_read(log)[start:])
        if url is not None and _is_healthy(url):
            return url
        time.sleep(0.1)
    raise DemoFailed(f"the server was not ready within {START_LIMIT_S} s")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.TransportError:
        return False


@dataclass
class Answer:
    text: str = ""
    num_tokens: int = 0
    elapsed_s: float = 0.0
    longest_gap_s: float = 0.0


def _ask(url: str, *, shows: bool = True, on_half: Callable[[], None] | None = None) -> Answer:
    """The answer, printed as it streams in. `on_half` is called in the middle of it."""
    start_s = last_s = time.monotonic()
    found, num_pieces = Answer(), 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=_body(), timeout=120) as answer:
        if not answer.is_success:
            raise DemoFailed(f"HTTP status {answer.status_code}: {answer.read().decode()}")
        for event in _events(answer):
            if "error" in event:
                raise DemoFailed(event["error"]["message"])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                found.text += piece
                if shows:
                    print(piece, end="", flush=True)
                now_s = time.monotonic()
                if num_pieces:
                    found.longest_gap_s = max(found.longest_gap_s, now_s - last_s)
                num_pieces, last_s = num_pieces + 1, now_s
                if num_pieces == HALF and on_half is not None:
                    on_half()
            usage = event.get("usage") or {}
            found.num_tokens = usage.get("completion_tokens", found.num_tokens)
    if not found.text.strip() or found.num_tokens == 0:
        raise DemoFailed("the answer is empty")
    found.elapsed_s = time.monotonic() - start_s
    return found


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
