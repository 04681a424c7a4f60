"""Shared memory between processes: nothing is left behind, whoever dies and whenever."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from communicator_mesh import run_ranks, shared_memory

from shoal.errors import InternalError, OutOfMemory, PeerLost
from shoal.parallel import shared_segment
from shoal.parallel.shared_memory import SharedMemory


def test_the_file_is_private_and_gone_once_all_have_come(tmp_path: Path) -> None:
    segment = shared_segment.create("one", 4096, tmp_path)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(InternalError, match="is in use"):
        shared_segment.create("one", 4096, tmp_path)
    other = shared_segment.attach("one", 4096, time.monotonic() + 5, tmp_path)
    segment.unlink()
    other.memory[7] = 42
    assert segment.memory[7] == 42
    assert shared_memory(3, tmp_path, timeout_s=5)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match="rank 1 has been silent"):
        SharedMemory(0, 2, "alone", timeout_s=0.05, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PeerLost, match="rank 0 did not open"):
        SharedMemory(1, 2, "alone", timeout_s=0.05, folder=tmp_path)


def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from shoal.parallel import shared_segment as s;"
        "kept = s.create('killed', 4096, pathlib.Path(sys.argv[1])); print(flush=True);"
        "time.sleep(60)"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    maker.stdout.readline()
    living = shared_segment.create("living", 4096, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the maker lives: its file stays
    maker.kill()
    maker.wait()
    maker.stdout.close()
    last = shared_segment.create("last", 4096, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shoal-last", "shoal-living"]
    living.unlink()
    last.unlink()


def test_what_another_user_left_open_to_all_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else anybody on the machine could keep ranks from forming."""
    (tmp_path / "shoal-theirs").touch(mode=0o666)
    unlink = Path.unlink

    def sticky(path: Path, missing_ok: bool = False) -> None:
        if path.name == "shoal-theirs":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", sticky)
    shared_segment.create("ours", 4096, tmp_path).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["shoal-theirs"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="no room for"):
        shared_segment.create("huge", 2**60, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InternalError, match="cannot name"):
        shared_segment.create("../escape", 4096, tmp_path)
    with pytest.raises(InternalError, match="Solo"):
        SharedMemory(0, 1, "single", folder=tmp_path)
    segment = shared_segment.create("large", 8192, tmp_path)
    with pytest.raises(InternalError, match="this rank expects 4096"):
        shared_segment.attach("large", 4096, time.monotonic() + 5, tmp_path)
    segment.unlink()
    (tmp_path / "elsewhere").write_bytes(bytes(4096))
    (tmp_path / "shoal-link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        shared_segment.attach("link", 4096, time.monotonic() + 5, tmp_path)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    ranks = shared_memory(2, tmp_path, timeout_s=5)
    with pytest.raises(InternalError, match=r"not torch\.float64"):
        ranks[0].all_reduce(torch.ones(3, dtype=torch.float64))


def test_many_calls_in_a_row_agree(tmp_path: Path) -> None:
    ranks = shared_memory(2, tmp_path, timeout_s=20)

    def count(rank: int) -> bool:
        return all(
            ranks[rank].all_reduce(torch.full((3,), float(i * (rank + 1))))[1] == 3.0 * i
            for i in range(400)
        )

    assert run_ranks(2, count) == [True, True]


RANK = """
import sys, time, pathlib, torch
from shoal.errors import PeerLost
from shoal.parallel.shared_memory import SharedMemory
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
ranks = SharedMemory(rank, 2, "killed", timeout_s=1.0, folder=folder)
try:
    for i in range(10**9):
        total = ranks.all_reduce(torch.full((576,), float(i)))
        assert bool((total == 2.0 * i).all()), i
        if i == 1000:
            print("running", flush=True)
except PeerLost as error:
    print("lost", error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_process_is_lost_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    survivor, victim = processes
    try:
        assert survivor.stdout is not None and victim.stdout is not None
        assert survivor.stdout.readline() == "running\n"
        assert list(tmp_path.iterdir()) == []
        victim.send_signal(number)
        started_s = time.monotonic()
        assert survivor.stdout.readline().startswith("lost rank 1 has been silent")
        assert time.monotonic() - started_s < 3
        assert survivor.wait(10) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert list(tmp_path.iterdir()) == []
