"""Heartbeats: who counts as dead, when, and what must not count against anybody."""

from __future__ import annotations

import pytest

from shoal.cluster.membership import Membership

DEAD_AFTER_S = 1.25
TICK_S = 0.25


@pytest.fixture
def members() -> Membership:
    members = Membership(DEAD_AFTER_S, TICK_S)
    members.join("a", 100.0)
    members.join("b", 100.0)
    return members


def look(
    members: Membership, *, start_s: float, stop_s: float, alive: tuple[str, ...] = ()
) -> dict[str, float]:
    """Look on time from start to stop; `alive` are heard before each look. Deaths by time."""
    deaths: dict[str, float] = {}
    now_s = start_s
    while now_s <= stop_s:
        for worker in alive:
            members.heard(worker, now_s)
        deaths |= {worker: now_s for worker, _ in members.silent(now_s)}
        now_s += TICK_S
    return deaths


def test_the_silent_one_dies_once_and_the_other_lives(members: Membership) -> None:
    deaths = look(members, start_s=100.25, stop_s=110.0, alive=("b",))
    assert deaths == {"a": 101.25}
    assert "a" not in members
    assert "b" in members


def test_silence_is_told(members: Membership) -> None:
    look(members, start_s=100.25, stop_s=101.0, alive=("b",))
    assert members.silent(101.25) == [("a", pytest.approx(1.25))]


def test_a_late_heartbeat_of_the_dead_changes_nothing(members: Membership) -> None:
    look(members, start_s=100.25, stop_s=101.25, alive=("b",))
    members.heard("a", 101.3)
    assert "a" not in members
    assert look(members, start_s=101.5, stop_s=105.0, alive=("b",)) == {}


def test_who_has_left_does_not_die(members: Membership) -> None:
    members.leave("a")
    members.leave("never joined")
    assert look(members, start_s=100.25, stop_s=105.0, alive=("b",)) == {}


def test_a_frozen_observer_kills_nobody(members: Membership) -> None:
    look(members, start_s=100.25, stop_s=101.0)
    assert members.silent(160.0) == []  # both were about to die; their heartbeats lie unread
    assert members.silent(160.001) == []
    members.heard("b", 160.1)
    assert look(members, start_s=160.2, stop_s=160.8) == {"a": 160.45}


def test_a_clock_that_steps_kills_nobody(members: Membership) -> None:
    for now_s in (100.25, 9_000.0, 9_000.25, 5.0, 5.25, 5.5, 700.0):
        assert members.silent(now_s) == []
        members.heard("a", now_s)
        members.heard("b", now_s)
    assert look(members, start_s=700.25, stop_s=702.0, alive=("a",)) == {"b": 701.25}


def test_an_observer_that_is_always_late_still_finds_the_dead(members: Membership) -> None:
    deaths = []
    for now_s in range(101, 110):
        members.heard("b", float(now_s))
        deaths += members.silent(float(now_s))
    assert [worker for worker, _ in deaths] == ["a"]


def test_wakes_at_the_deadline_and_at_least_every_tick(members: Membership) -> None:
    assert members.wake_s(100.0) == pytest.approx(100.25)
    look(members, start_s=100.25, stop_s=101.0, alive=("b",))
    assert members.silent(101.2) == []
    assert members.wake_s(101.2) == pytest.approx(101.25)
    assert members.wake_s(50.0) == pytest.approx(50.05), "the clock was put back"


def test_nobody_to_watch() -> None:
    members = Membership(DEAD_AFTER_S, TICK_S)
    assert members.wake_s(3.0) is None
    assert members.silent(7.0) == []
    members.join("late", 5_000.0)
    assert look(members, start_s=5_000.25, stop_s=5_010.0) == {"late": 5_001.25}


def test_may_join_again_after_death(members: Membership) -> None:
    look(members, start_s=100.25, stop_s=102.0, alive=("b",))
    members.join("a", 102.0)
    assert look(members, start_s=102.25, stop_s=103.0, alive=("b",)) == {}
    assert "a" in members


def test_waking_in_time_is_never_too_early() -> None:
    """Sums of times round: a look at `wake_s` must not find that it is not yet time, for ever."""
    for joined_s in (0.2874479020641476, 1e6 / 3, 1e5 / 7):
        members = Membership(DEAD_AFTER_S, TICK_S)
        members.join("a", joined_s)
        looks = 0
        while (wake_s := members.wake_s(joined_s + 2.0)) is not None:
            members.silent(wake_s)
            looks += 1
            assert looks < 10
