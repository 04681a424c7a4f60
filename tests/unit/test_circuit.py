"""The circuit breaker of a replica, with a clock set by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.circuit import SAME_CAUSE_S, Circuit


def failing(circuit: Circuit, now_s: float) -> None:
    """A trial that is due, and fails."""
    assert circuit.allows(now_s)
    circuit.started(now_s)
    assert not circuit.allows(now_s)
    circuit.failed(now_s)


def open_circuit() -> Circuit:
    circuit = Circuit(first_wait_s=1, longest_wait_s=8)
    circuit.trip(0.0)
    return circuit


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not_count() -> None:
    circuit = Circuit(failures_to_open=3)
    for now_s in (1, 2):
        circuit.failed(now_s)
    circuit.succeeded(2)
    for now_s in (3, 4):
        circuit.failed(now_s)
    assert circuit.allows(4)
    circuit.failed(5)
    assert not circuit.allows(5)


def test_all_that_one_failed_step_ends_counts_once() -> None:
    circuit = Circuit(failures_to_open=2)
    for number in range(10):
        circuit.failed(1 + number * SAME_CAUSE_S / 100)
    assert circuit.allows(1.1)
    circuit.failed(2)
    assert not circuit.allows(2)


def test_trials_are_rarer_and_rarer_but_never_end() -> None:
    circuit, now_s, waits = open_circuit(), 0.0, []
    for _ in range(6):
        waited_s = 0.0
        while not circuit.allows(now_s + waited_s):
            waited_s += 0.5
        now_s += waited_s
        waits.append(waited_s)
        failing(circuit, now_s)
    assert waits == [1, 2, 4, 8, 8, 8]


def test_a_trial_that_works_closes_it_and_the_waits_begin_anew() -> None:
    circuit = open_circuit()
    failing(circuit, 1)
    circuit.started(3)
    circuit.succeeded(4)
    assert circuit.state == "closed"
    circuit.trip(5)
    assert not circuit.allows(5.9)
    assert circuit.allows(6)


def test_successes_of_old_requests_do_not_close_it() -> None:
    circuit = open_circuit()
    circuit.succeeded(0.5)
    assert circuit.state == "open"


def test_a_trial_that_leaves_makes_room_for_another_and_a_silent_one_blocks_it_not_for_ever() -> (
    None
):
    circuit = open_circuit()
    circuit.started(1)
    assert not circuit.allows(1.5)
    circuit.withdrawn(1.5)
    assert circuit.allows(1.5)
    circuit.started(1.5)
    assert not circuit.allows(2.4)
    assert circuit.allows(2.5)


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["started", "succeeded", "failed", "withdrawn", "trip"]),
        st.floats(0, 20, allow_nan=False),
    ),
    max_size=60,
)


@given(MOVES)
def test_whatever_happens_it_may_be_tried_within_the_longest_wait(
    moves: list[tuple[str, float]],
) -> None:
    circuit, now_s = Circuit(first_wait_s=1, longest_wait_s=8), 0.0
    for move, later_s in moves:
        now_s += later_s
        if move != "started" or circuit.allows(now_s):
            getattr(circuit, move)(now_s)
        assert circuit.allows(now_s + 8)
        if circuit.state == "closed":
            assert circuit.allows(now_s)
    circuit.reset()
    assert circuit.allows(now_s)


@pytest.mark.parametrize("number", [1, 5])
def test_it_opens_after_as_many_as_were_asked_for(number: int) -> None:
    circuit = Circuit(failures_to_open=number)
    for turn in range(number):
        assert circuit.state == "closed"
        circuit.failed(turn)
    assert circuit.state == "open"
