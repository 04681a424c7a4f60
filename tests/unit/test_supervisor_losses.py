"""Losses in a row, nodes that are left out, other placements: the brain alone."""

from __future__ import annotations

import pytest
from fleet_fakes import DIMS
from supervisor_rig import Rig, kinds, placement_of

from shoal.cluster.blame import LONGEST_PAUSE_S, LOSSES_IN_A_ROW, PATIENT_LOSSES, REST_S
from shoal.cluster.placement import divide
from shoal.cluster.supervisor import (
    REPLAN_S,
    SETTLE_S,
    Dismiss,
    Form,
    Load,
    Replan,
    Start,
)
from shoal.config import Split

# ---- losses in a row --------------------------------------------------------------------------


def pauses(rig: Rig, number: int) -> list[float]:
    """How long the seat stays empty after each of so many losses."""
    found = []
    for _ in range(number):
        rig.now_s += 1
        rig.lose()
        began_s = rig.now_s
        while not (told := rig.next()):
            wake_s = rig.brain.wake_s()
            assert wake_s is not None and wake_s > rig.now_s
            rig.now_s = wake_s
        if Replan in kinds(told):
            return found
        found.append(rig.now_s - began_s)
        rig.serve(told)
    return found


def test_after_losses_in_a_row_there_is_ever_more_time_between_attempts() -> None:
    found = pauses(Rig("a", home=("a",)).formed(), LOSSES_IN_A_ROW - 1)
    assert found[:PATIENT_LOSSES] == [0] * PATIENT_LOSSES
    rest = found[PATIENT_LOSSES:]
    assert rest == pytest.approx([0.5, 1.0, 2.0]) and max(rest) <= LONGEST_PAUSE_S


def test_workers_of_a_node_that_are_lost_together_are_one_loss() -> None:
    rig = Rig(*"aaaaaaaa", home=("a",)).formed()
    for index in range(8):
        rig.now_s += 0.05
        rig.lose(index)
    assert kinds(rig.next()) == [Start] * 8


def test_a_step_that_finishes_ends_the_row() -> None:
    rig = Rig("a", home=("a",)).formed()
    assert pauses(rig, 5)[-1] > 0
    rig.brain.worked()
    assert pauses(rig, 1) == [0]


def test_a_node_with_too_many_losses_in_a_row_is_left_out() -> None:
    rig = Rig("a", "b", home=("a",)).formed()
    assert len(pauses(rig, 10)) == LOSSES_IN_A_ROW - 1
    rig.brain.placed(placement_of("b", "b"), rig.now_s)
    rig.serve()
    assert rig.brain.is_formed and rig.nodes == ["b", "b"]


def test_losses_within_a_minute_leave_a_node_out_even_if_steps_finish_in_between() -> None:
    rig = Rig("a", "b").formed()
    for _ in range(5):
        rig.lose()
        rig.formed()
        rig.brain.worked()
        rig.now_s += 5
    rig.lose()
    assert rig.next() == [Replan(frozenset("a"))]


def test_losses_that_are_far_apart_do_not_leave_a_node_out() -> None:
    rig = Rig("a", "b").formed()
    for _ in range(20):
        rig.lose()
        assert Replan not in kinds(rig.serve())
        rig.brain.worked()
        rig.now_s += 15


# ---- nodes that are left out ------------------------------------------------------------------


def test_a_silent_node_is_left_out_at_once() -> None:
    rig = Rig("a", "b").formed()
    rig.lose(silent=True)
    assert rig.next() == [Replan(frozenset("a"))]
    assert rig.next() == [], "it waits for the answer"


def test_a_node_that_lost_a_worker_with_its_connection_is_used_again() -> None:
    rig = Rig("a", "b").formed()
    rig.lose()
    assert kinds(rig.serve()) == [Start, Load, Form]
    assert rig.nodes == ["a", "b"]


def test_home_is_never_left_out_for_silence() -> None:
    rig = Rig("a", "b", home=("a",)).formed()
    for _ in range(20):
        rig.lose(silent=True)
        assert Replan not in kinds(rig.serve())
        rig.brain.worked()
        rig.now_s += 1


def test_a_node_is_used_again_after_its_rest() -> None:
    rig = Rig("a", "b").formed()
    rig.lose(silent=True)
    rig.next()
    rig.brain.placed(placement_of("b", "c"), rig.now_s)
    rig.serve()
    rig.now_s += REST_S - 1
    rig.lose(1, silent=True)
    assert rig.next() == [Replan(frozenset("ac"))]
    rig.brain.unplaceable(rig.now_s)
    rig.now_s += REPLAN_S
    assert rig.next() == [Replan(frozenset())]


