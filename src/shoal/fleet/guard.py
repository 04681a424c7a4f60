"""Runs a command so that nothing of it stays behind.

`python -m shoal.fleet.guard GRACE_S COMMAND …`
It ends with whoever holds the other side of its standard input, however that one ends, and takes
all descendants of the command along, also those that have lost their parents.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from functools import partial

import psutil

POLL_S = 0.1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(grace_s: float, command: list[str]) -> int:
    """The command's exit status. When it must end, it has `grace_s` to do so in order."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _leave)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_die_with, os.getpid()),
    )
    status: int | None = None
    try:
        while status is None and not _is_abandoned():
            status = _reap(child.pid)
    except KeyboardInterrupt:
        pass
    finally:
        # The subprocess module must not wait for what has been waited for.
        child.returncode = status if status is not None else 0
        if status is None:
            status = _ask_to_end(child.pid, grace_s)
        _kill_descendants()
    return status


def _leave(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _is_abandoned() -> bool:
    """Waits for a moment. The other side never writes: what can be read is its end."""
    readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
    return bool(readable)


def _reap(pid: int) -> int | None:
    """The exit status of `pid` if it has ended. Orphans of its are reaped too."""
    try:
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                return None
            if ended == pid:
                return os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return 1


def _ask_to_end(pid: int, grace_s: float) -> int:
    os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while time.monotonic() < deadline_s:
        status = _reap(pid)
        if status is not None:
            return status
        time.sleep(POLL_S)
    return 1


def _kill_descendants() -> None:
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            try:
                process.kill()
                process.wait(timeout=1)
            except (psutil.NoSuchProcess, psutil.TimeoutExpired):
                continue


def _die_with(guard: int) -> None:
    """Should the guard itself be killed, even before the kernel knew that it mattered."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guard:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
