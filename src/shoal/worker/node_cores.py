"""Which cores of its node a worker computes on, and with how many threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shoal.compute.threads import set_num_threads
from shoal.errors import ConfigError

_THREADS = Path("/proc/self/task")


def compute_on(cores: Sequence[int], num_threads: int | None) -> None:
    """To be called by the thread that computes. No cores, or None, leave things as they are.

    Raises ConfigError for cores that this process may not use.
    """
    if num_threads is not None:
        set_num_threads(num_threads)
    if cores and _THREADS.is_dir():
        try:
            _pin_all_threads(cores)
        except OSError as error:
            raise ConfigError(
                f"this worker cannot compute on cores {list(cores)}: {error.strerror or error}"
            ) from error


def _pin_all_threads(cores: Sequence[int]) -> None:
    """The system pins one thread at a time, and those of torch's pool exist by now."""
    for thread in _THREADS.iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)
