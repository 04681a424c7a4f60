"""How commands find the servers of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from shoal.errors import ConfigError
from shoal.fleet.serving_file import find, list_serving, register
from shoal.fleet.state import StateFolder


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "state")


def left(state: StateFolder, model: str, **changes: object) -> Path:
    """A file as another server left it; by default one that runs."""
    with register(state, model=model, url="http://127.0.0.1:9000", control=""):
        (own,) = [each for each in list_serving(state) if each.model == model]
    serving = msgspec.structs.replace(own, **({"pid": os.getppid()} | changes))
    path = state.serving / f"{serving.pid}-{model}.json"
    path.write_bytes(msgspec.json.encode(serving))
    return path


def test_a_server_is_found_until_it_ends(state: StateFolder) -> None:
    before_s = time.time()
    with (
        pytest.raises(KeyboardInterrupt),
        register(state, model="m", url="http://[::1]:8000", control="unix:/x"),
    ):
        found = find(state)
        assert (found.pid, found.model, found.url) == (os.getpid(), "m", "http://[::1]:8000")
        assert found.control == "unix:/x"
        assert before_s <= found.started_s <= time.time()
        (path,) = state.serving.iterdir()
        assert path.name == f"{os.getpid()}-8000.json"
        assert [each.stat().st_mode & 0o777 for each in (state.path, state.serving, path)] == [
            0o700,
            0o700,
            0o600,
        ]
        raise KeyboardInterrupt
    assert not list(state.serving.iterdir())
    with pytest.raises(ConfigError, match="shoal serve MODEL"):
        find(state)


def test_among_several_one_is_chosen(state: StateFolder) -> None:
    with register(state, model="m", url="http://127.0.0.1:8000", control=""):
        left(state, "other")
        with pytest.raises(ConfigError) as caught:
            find(state)
        for serving in list_serving(state):
            assert f"--pid {serving.pid}  {serving.model} at {serving.url}" in str(caught.value)
        assert find(state, model="other").pid == os.getppid()
        assert find(state, pid=os.getpid()).model == "m"
        with pytest.raises(ConfigError, match="no such server here"):
            find(state, model="third")


def test_who_is_dead_is_swept_away(state: StateFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    path = left(state, "dead", pid=process.pid)
    assert list_serving(state) == []
    assert not path.exists()


def test_a_zombie_is_dead(state: StateFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.read()  # its end, and nobody has waited for it
        path = left(state, "zombie", pid=process.pid)
        deadline_s = time.monotonic() + 10
        while path.exists() and time.monotonic() < deadline_s:
            list_serving(state)
        assert not path.exists()


def test_another_process_of_that_number_is_not_the_server(state: StateFolder) -> None:
    left(state, "old", started_s=1.0)
    assert list_serving(state) == []


def test_other_machines_share_a_home(state: StateFolder) -> None:
    path = left(state, "far", host="elsewhere", pid=2**22 + 1)
    assert list_serving(state) == []
    assert path.exists()


def test_an_unreadable_file_is_ignored_and_named(
    state: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    path = left(state, "odd")
    path.write_text("{}")
    assert list_serving(state) == []
    assert str(path) in caplog.text


def test_serving_does_not_fail_for_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with register(StateFolder(tmp_path / "file"), model="m", url="http://a:1", control=""):
        pass
    assert "'shoal status' will not find this server" in caplog.text
