"""How a command finds the servers of this user on this machine: each leaves a small file."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil

from shoal.errors import ConfigError
from shoal.fleet.state import StateFolder

log = logging.getLogger(__name__)

# A process that began so much later than a file was written is not the one that wrote it.
_CLOCK_SLACK_S = 60.0


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A running `shoal serve`. `control` is where operators call; "" if it has no workers."""

    pid: int
    host: str
    model: str
    url: str
    control: str
    started_s: float


@contextmanager
def register(state: StateFolder, *, model: str, url: str, control: str) -> Iterator[None]:
    """This process serves from here to the end of the block.

    A folder that cannot be written is logged only: serving matters more than being found.
    """
    serving = Serving(
        pid=os.getpid(),
        host=platform.node(),
        model=model,
        url=url,
        control=control,
        started_s=time.time(),
    )
    path = state.serving / f"{serving.pid}-{url.rpartition(':')[2]}.json"
    try:
        state.create()
        state.serving.mkdir(mode=0o700, exist_ok=True)
        state.write(path, msgspec.json.encode(serving))
    except (ConfigError, OSError) as error:
        log.warning("'shoal status' will not find this server: %s", error)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def find(state: StateFolder, *, model: str | None = None, pid: int | None = None) -> Serving:
    """The one server that fits. Raises ConfigError if there is none, or more than one."""
    running = list_serving(state)
    fitting = [each for each in running if model in (None, each.model) and pid in (None, each.pid)]
    if len(fitting) == 1:
        return fitting[0]
    if not running:
        raise ConfigError(
            "no model is served on this machine by this user: start one with 'shoal serve MODEL', "
            "or type this where it runs"
        )
    if not fitting:
        raise ConfigError(f"no such server here; running are:\n{_listed(running)}")
    raise ConfigError(f"choose one with --pid (or --model):\n{_listed(fitting)}")


def list_serving(state: StateFolder) -> list[Serving]:
    """Those that run, oldest first. Files of processes that are gone are removed."""
    found = [_read(path) for path in sorted(state.serving.glob("*.json"))]
    # In a home that machines share, only each of them knows whether its own processes live.
    own = [each for each in found if each is not None and each.host == platform.node()]
    return sorted((each for each in own if _is_running(each)), key=lambda each: each.started_s)


def _read(path: Path) -> Serving | None:
    try:
        serving = msgspec.json.decode(path.read_bytes(), type=Serving)
    except FileNotFoundError:
        return None  # it has just ended
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s is ignored (%s): remove it, unless another Shoal wrote it", path, error)
        return None
    if serving.host == platform.node() and not _exists(serving.pid):
        path.unlink(missing_ok=True)
        return None
    return serving


def _exists(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_running(serving: Serving) -> bool:
    """And it is not another process that was given its number."""
    try:
        began_s = psutil.Process(serving.pid).create_time()
    except psutil.Error:
        return False
    return bool(began_s < serving.started_s + _CLOCK_SLACK_S)


def _listed(servers: Sequence[Serving]) -> str:
    return "\n".join(f"  --pid {each.pid}  {each.model} at {each.url}" for each in servers)
