"""`shoal serve` as a child process, for those who measure it from outside."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil

SHOAL = Path(sys.executable).parent / "shoal"
_START_LIMIT_S = 180
_STOP_LIMIT_S = 60
_LOOK_S = 0.005


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """`started_s` and `ready_s` are on the clock of time.perf_counter."""

    url: str
    process: psutil.Process
    started_s: float
    ready_s: float


@contextmanager
def served(model: str, options: Sequence[str] = ()) -> Iterator[Served]:
    """A server on a free port, once its /health is good. Raises RuntimeError with what it said."""
    with tempfile.TemporaryFile("w+") as log:
        command = [str(SHOAL), "serve", model, "--port", "0", *options]
        started_s = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = _wait_for_url(child, log.fileno())
            httpx.get(f"{url}/health", timeout=_START_LIMIT_S).raise_for_status()
            yield Served(
                url=url,
                process=psutil.Process(child.pid),
                started_s=started_s,
                ready_s=time.perf_counter(),
            )
        finally:
            child.terminate()
            try:
                child.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_for_url(child: subprocess.Popen[bytes], log_fd: int) -> str:
    deadline_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline_s:
        said = Path(f"/proc/self/fd/{log_fd}").read_text()
        if found := re.search(r"API\s+(\S+)/v1", said):
            return found[1]
        if child.poll() is not None:
            raise RuntimeError(f"the server ended with {child.returncode}: {said}")
        time.sleep(_LOOK_S)
    raise RuntimeError(f"the server was not ready after {_START_LIMIT_S} s")
