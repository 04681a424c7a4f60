"""The real `shoal` command with a real model: generate, chat, serve, bench, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SHOAL = Path(sys.executable).parent / "shoal"
MODEL = "smollm2-135m"
LIMIT_S = 180
ENVIRONMENT = os.environ | {"NO_COLOR": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


def shoal(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHOAL, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=ENVIRONMENT,
        check=False,
    )


def record_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.fixture(autouse=True, scope="module")
def ctrl_c_is_heard() -> Iterator[None]:
    """A script's background jobs ignore SIGINT, and so would all that these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal:
    """`shoal` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [SHOAL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, pattern: str, *, limit_s: float = LIMIT_S) -> str:
        """What appears up to a match of `pattern`."""
        deadline_s = time.monotonic() + limit_s
        seen = ""
        while not re.search(pattern, seen):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no {pattern!r} in {seen!r}"
            if select.select([self._ours], [], [], left_s)[0]:
                seen += os.read(self._ours, 4096).decode(errors="replace")
        return seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_generate_streams_the_same_text_each_time() -> None:
    arguments = ("generate", MODEL, "--temperature", "0", "--max-tokens", "12")
    done = shoal(*arguments, stdin="The capital of France is")
    assert (done.returncode, "Paris" in done.stdout) == (0, True), done.stderr
    assert "12 tokens at" in done.stderr
    record = record_of(shoal(*arguments, "--json", "The capital of France is"))
    assert record["samples"][0]["text"] + "\n" == done.stdout


def test_each_line_of_a_pipe_is_answered() -> None:
    done = shoal(
        *("chat", MODEL, "--temperature", "0", "--max-tokens", "12"),
        stdin="What is 2+2?\n/nonsense\nSay hello.\n",
    )
    assert done.returncode == 0, done.stderr
    assert "4" in done.stdout.splitlines()[0] and len(done.stdout.splitlines()) >= 2
    assert "no command /nonsense" in done.stderr


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves() -> None:
    with terminal("chat", MODEL, "--temperature", "0", "--max-tokens", "4000") as chat:
        chat.read_until(">>> ")
        chat.type("Write a very long story about the sea, in twenty chapters.\n")
        chat.read_until(r"\n(\S+\s+){8}")
        chat.process.send_signal(signal.SIGINT)
        chat.read_until(r"stopped(.|\n)*>>> ", limit_s=20)
        chat.type("Say yes.\n")
        chat.read_until(r"Say yes\.\s+\S+(.|\n)*>>> ")
        chat.process.send_signal(signal.SIGINT)
        chat.read_until(r"Ctrl-D(.|\n)*>>> ", limit_s=20)
        chat.type("\x04")
        assert chat.process.wait(30) == 0


def test_an_unknown_model_is_one_line() -> None:
    done = shoal("generate", "smolm2-135m", "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "smollm2-135m" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{SHOAL} generate {MODEL} 'Once upon a time' --max-tokens 200 | head -c 10"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=ENVIRONMENT,
        check=True,
    )
    assert len(done.stdout) == 10
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def wait_for_url(process: subprocess.Popen[str], log: Path) -> str:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        found = re.search(r"API\s+(\S+)/v1", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no address in {log.read_text()!r}")


def test_serve_is_measured_talked_to_and_interrupted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [SHOAL, "serve", MODEL, "--port", "0", "--max-context", "512"],
            stdout=file,
            stderr=file,
            text=True,
            env=ENVIRONMENT,
        )
    try:
        url = wait_for_url(server, log)
        check_bench(url)
        check_chat(url)
        busy = shoal("serve", MODEL, "--port", url.rpartition(":")[2])
        assert busy.returncode == 1 and "choose another with --port" in busy.stderr
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    said = log.read_text()
    for part in ("98.4 MB", "KV cache of", "context of 512", f"{url}/docs", "curl", "stopped"):
        assert part in said
    assert "Traceback" not in said


def check_bench(url: str) -> None:
    load = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "20", "--max-tokens", "8")
    record = record_of(shoal("bench", "--url", url, *load))
    assert (record["num_requests"], record["num_errors"]) == (6, 0)
    assert (record["num_prompt_tokens"], record["num_output_tokens"]) == (120, 48)
    assert 0 < record["ttft"]["p50_ms"] <= record["latency"]["p50_ms"]
    too_long = shoal("bench", "--url", url, "--requests", "2", "--prompt-tokens", "600")
    assert too_long.returncode == 1
    assert "600 tokens and the context 512" in too_long.stderr


def check_chat(url: str) -> None:
    # Eight exchanges do not fit a context of 512 with room for an answer.
    questions = "".join(f"Tell me one fact about the number {n}.\n" for n in range(8))
    done = shoal("chat", "--url", url, "--temperature", "0", "--max-tokens", "60", stdin=questions)
    assert done.returncode == 0, done.stderr
    assert "forgot the oldest" in done.stderr
    assert done.stdout.strip()
