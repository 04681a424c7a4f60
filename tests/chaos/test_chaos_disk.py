"""The journal's disk is full and a worker is killed: the stream ends as it would have."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from mayhem import MODEL, clean_fleet, config_of, incident, kill
from scripted_head import eventually
from split_fleets import open_yard

from shoal.config import Split
from shoal.engine.api import AsyncEngine
from shoal.journal.writer import SqliteJournal
from shoal.server.app import create_app
from shoal.server.run import bind, make_server, url_of

pytestmark = pytest.mark.slow

DISK_BYTES = 2**20
NUM_TOKENS = 48


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"]
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", *options, str(tmp_path)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@contextmanager
def served(engine: AsyncEngine, journal: SqliteJournal) -> Iterator[str]:
    listener = bind("127.0.0.1", 0)
    server = make_server(create_app(engine, journal=journal), grace_s=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


def texts(url: str) -> Iterator[str]:
    """Of one completion, as they come."""
    asked = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "stream": True}
    body = asked | {"max_tokens": NUM_TOKENS}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                yield from (choice["text"] for choice in choices)


def test_a_worker_dies_while_the_disk_of_the_journal_is_full(disk: Path) -> None:
    ballast = disk / "ballast"
    with open_yard() as yard, clean_fleet(yard, config_of(split=Split(pipeline=2))) as fleet:
        journal = SqliteJournal(disk / "journal.sqlite", MODEL, retry_s=0.1)
        try:
            with served(fleet.engine, journal) as url:
                calm = "".join(texts(url))
                assert journal.trouble is None
                stream = texts(url)
                begun = [next(stream) for _ in range(5)]
                with suppress(OSError):
                    ballast.write_bytes(b"x" * DISK_BYTES)
                eventually(lambda: "full" in (journal.trouble or ""), "nobody has noticed")
                kill(fleet.engine, 1)
                assert "".join([*begun, *stream]) == calm
                assert len(incident(fleet.engine.stats()).lost) == 1
                ballast.unlink()
                eventually(lambda: journal.trouble is None, "it does not go on")
                assert "".join(texts(url)) == calm
        finally:
            journal.close()
