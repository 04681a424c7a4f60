"""`serve` in a process of its own: SIGTERM lets an open stream finish, then it returns."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from server_fakes import MODEL

_PROGRAM = """
import asyncio
from server_fakes import FakeEngine
from shoal.server.run import serve

engine = FakeEngine("x" * 30)
engine.delay_s = 0.02
asyncio.run(serve(engine, "127.0.0.1", 0, on_ready=lambda url: print(url, flush=True)))
print("the engine can be closed now", flush=True)
"""


@pytest.mark.slow
def test_sigterm_ends_the_server_and_not_its_streams() -> None:
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True, cwd=here
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"model": MODEL, "prompt": "a", "stream": True, "max_tokens": 50}
        with (
            httpx.Client() as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            process.send_signal(signal.SIGTERM)
            received = answer.read().decode()
        assert process.stdout.read() == "the engine can be closed now\n"
        assert process.wait(timeout=10) == 0
    assert received.count('"text":"x"') == 30
    assert received.endswith("data: [DONE]\n\n")
