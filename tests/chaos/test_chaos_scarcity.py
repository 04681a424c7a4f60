"""No workers can be had: requests wait, then are told to come again, until there are workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from mayhem import Answers, Streams, clean_fleet, config_of, decoding, kill, same, until
from scripted_head import eventually
from split_fleets import Yard, open_yard

from shoal.config import Split
from shoal.errors import EngineStopped
from shoal.fleet.fleet import Fleet
from shoal.fleet.launch_local import LOCAL_NODE
from shoal.request import SamplingParams
from shoal.weights.source import resolve

pytestmark = pytest.mark.slow

TIMEOUT_S = 2.0
RESUME_S = 30.0


class Poor:
    """A fleet of two whose model file and node can be taken away."""

    def __init__(self, yard: Yard, fleet: Fleet, model: Path) -> None:
        self.nodes = yard.nodes
        self.engine = fleet.engine
        self.model = model
        self.calm: Answers = Streams(fleet.engine).answers()

    @contextmanager
    def node_full(self) -> Iterator[None]:
        self.nodes.full = {LOCAL_NODE}
        try:
            yield
        finally:
            self.nodes.full = set()

    @contextmanager
    def model_away(self) -> Iterator[None]:
        original = self.model.resolve()
        self.model.unlink()
        try:
            yield
        finally:
            self.model.symlink_to(original)

    def ask(self) -> None:
        list(self.engine.submit_sync([1, 2, 3], SamplingParams(max_tokens=1)))


Obstacle = Callable[[Poor], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poor]:
    original = resolve("smollm2-135m").path
    model = tmp_path_factory.mktemp("models") / original.name
    model.symlink_to(original)
    config = config_of(
        model=str(model), split=Split(pipeline=2), recovery_timeout_s=TIMEOUT_S, max_running=20
    )
    with open_yard() as yard, clean_fleet(yard, config) as fleet:
        yield Poor(yard, fleet, model)


@pytest.mark.parametrize("obstacle", [Poor.node_full, Poor.model_away])
def test_without_workers_requests_end_and_new_ones_are_refused(
    poor: Poor, obstacle: Obstacle
) -> None:
    with obstacle(poor):
        streams = Streams(poor.engine)
        until(poor.engine, decoding(streams.before))
        began_s = time.monotonic()
        kill(poor.engine, 0)
        ends = streams.ends()
        assert time.monotonic() - began_s >= TIMEOUT_S * 0.9
        # A few of the shortest may have ended well before.
        errors = [end for end in ends if end is not None]
        assert len(errors) > len(ends) / 2
        for error in errors:
            assert isinstance(error, EngineStopped)
            check_words(error)
        check_refused_at_once(poor)
    check_resumed(poor)


def test_without_workers_an_idle_engine_refuses_and_resumes(poor: Poor) -> None:
    with poor.node_full():
        kill(poor.engine, 0, 1)
        eventually(lambda: not poor.engine.health().ok, "all is well?", within_s=RESUME_S)
        check_refused_at_once(poor)
    check_resumed(poor)


def check_refused_at_once(poor: Poor) -> None:
    began_s = time.monotonic()
    with pytest.raises(EngineStopped) as refused:
        poor.ask()
    assert time.monotonic() - began_s < 1.0
    check_words(refused.value)
    assert not poor.engine.health().ok


def check_words(error: EngineStopped) -> None:
    assert (error.status, error.code) == (503, "no_workers")
    assert error.retry_after_s
    assert "no workers since" in error.message


def check_resumed(poor: Poor) -> None:
    eventually(lambda: poor.engine.health().ok, "it does not resume", within_s=RESUME_S)
    same(poor.calm, Streams(poor.engine).answers())
    assert poor.engine.health().ok
