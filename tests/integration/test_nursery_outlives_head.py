"""Real worker processes whose head is killed: they wait for the next one, and not for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec
import nursery_head
import psutil
import pytest
import scripted_head
from scripted_head import ScriptedHead, ScriptedLine, form_of, load_of, plan_of
from shared_models import ALL, make_model

from shoal.config import LEAST_DEAD_AFTER_S
from shoal.engine.assembly import usable_cores
from shoal.errors import PlacementError
from shoal.fleet.launch_local import LOCAL_NODE, LocalLauncher
from shoal.messages import StepResult
from shoal.models.config import decoder_config
from shoal.parallel.control import Formed, FromWorker, Loaded
from shoal.parallel.partition import whole_shard
from shoal.weights.source import open_source, resolve

pytestmark = pytest.mark.slow

WAIT_S = 60.0
CORES = usable_cores()[:2]


class KilledHead:
    """It had a nursery, a worker that held a model, and a spare that held nothing."""

    def __init__(self, folder: Path, model: Path, hold_s: float) -> None:
        unit = str(Path(scripted_head.__file__).parent)
        head = subprocess.Popen(
            [sys.executable, nursery_head.__file__, folder, model, str(hold_s)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": unit},
        )
        assert head.stdout is not None and head.stdout.readline() == b"ready\n"
        (self.nursery,) = psutil.Process(head.pid).children()
        self.workers = self.nursery.children()
        assert len(self.workers) == 2
        head.kill()
        head.communicate()
        (folder / "head.sock").unlink()  # a killed head leaves it behind

    def await_end(self) -> None:
        _, alive = psutil.wait_procs([self.nursery, *self.workers], timeout=WAIT_S)
        assert not alive


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("single", tmp_path_factory.mktemp("tiny") / "model").path


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_second_head_takes_the_workers_back_without_reading_a_byte(
    folder: Path, model: Path
) -> None:
    killed = KilledHead(folder, model, hold_s=WAIT_S)
    with closing(ScriptedHead(folder)) as head:
        launcher = LocalLauncher(head.address, folder, print, cores=CORES, hold_s=WAIT_S)
        line = ScriptedLine()
        head.answer(line, within_s=WAIT_S)
        hello = line.hellos[0]
        assert (hello.caller, hello.shards, hello.epoch) == ("a", (ALL,), 1)
        worker = psutil.Process(hello.pid)
        assert worker in killed.workers
        gone, _ = psutil.wait_procs(set(killed.workers) - {worker}, timeout=WAIT_S)
        assert len(gone) == 1, "who holds nothing does not wait"
        launcher.adopt("a", LOCAL_NODE, hello.pid)
        cores = launcher.place("a", 1)
        assert cores == tuple(CORES[:1])
        line.say(load_of(model, ALL, hold_s=WAIT_S, num_blocks=8, num_threads=1, cores=cores))
        told = line.hear(Loaded)
        assert (told.num_read_bytes, told.num_blocks) == (0, 8)
        assert pinned(worker) == {cores}
        line.say(form_of(2))
        line.hear(Formed)
        line.say(plan_of(2))
        assert line.hear(StepResult).epoch == 2
        launcher.start("b", LOCAL_NODE, num_threads=1)
        new = ScriptedLine()
        head.answer(new, within_s=WAIT_S)
        assert psutil.Process(new.hellos[0].pid).cpu_affinity() == CORES[1:2] or len(CORES) == 1
        launcher.close()
        killed.await_end()
        for each in (line, new):
            each.hang_up()


def pinned(process: psutil.Process) -> set[tuple[int, ...]]:
    return {tuple(os.sched_getaffinity(thread.id)) for thread in process.threads()}


def test_all_processes_end_when_no_head_comes(folder: Path, model: Path) -> None:
    start_s = time.monotonic()
    killed = KilledHead(folder, model, hold_s=2.0)
    killed.await_end()
    assert time.monotonic() - start_s > 2.0


def test_waiting_workers_end_with_their_nursery(folder: Path, model: Path) -> None:
    killed = KilledHead(folder, model, hold_s=WAIT_S)
    killed.nursery.kill()
    killed.await_end()


def test_only_the_process_that_was_adopted_is_killed(folder: Path) -> None:
    launcher = LocalLauncher("unix:/head", folder, print, cores=[])
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with closing(launcher), bystander:
        launcher.adopt("a", LOCAL_NODE, bystander.pid)
        # As if the number had been given to another process since.
        launcher._adopted["a"]._ident = (bystander.pid, 0.0)
        launcher.stop("a")
        launcher.adopt("b", LOCAL_NODE, bystander.pid)
        assert bystander.poll() is None
        launcher.stop("b")
        launcher.stop("b")
        assert bystander.wait(WAIT_S) == -signal.SIGKILL
        with pytest.raises(PlacementError, match=f"worker c .*no process {bystander.pid}"):
            launcher.adopt("c", LOCAL_NODE, bystander.pid)


@pytest.mark.skipif(len(CORES) < 2, reason="one core can only be shared")
def test_a_spare_gets_the_cores_of_the_worker_it_replaces(folder: Path) -> None:
    with closing(ScriptedHead(folder)) as head:
        launcher = LocalLauncher(head.address, folder, print, cores=CORES)
        lines = [ScriptedLine() for _ in range(3)]
        for name, line in zip("ab", lines, strict=False):
            launcher.start(name, LOCAL_NODE, num_threads=1)
            head.answer(line, within_s=WAIT_S)
        launcher.start_spare("s", LOCAL_NODE)
        head.answer(lines[2], within_s=WAIT_S)
        spare = psutil.Process(lines[2].hellos[0].pid)
        assert set(spare.cpu_affinity()) == set(usable_cores())
        assert launcher.place("b", 1) == (CORES[1],), "its own"
        launcher.stop("a")
        assert launcher.place("s", 1) == (CORES[0],)
        assert launcher.place("s", 1) == (CORES[0],)
        launcher.close()
        for line in lines:
            line.hang_up()


def test_a_heartbeat_goes_on_while_a_real_model_loads(folder: Path) -> None:
    files = resolve("smollm2-135m")
    with closing(open_source(files)) as source:
        shard = whole_shard(decoder_config(source.config).dims)
    with closing(ScriptedHead(folder)) as head:
        launcher = LocalLauncher(head.address, folder, print, cores=CORES[:1])
        line = ScriptedLine()
        launcher.start("a", LOCAL_NODE, num_threads=1)
        head.answer(line, within_s=WAIT_S)
        line.say(load_of(files.path, shard))
        heard_s, message = [time.monotonic()], None
        while not isinstance(message, Loaded):
            header, _ = line.reports.receive(WAIT_S)
            message = msgspec.msgpack.decode(header, type=FromWorker)
            heard_s.append(time.monotonic())
        launcher.close()
        line.hang_up()
    assert message.num_read_bytes > 0
    assert max(after - before for before, after in pairwise(heard_s)) < LEAST_DEAD_AFTER_S
