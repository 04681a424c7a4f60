"""The process that starts workers is killed, and they with it: another one starts others."""

from __future__ import annotations

import psutil
import pytest
from mayhem import Streams, clean_fleet, config_of, decoding, same, until
from split_fleets import open_yard

from shoal.config import Split

pytestmark = pytest.mark.slow


def nursery_of_this_process() -> psutil.Process:
    children = psutil.Process().children()
    [nursery] = [each for each in children if "shoal.fleet.nursery" in each.cmdline()]
    return nursery


def test_streams_survive_the_death_of_the_process_that_starts_workers() -> None:
    config = config_of(split=Split(pipeline=2))
    with open_yard() as yard, clean_fleet(yard, config) as fleet:
        calm = Streams(fleet.engine).answers()
        before = fleet.engine.stats()
        streams = Streams(fleet.engine)
        until(fleet.engine, decoding(before))
        nursery = nursery_of_this_process()
        nursery.kill()
        same(calm, streams.answers())
        after = fleet.engine.stats()
        assert {worker.pid for worker in after.workers}.isdisjoint(
            worker.pid for worker in before.workers
        )
        assert nursery_of_this_process().pid != nursery.pid
