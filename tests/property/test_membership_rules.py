"""Heartbeats and looks at any times: the living never count as dead, the dead always and once."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.membership import Membership

DEAD_AFTER_S = 1.25
TICK_S = 0.25
END_S = 12.0
SLACK_S = 1e-6

on_time_looks = st.lists(st.floats(0.02, TICK_S), min_size=1, max_size=60)
# An observer also starves, freezes, and has its clock put forward and back.
any_looks = st.lists(
    st.one_of(st.floats(0.02, TICK_S), st.floats(0.5, 900.0)), min_size=1, max_size=60
)
beats = st.lists(st.floats(0.02, DEAD_AFTER_S - TICK_S), min_size=1, max_size=60)

MAX_STEPS = 3
# A step of the clock may count as one tick of silence, and several may come between two beats.
beats_despite_steps = st.lists(
    st.floats(0.02, DEAD_AFTER_S - (1 + MAX_STEPS) * TICK_S), min_size=1, max_size=60
)


@dataclass
class Observed:
    """Deaths as (worker, time, last sign), of one run over a shared clock."""

    deaths: list[tuple[str, float, float]] = field(default_factory=list)
    end_s: float = 0.0


def times(pauses: list[float], end_s: float) -> list[float]:
    """The pauses over and over, until the end."""
    found, now_s, i = [], 0.0, 0
    while now_s < end_s:
        now_s += pauses[i % len(pauses)]
        found.append(now_s)
        i += 1
    return found


def observe(
    looks_s: list[float], beats_s: dict[str, list[float]], skew: dict[float, float] | None = None
) -> Observed:
    """Heartbeats are handed over when they come. `skew`: what the clock is off by, from when on."""
    members = Membership(DEAD_AFTER_S, TICK_S)
    last_s = dict.fromkeys(beats_s, 0.0)
    for worker in beats_s:
        members.join(worker, 0.0)
    queue = [(at_s, 0, worker) for worker, ats_s in beats_s.items() for at_s in ats_s]
    queue += [(at_s, 1, "") for at_s in looks_s]
    heapq.heapify(queue)
    off_s = 0.0
    observed = Observed()
    while queue:
        now_s, is_look, worker = heapq.heappop(queue)
        if is_look:
            off_s = (skew or {}).get(now_s, off_s)
            dead = members.silent(now_s + off_s)
            observed.deaths += [(name, now_s, last_s[name]) for name, _ in dead]
        else:
            members.heard(worker, now_s + off_s)
            last_s[worker] = now_s
        observed.end_s = now_s
    return observed


@given(looks=on_time_looks, beats=beats)
def test_who_is_heard_often_enough_is_never_declared_dead(
    looks: list[float], beats: list[float]
) -> None:
    observed = observe(times(looks, END_S), {"a": times(beats, END_S + 1.0)})
    assert observed.deaths == []


@given(looks=on_time_looks, beats=beats, death_s=st.floats(0.0, 5.0))
def test_the_dead_are_found_in_time_and_once(
    looks: list[float], beats: list[float], death_s: float
) -> None:
    signs = [at_s for at_s in times(beats, END_S) if at_s <= death_s]
    alive = times([0.2], END_S + 1.0)
    observed = observe(times(looks, END_S), {"a": signs, "b": alive})
    ((worker, found_s, last_s),) = observed.deaths
    assert worker == "a"
    assert DEAD_AFTER_S - SLACK_S <= found_s - last_s <= DEAD_AFTER_S + TICK_S + SLACK_S


@given(looks=any_looks, unread=st.booleans())
def test_pauses_of_the_observer_kill_nobody(looks: list[float], unread: bool) -> None:
    """What comes during a pause is handed over right before the look that ends it, or after it."""
    delay_s = SLACK_S if unread else -SLACK_S
    beats_s = []
    looks_s = times(looks, END_S)
    for start_s, stop_s in pairwise([0.0, *looks_s]):
        is_pause = stop_s - start_s > TICK_S
        beats_s.append(stop_s + delay_s if is_pause else stop_s)
    assert observe(looks_s, {"a": sorted(beats_s)}).deaths == []


@given(
    looks=on_time_looks,
    beats=beats_despite_steps,
    steps=st.lists(
        st.tuples(st.integers(0, 40), st.floats(-1e6, 1e6).filter(lambda s: abs(s) > 1.0)),
        max_size=MAX_STEPS,
    ),
)
def test_steps_of_the_clock_kill_nobody(
    looks: list[float], beats: list[float], steps: list[tuple[int, float]]
) -> None:
    looks_s = times(looks, END_S)
    skew = {looks_s[i % len(looks_s)]: off_s for i, off_s in steps}
    observed = observe(looks_s, {"a": times(beats, END_S + 1.0)}, skew)
    assert observed.deaths == []


@given(pauses=st.lists(st.floats(0.51, 90.0), min_size=1, max_size=20))
def test_an_observer_that_is_always_late_finds_the_dead(pauses: list[float]) -> None:
    looks_s = times(pauses, 900.0)
    observed = observe(looks_s, {"a": [], "b": [at_s - SLACK_S for at_s in looks_s]})
    assert [worker for worker, _, _ in observed.deaths] == ["a"]
