"""Real worker processes of one machine: given cores, missed when they end, gone with their head."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from scripted_head import eventually, num_open_files

from shoal import LLM, SamplingParams
from shoal.config import Split
from shoal.engine.assembly import usable_cores
from shoal.errors import PlacementError, RetryError
from shoal.fleet.inbox import Inbox
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.reception import Reception
from shoal.fleet.worker_line import WorkerLine
from shoal.parallel.endpoint import LocalOnly, listen

pytestmark = pytest.mark.slow

WAIT_S = 60.0
MODEL = "smollm2-135m"
CORES = usable_cores()[:2]


class Site:
    """A launcher and the head that its workers call."""

    def __init__(self, folder: Path) -> None:
        self.exits: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.reception = Reception(listen(f"unix:{folder}/head.sock", LocalOnly()), services={})
        self.launcher = LocalLauncher(
            self.reception.address, folder, lambda *end: self.exits.put(end), cores=CORES
        )
        self._lines: list[WorkerLine] = []

    def start(self, worker: str, num_threads: int = 1) -> tuple[WorkerLine, psutil.Process]:
        before = set(self.processes())
        inbox = Inbox()
        self.reception.expect(worker, inbox)
        self.launcher.start(worker, LOCAL_NODE, num_threads=num_threads)
        line = self.reception.wait_for(worker, inbox, deadline_s=time.monotonic() + WAIT_S)
        self._lines.append(line)
        (process,) = set(self.processes()) - before
        return line, process

    @property
    def nursery(self) -> psutil.Process:
        return psutil.Process(self.launcher._nursery.pid)

    def processes(self) -> list[psutil.Process]:
        return self.nursery.children()

    def next_exit(self) -> tuple[str, int]:
        return self.exits.get(timeout=WAIT_S)

    def close(self) -> None:
        for line in self._lines:
            line.dismiss()
        self.launcher.close()
        self.reception.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made: list[Site] = []
    with tempfile.TemporaryDirectory() as folder:
        # The thread that makes a launcher may end long before its workers.
        maker = threading.Thread(target=lambda: made.append(Site(Path(folder))))
        maker.start()
        maker.join()
        yield made[0]
        made[0].close()


@pytest.mark.skipif(len(CORES) < 2, reason="one core can only be shared")
def test_workers_get_the_least_used_cores_and_exits_are_reported(site: Site) -> None:
    (_, first), (line, second) = site.start("a"), site.start("b")
    assert [first.cpu_affinity(), second.cpu_affinity()] == [[core] for core in CORES]
    line.dismiss()
    assert site.next_exit() == ("b", 0)
    _, third = site.start("c")
    assert third.cpu_affinity() == CORES[1:], "the core that became free"
    _, fourth = site.start("d", num_threads=2)
    assert fourth.cpu_affinity() == CORES
    os.kill(first.pid, signal.SIGKILL)
    assert site.next_exit() == ("a", -signal.SIGKILL)
    site.launcher.stop("c")
    assert site.next_exit() == ("c", -signal.SIGKILL)
    site.launcher.stop("c")  # dead ones and unknown ones are ignored
    site.launcher.stop("nobody")
    assert fourth.is_running()


def test_closing_leaves_no_process_and_no_thread() -> None:
    threads = set(threading.enumerate())
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        processes = [site.start(name)[1] for name in ("a", "b")] + [site.nursery]
        site.close()
        _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
    assert not alive and set(threading.enumerate()) <= threads


def test_the_end_of_the_nursery_ends_its_workers_and_another_takes_its_place(site: Site) -> None:
    _, process = site.start("a")
    site.nursery.kill()
    assert site.next_exit() == ("a", -signal.SIGKILL)
    with pytest.raises(PlacementError, match=r"process that starts workers has ended.*-9"):
        site.launcher.start("b", LOCAL_NODE, num_threads=1)
    site.launcher.stop("a")
    psutil.wait_procs([process], timeout=WAIT_S)
    assert not process.is_running()
    eventually(lambda: site.launcher._nursery.poll() is None, "there is no other nursery")
    _, process = site.start("c")
    assert process.is_running()


def test_a_nursery_that_cannot_be_started_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/nowhere/python")
        site.nursery.kill()
        eventually(lambda: "cannot be started" in caplog.text, "nobody was told")
    eventually(lambda: site.launcher._nursery.poll() is None, "there is no other nursery")
    _, process = site.start("a")
    assert process.is_running()


HEAD = """
import sys, time, pathlib
from shoal.fleet.inbox import Inbox
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.fleet.reception import Reception
from shoal.parallel.endpoint import LocalOnly, listen
folder = pathlib.Path(sys.argv[1])
reception = Reception(listen(f"unix:{folder}/head.sock", LocalOnly()), services={})
launcher = LocalLauncher(reception.address, folder, print, cores=[])
inbox = Inbox()
reception.expect("a", inbox)
launcher.start("a", LOCAL_NODE, num_threads=1)
line = reception.wait_for("a", inbox, deadline_s=time.monotonic() + 60)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_head_that_is_killed_leaves_no_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        head = subprocess.Popen([sys.executable, "-c", HEAD, folder], stdout=subprocess.PIPE)
        assert head.stdout is not None and head.stdout.readline() == b"ready\n"
        processes = psutil.Process(head.pid).children(recursive=True)
        assert len(processes) == 2, "a nursery and a worker"
        head.kill()
        head.communicate()
        _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
        assert not alive


def test_a_closed_fleet_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prompt, params = "1, 2, 3,", SamplingParams(temperature=0, max_tokens=4)
    threads, num_files = set(threading.enumerate()), num_open_files()
    memory = set(Path("/dev/shm").glob("shoal*"))
    split = Split(pipeline=2, tensor=2)
    with LLM(MODEL, dtype="float32", kv_memory="32MiB", split=split) as llm:
        assert llm.generate(prompt, params)[0].text
        assert len(psutil.Process().children(recursive=True)) == 5
        assert list(tmp_path.iterdir()), "workers listen in a folder of the fleet's own"
    assert psutil.Process().children() == []
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: set(threading.enumerate()) <= threads, "threads are left")
    eventually(lambda: num_open_files() <= num_files, "files or sockets are left open")
    # What others of this machine have at the moment goes away, what we left would not.
    left = set(Path("/dev/shm").glob("shoal*")) - memory
    eventually(lambda: not any(path.exists() for path in left), "shared memory is left")


def test_a_fleet_that_cannot_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    with pytest.raises(Exception, match="hold no block"):
        LLM(MODEL, dtype="float32", kv_memory=1, split=Split(pipeline=2, replicas=2))
    assert psutil.Process().children() == []
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: set(threading.enumerate()) <= threads, "threads are left")


def test_a_stream_ends_with_an_error_when_no_worker_can_be_brought_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split, patience_s = Split(pipeline=2), 2.0
    with LLM(
        MODEL, dtype="float32", kv_memory="32MiB", split=split, recovery_timeout_s=patience_s
    ) as llm:
        deltas = llm.stream_sync("1, 2, 3,", SamplingParams(temperature=0, max_tokens=200))
        next(deltas)
        (nursery,) = psutil.Process().children()
        monkeypatch.setattr(sys, "executable", "/bin/false")
        nursery.kill()
        with pytest.raises(RetryError, match=r"no workers since .* try again later"):
            for _ in deltas:
                pass
