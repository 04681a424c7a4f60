"""A launcher of this machine, without its workers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shoal.errors import PlacementError
from shoal.fleet import launch_local
from shoal.fleet.launch_local import LocalLauncher


def test_a_launcher_that_is_closed_is_told_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent_nursery(_options: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(["sh", "-c", "cat > /dev/null"], stdin=pipe, stdout=pipe)

    monkeypatch.setattr(launch_local, "_start_nursery", silent_nursery)
    launcher = LocalLauncher("unix:/head", Path("/nowhere"), lambda *_: None, cores=[])
    launcher.close()
    launcher.stop("w")
    with pytest.raises(PlacementError, match="has ended"):
        launcher.start("w", "local", num_threads=1)
