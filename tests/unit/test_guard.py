"""The guard leaves nothing of a command behind, whatever happens to whoever started it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

GUARD = [sys.executable, "-m", "shoal.fleet.guard", "0.3"]

# A child, which starts a grandchild in a session of its own that ignores SIGTERM.
STUBBORN = """
trap '' TERM
setsid sh -c 'trap "" TERM; echo $$ > "$0/grandchild"; exec sleep 60' "$1" &
echo $$ > "$1/child"
{then}
"""


@contextmanager
def guarded(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*GUARD, *command], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def wait_for_pid(path: Path, process: subprocess.Popen[bytes]) -> psutil.Process:
    while not (path.exists() and path.read_text()):
        assert process.poll() is None
    return psutil.Process(int(path.read_text()))


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def test_the_status_of_the_command_is_passed_on() -> None:
    with guarded("sh", "-c", "exit 3") as process:
        assert process.wait(20) == 3


def test_orphans_end_with_the_command(tmp_path: Path) -> None:
    script = STUBBORN.format(then='while [ ! -s "$1/grandchild" ]; do :; done; exit 0')
    with guarded("sh", "-c", script, "sh", str(tmp_path)) as process:
        orphan = wait_for_pid(tmp_path / "grandchild", process)
        assert process.wait(20) == 0
        assert_gone([orphan])


def test_all_end_with_whoever_started_the_guard(tmp_path: Path) -> None:
    with guarded("sh", "-c", STUBBORN.format(then="sleep 60"), "sh", str(tmp_path)) as process:
        left = [wait_for_pid(tmp_path / name, process) for name in ("child", "grandchild")]
        # The kernel closes the pipe of a killed process as this does.
        assert process.stdin is not None
        process.stdin.close()
        # Well-behaved commands end at once; this one must be killed after the grace.
        assert process.wait(20) == 1
        assert_gone(left)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_the_command_ends_even_if_the_guard_is_killed() -> None:
    with guarded("sleep", "60") as process:
        guard = psutil.Process(process.pid)
        while not (children := guard.children()):
            assert process.poll() is None
        process.kill()
        assert_gone(children)