def test_when_nothing_else_is_left_all_are_pardoned_and_it_goes_on_asking() -> None:
    rig = Rig("a").formed()
    rig.lose(silent=True)
    assert rig.next() == [Replan(frozenset("a"))]
    for _ in range(3):
        rig.brain.unplaceable(rig.now_s)
        assert rig.next() == []
        assert rig.brain.wake_s() == rig.now_s + REPLAN_S
        rig.now_s += REPLAN_S
        assert rig.next() == [Replan(frozenset())], "nobody is left out any more"
    rig.brain.placed(placement_of("a"), rig.now_s)
    rig.serve()
    assert rig.brain.is_formed


def test_when_a_node_is_gone_those_on_their_way_there_are_given_up() -> None:
    rig = Rig("a", "a", "b")
    first, second, third = rig.next()
    assert isinstance(first, Start) and isinstance(second, Start)
    rig.obey(third)
    rig.brain.gone("a", rig.now_s)
    told = rig.next()
    assert Dismiss(first.seat.worker) in told and Dismiss(second.seat.worker) in told
    assert Replan(frozenset("a")) in told
    rig.brain.called(first.seat.worker, rig.now_s)
    assert Load not in kinds(rig.next()), "a late call is a stranger's"


# ---- another placement ------------------------------------------------------------------------


def test_survivors_keep_their_seats_and_load_nothing() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "d", "c"), rig.now_s)
    told = rig.serve()
    assert kinds(told) == [Start, Load, Form]
    assert [rig.workers[0], rig.workers[2]] == [first, last]
    assert rig.nodes == ["a", "d", "c"]


def test_survivors_with_another_shard_load_what_they_lack() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "c"), rig.now_s)
    told = rig.serve()
    assert kinds(told) == [Load, Load, Form]
    assert rig.workers == [first, last]
    assert [len(each.seat.shard.layers) for each in told[:2]] == [15, 15]


def test_who_has_no_seat_any_more_is_dismissed() -> None:
    rig = Rig("a", "b", "c").formed()
    first, _, last = rig.workers
    rig.lose(1, silent=True)
    rig.next()
    rig.brain.placed(placement_of("c"), rig.now_s)
    told = rig.serve()
    assert told[0] == Load(rig.brain.placement.seats[0]) and told[1] == Dismiss(first)
    assert rig.workers == [last]


def test_a_node_gives_a_seat_to_the_worker_that_lacks_least() -> None:
    rig = Rig("a", "a", "b").formed()
    first, second, _ = rig.workers
    rig.lose(2, silent=True)
    rig.next()
    # Layers 8 to 30: the second has 10 to 20, the first only 8 and 9.
    two = divide(DIMS, Split(pipeline=2, layers=(8, 22)), ["c", "a"]).replicas[0]
    rig.brain.placed(two, rig.now_s)
    told = rig.serve()
    assert Dismiss(first) in told
    assert rig.workers[1] == second


def test_who_is_still_loading_is_kept_for_the_same_shard_only() -> None:
    rig = Rig("a", "b", "c").formed()
    rig.lose(0)
    (start,) = rig.next()
    rig.obey(start)
    rig.next()
    loading = rig.workers[0]
    rig.lose(2, silent=True)
    assert rig.next() == [Replan(frozenset("c"))]
    rig.brain.placed(placement_of("a", "b", "d"), rig.now_s)
    assert kinds(rig.next()) == [Start]
    assert rig.workers[0] == loading
    rig.brain.lost(rig.workers[2], rig.now_s, silent=True)
    rig.next()
    rig.brain.placed(placement_of("a", "b"), rig.now_s)
    assert Dismiss(loading) in rig.next()


# ---- two nodes that do not reach each other ---------------------------------------------------


def test_of_two_nodes_that_do_not_reach_each_other_one_is_left_out_never_the_head_s() -> None:
    rig = Rig("a", "b", home=("b",)).formed()
    one, other = rig.workers
    for _ in range(2):
        rig.brain.begin(rig.now_s)
        rig.now_s += SETTLE_S
        [form] = rig.next()
        assert isinstance(form, Form)
        rig.brain.not_formed(one, form.epoch, rig.now_s, unreachable=other)
    assert rig.next() == [Dismiss(one), Replan(frozenset("a"))]


def test_a_neighbour_on_the_same_node_that_cannot_be_dialled_blames_no_node() -> None:
    rig = Rig("a", "a").formed()
    one, other = rig.workers
    for _ in range(3):
        rig.brain.begin(rig.now_s)
        rig.now_s += SETTLE_S
        [form] = rig.next()
        assert isinstance(form, Form)
        rig.brain.not_formed(one, form.epoch, rig.now_s, unreachable=other)
    assert kinds(rig.next()) == [Dismiss, Start]
