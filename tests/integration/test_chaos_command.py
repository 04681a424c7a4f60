"""`shoal chaos` against a real `shoal serve` whose workers it kills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHOAL = str(Path(sys.executable).parent / "shoal")
MODEL = "smollm2-135m"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"SHOAL_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def log(tmp_path: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Of a server with two workers, which serves."""
    path = tmp_path / "serve.log"
    words = ["--dtype", "float32", "--quantize", "none", "--pipeline", "2", "--port", "0"]
    with path.open("w") as file:
        server = subprocess.Popen(
            [SHOAL, "serve", MODEL, *words, "--kv-memory", "128MiB"],
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        deadline_s = time.monotonic() + 120
        while not re.search(r"API\s+\S+/v1", path.read_text()):
            assert server.poll() is None, path.read_text()
            assert time.monotonic() < deadline_s, path.read_text()
            time.sleep(0.1)
        yield path
    finally:
        server.terminate()
        assert server.wait(60) in (0, -15, 143), path.read_text()


def shoal(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHOAL, *words], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_no_stream_breaks_and_no_answer_differs(log: Path, environment: dict[str, str]) -> None:
    words = ("--kill-every", "1s", "--for", "8s", "--streams", "6", "--max-tokens", "16")
    result = shoal(environment, "chaos", *words)
    *_, last = result.stdout.splitlines()
    record = json.loads(last)
    said = result.stdout + result.stderr + log.read_text()
    assert result.returncode == 0, said
    assert record["num_kills"] >= 2, said
    assert (record["num_broken"], record["num_different"]) == (0, 0), said
    assert record["num_requests"] >= 6
    assert sum(record["recoveries"].values()) >= 1, said
    assert record["hit_gaps"]["max_s"] > 0

    events = [
        json.loads(line) for line in shoal(environment, "events", "--json").stdout.splitlines()
    ]
    ended = [each for each in events if each["outcome"] == "recovered"]
    assert len(ended) >= 1
    assert sum(len(each["lost"]) for each in events) >= record["num_kills"]
    assert all(each["phases"]["total"] > 0 for each in ended)
    assert "r0 lost r0s" in log.read_text()
