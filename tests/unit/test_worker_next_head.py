"""A worker whose head dies keeps what it holds, and is taken back by the next head."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from scripted_head import (
    ScriptedHead,
    ScriptedWorker,
    eventually,
    form_of,
    load_of,
    neighbour,
    nothing_left_behind,
    plan_of,
    prepare_of,
)
from shared_models import ALL, FIRST_HALF, SECOND_HALF, make_model

from shoal.messages import StepResult
from shoal.parallel.control import Failed, Formed, Greeting, Loaded, Prepared, Stop
from shoal.worker import process

HOLD_S = 8.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("single", tmp_path_factory.mktemp("tiny") / "model").path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "_REDIAL_S", 0.02)
    with nothing_left_behind():
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def served(folder: Path, model: Path, hold_s: float = HOLD_S) -> tuple[ScriptedWorker, object]:
    """A worker that has computed a step for a head, which has died since; and its results."""
    head = ScriptedHead(folder)
    worker = head.hire()
    worker.say(load_of(model, ALL, hold_s=hold_s))
    num_blocks = worker.hear(Loaded).num_blocks
    worker.say(form_of(4, num_blocks=num_blocks))
    worker.hear(Formed)
    worker.say(plan_of(4))
    results = worker.hear(StepResult).results
    head.vanish()
    return worker, results


def test_the_next_head_takes_a_worker_back_with_its_weights(folder: Path, model: Path) -> None:
    worker, results = served(folder, model)
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        hello = worker.hellos[0]
        assert (hello.shards, hello.epoch, hello.caller) == ((ALL,), 4, "w")
        worker.say(load_of(model, ALL, hold_s=HOLD_S, num_blocks=8))
        told = worker.hear(Loaded)
        assert (told.num_read_bytes, told.num_blocks) == (0, 8)
        worker.say(form_of(4))  # of the head that is gone
        worker.say(plan_of(4))
        worker.say(form_of(5))
        assert worker.hear(Formed).epoch == 5
        worker.say(plan_of(5))
        assert worker.hear(StepResult).results == results


def test_a_worker_has_no_seat_until_the_next_head_gives_it_one(folder: Path, model: Path) -> None:
    worker, _ = served(folder, model)
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        worker.say(form_of(5))
        assert "before its shard is loaded" in worker.hear(Failed).message


def test_what_the_old_head_said_last_is_dropped(folder: Path, model: Path) -> None:
    head = ScriptedHead(folder)
    worker = head.hire()
    worker.say(load_of(model, SECOND_HALF, hold_s=HOLD_S))
    worker.hear(Loaded)
    worker.say(form_of(1, previous_rank=0))
    upstream = neighbour(worker, Greeting(role="stage", epoch=1, sender=0))
    worker.hear(Formed)
    worker.say(plan_of(1))  # waits for hidden states that never come
    worker.say(prepare_of(model, FIRST_HALF, hold_s=HOLD_S))
    head.vanish()
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        assert worker.hellos[0].shards == (SECOND_HALF,)
        worker.say(form_of(2))
        worker.hear(Failed)
    upstream.close()


def test_a_spare_comes_back_with_all_that_it_has_read_ahead(folder: Path, model: Path) -> None:
    head = ScriptedHead(folder)
    worker = head.hire()
    for shard in (FIRST_HALF, SECOND_HALF):
        worker.say(prepare_of(model, shard, hold_s=HOLD_S))
        worker.hear(Prepared)
    head.vanish()
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        assert worker.hellos[0].shards == (FIRST_HALF, SECOND_HALF)
        worker.say(load_of(model, SECOND_HALF))
        assert worker.hear(Loaded).num_read_bytes == 0


def test_one_head_after_the_other_may_die(folder: Path, model: Path) -> None:
    worker, _ = served(folder, model)
    for epoch in (5, 6):
        head = ScriptedHead(folder)
        head.take_back(worker)
        worker.say(load_of(model, ALL, hold_s=HOLD_S, num_blocks=8))
        assert worker.hear(Loaded).num_read_bytes == 0
        worker.say(form_of(epoch))
        worker.hear(Formed)
        head.vanish()
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        assert worker.hellos[0].epoch == 6


@pytest.mark.parametrize("hold_s", [0.0, 0.3])
def test_a_worker_that_no_head_takes_back_in_time_ends(
    hold_s: float, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start_s = time.monotonic()
    worker, _ = served(folder, model, hold_s)
    worker.join()
    assert hold_s <= time.monotonic() - start_s < hold_s + 3
    assert ("no head came within" in caplog.text) == (hold_s > 0)


def test_a_worker_that_the_next_head_does_not_want_ends(folder: Path, model: Path) -> None:
    worker, _ = served(folder, model)
    with closing(ScriptedHead(folder)) as head:
        head.take_back(worker)
        worker.say(Stop())
        worker.join()


def test_heads_that_say_nothing_do_not_keep_a_worker_for_ever(
    folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker, _ = served(folder, model, hold_s=1.0)
    silent = ScriptedHead(folder)
    start_s = time.monotonic()
    while time.monotonic() - start_s < 0.5:
        silent.take_back(worker)
        worker.hang_up()
    silent.vanish()
    eventually(lambda: "no head came within" in caplog.text, "it waits", within_s=5.0)
    assert time.monotonic() - start_s < 3
    worker.join()
