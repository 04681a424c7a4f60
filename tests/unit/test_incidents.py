"""Incidents: counted once, told in plain English, shown by /metrics."""

from __future__ import annotations

import msgspec
import pytest
from fastapi.testclient import TestClient
from operator_fakes import LOST, fake_incident
from server_fakes import FakeEngine

from shoal.engine.api import RECOVERY_BOUNDS_S, EngineStats
from shoal.engine.recovery import Recovery
from shoal.engine.story import told
from shoal.engine.tally import IncidentCounter
from shoal.server.app import create_app


def test_a_recovery_is_told_with_its_phases_in_order() -> None:
    assert told(LOST) == (
        "r0 lost r0s1t0-5 (its connection broke: reset by the other side): w7 starts on local, "
        "then epoch 5 begins; 12 requests went on after 0.62 s "
        "(start 0.02, load 0.31, form 0.04, recompute 0.25)"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"noticed_by": "heartbeat", "cause": "", "decisions": [], "num_requests": 1},
            "r0 lost r0s1t0-5 (no sign of life); 1 request went on after 0.62 s (start",
        ),
        (
            {"lost": ["a", "b"], "noticed_by": "step deadline"},
            "r0 lost a, b (a step took too long: reset",
        ),
        (
            {"outcome": "under way", "phases": {}},
            "; 12 requests wait, still under way",
        ),
        (
            {"outcome": "given up", "phases": {"total": 60.0}, "num_requests": 0},
            "; given up after 60.00 s, no request waited",
        ),
        (
            {"outcome": "given up", "phases": {"total": 60.0}},
            "; given up after 60.00 s, 12 requests were told to come again",
        ),
        (
            {"lost": [], "noticed_by": "operator", "cause": "rack2 is drained"},
            "r0 forms anew, asked by an operator (rack2 is drained): w7",
        ),
        ({"num_requests": 0, "phases": {"total": 0.1}}, "; ready again after 0.10 s, idle before"),
    ],
)
def test_every_end_has_its_words(changes: dict[str, object], said: str) -> None:
    assert said in told(fake_incident(**changes))


def test_all_incidents_are_counted() -> None:
    counter = IncidentCounter()
    for number in range(1, 6):
        outcome = "given up" if number == 3 else "recovered"
        phases = {"load": 0.5, "total": number / 2}
        counter.add(fake_incident(number=number, outcome=outcome, phases=phases))
    tally = counter.tally
    assert tally.ended == [("connection", "given up", 1), ("connection", "recovered", 4)]
    assert tally.phase_seconds == {"load": 2.0, "total": 6.0}
    within = dict(zip(RECOVERY_BOUNDS_S, tally.num_within, strict=True))
    assert (within[0.25], within[0.5], within[1.0], within[2.5]) == (0, 1, 2, 4)


def test_what_has_not_ended_is_not_counted() -> None:
    with pytest.raises(AssertionError, match="incident 1 has not ended"):
        IncidentCounter().add(fake_incident(outcome="under way"))


def test_stats_with_incidents_cross_the_wire() -> None:
    counter = IncidentCounter()
    counter.add(LOST)
    stats = EngineStats(incidents=[LOST], recoveries=counter.tally)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=EngineStats) == stats
    assert msgspec.json.decode(msgspec.json.encode(stats), type=EngineStats) == stats


def test_metrics_count_recoveries_by_replica() -> None:
    counter = IncidentCounter()
    for total_s in (0.62, 2.0):
        counter.add(fake_incident(phases={"load": 0.5, "total": total_s}))
    counter.add(fake_incident(noticed_by="heartbeat", outcome="given up"))
    told_by = {"r0": EngineStats(), "r1": EngineStats(recoveries=counter.tally)}
    lines = metrics_of(EngineStats(replicas=told_by))
    assert lines == metrics_of(EngineStats(replicas=told_by)), "counted again"
    for line in (
        'shoal_recoveries_total{noticed_by="connection",outcome="recovered",replica="r1"} 2.0',
        'shoal_recoveries_total{noticed_by="heartbeat",outcome="given up",replica="r1"} 1.0',
        'shoal_recovery_phase_seconds_total{phase="load",replica="r1"} 1.0',
        'shoal_recovery_seconds_bucket{le="0.75",replica="r1"} 1.0',
        'shoal_recovery_seconds_bucket{le="+Inf",replica="r1"} 2.0',
        'shoal_recovery_seconds_count{replica="r1"} 2.0',
        'shoal_recovery_seconds_sum{replica="r1"} 2.62',
    ):
        assert line in lines
    assert not [line for line in lines if 'replica="r0"' in line and "recover" in line]


def metrics_of(stats: EngineStats) -> list[str]:
    engine = FakeEngine()
    engine.stats = lambda: stats  # type: ignore[method-assign]
    with TestClient(create_app(engine)) as client:
        lines: list[str] = client.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("shoal_recover")]


def test_the_story_of_a_lack_that_lasts_for_days_stays_short() -> None:
    recovery = Recovery(fake_incident(), lambda _recovery: None)
    for number in range(1_000):
        recovery.note_decision(f"w{number} starts on rack2")
        recovery.note_loss(f"w{number}", "exit status 1", "connection", 0.0)
    told = recovery.incident(1, "under way")
    assert told.decisions[0] == "w0 starts on rack2"
    assert len(told.decisions) == len(told.lost) == 100
    assert recovery.trouble == "worker w999 is lost: exit status 1"
