"""All workers of a served model are replaced under load: no error, and the calm run's texts."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from split_fleets import Yard, ask, open_yard, whole

from shoal.config import EngineConfig, Split
from shoal.engine.outputs import RequestOutput
from shoal.fleet.fleet import Fleet
from shoal.request import SamplingParams

pytestmark = pytest.mark.slow

ASKED = [
    ("A recipe for pancakes:\n\n1.", SamplingParams(temperature=0, max_tokens=24)),
    ("1, 2, 3, 4, 5, 6, 7, 8,", SamplingParams(temperature=0.9, seed=7, max_tokens=16)),
    ("def fibonacci(n):", SamplingParams(temperature=0, max_tokens=12, logprobs=2)),
]


def config_of(split: Split) -> EngineConfig:
    return EngineConfig(
        model="smollm2-135m",
        dtype="float32",
        kv_memory_bytes=64 * 2**20,
        max_step_tokens=32,
        split=split,
    )


@pytest.fixture(scope="module")
def calm() -> list[RequestOutput]:
    with whole(config_of(Split())) as engine:
        return ask(engine, ASKED)


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with open_yard() as yard:
        yield yard


def pids(fleet: Fleet) -> set[int]:
    replicas = fleet.engine.stats().replicas or {"r0": fleet.engine.stats()}
    return {worker.pid for stats in replicas.values() for worker in stats.workers}


@pytest.mark.parametrize(
    ("split", "num_together"),
    [
        (Split(pipeline=2), 1),
        (Split(replicas=2, route="round-robin"), 1),
        (Split(replicas=2, route="round-robin"), 2),
    ],
    ids=["one replica", "two, rolling", "two, at once"],
)
def test_a_restart_under_load_is_not_noticed(
    split: Split, num_together: int, yard: Yard, calm: list[RequestOutput]
) -> None:
    with yard.fleet(config_of(split)) as fleet:
        before, blocks = pids(fleet), fleet.engine.stats().num_blocks
        said: list[str] = []

        def restart() -> None:
            said.append(fleet.restart(num_together))

        restarting = threading.Thread(target=restart)
        restarting.start()
        answers = ask(fleet.engine, ASKED)
        while restarting.is_alive():
            answers += ask(fleet.engine, ASKED)
        restarting.join()
        answers += ask(fleet.engine, ASKED)
        assert said == ["2 workers replaced, without a break"]
        assert len(before) == len(pids(fleet)) == 2
        assert not before & pids(fleet)
        assert fleet.engine.stats().num_blocks == blocks
        assert fleet.engine.health().ok
    texts = [each.samples[0].text for each in calm]
    assert [each.samples[0].text for each in answers] == texts * (len(answers) // len(texts))
    assert len(answers) >= 2 * len(texts)
